"""What /openapi.json says beyond what the web framework sees: bodies that the routes read themselves, errors, keys."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from hyperclip_fast.serving.schemas import ClassifyBody, EmbedBody, ErrorBody, TaskBody

COMPONENTS = "#/components/schemas/"
BODIES: tuple[type[BaseModel], ...] = (ClassifyBody, EmbedBody, TaskBody)
FILE = {"type": "string", "format": "binary"}
TEXTS = {"type": "array", "items": {"type": "string"}}
NUMBERS = ("topk", "threshold")


def errors(*statuses: int) -> dict[int | str, Any]:
    """Answers that are errors, and those that any request may get."""
    return {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
        for status in sorted({*statuses, 401, 403, 429, 500})
    }


def reads(kind: type[BaseModel]) -> dict[str, Any]:
    """An operation whose body is JSON."""
    content = {"application/json": {"schema": {"$ref": COMPONENTS + kind.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def asks_of_images(kind: type[EmbedBody]) -> dict[str, Any]:
    """An operation whose body is a form, an image file, or JSON; beside an image file the fields are in the URL."""
    properties = kind.model_json_schema()["properties"]
    numbers = {name: properties[name] for name in NUMBERS if name in properties}
    fields: dict[str, Any] = {"task": TEXTS, "label": TEXTS, **numbers}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": FILE}, **fields},
    }
    raw = {"schema": FILE}
    operation = reads(kind)
    operation["requestBody"]["content"] |= {"multipart/form-data": {"schema": form}, "image/*": raw}
    operation["requestBody"]["content"]["application/octet-stream"] = raw
    text = "beside an image file as the body"
    operation["parameters"] = [
        {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
        for name, schema in fields.items()
    ]
    return operation


def describe(app: FastAPI) -> None:
    """Have an app's /openapi.json tell of the bodies, and of keys."""
    known = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = known()
            schemas = schema["components"]["schemas"]
            schemas |= {kind.__name__: kind.model_json_schema(ref_template=COMPONENTS + "{model}") for kind in BODIES}
            if app.state.service.options.keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
        return known()

    setattr(app, "openapi", openapi)  # noqa: B010  # the way that the framework offers
