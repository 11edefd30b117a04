"""What a request asks, checked: from a form, from an image file as the body, or from JSON."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.schemas import MAX_TOPK, Body, ClassifyBody, EmbedBody
from hyperclip_fast.serving.task_registry import TaskRegistry
from hyperclip_fast.tasks import AdaptedTask
from hyperclip_fast.utils.text_files import parse_json

RAW_TYPES = ("application/octet-stream", "image/")
NAMES = {"task": "tasks", "label": "labels", "topk": "topk", "threshold": "threshold"}  # of fields, as JSON has them
AnyBody = TypeVar("AnyBody", bound=Body)


@dataclass
class Question:
    """What a request asks: images' contents, each image's task with its name, and which classes are reported."""

    images: list[bytes]
    tasks: list[tuple[str | None, AdaptedTask]]
    topk: int = 0
    threshold: float = 0.0


async def read_question(
    request: Request, options: ServeOptions, registry: TaskRegistry, kind: type[EmbedBody]
) -> Question:
    """What a request asks; each image's task is taken as it is at this moment.

    Args:
        request: its body has arrived.
        options: the server's.
        registry: the server's tasks.
        kind: the model of its JSON, whose fields are those of a form, too.

    Raises:
        RequestError: 4xx, for anything that is wrong with it but the images themselves.
    """
    content_type = _content_type(request)
    if content_type == "application/json":
        if request.query_params:
            raise RequestError(422, "bad_field", "a request in JSON must have all fields there, got some in the URL")
        body = await read_json(request, kind)
        images = [_decoded(i, text) for i, text in enumerate(body.images)]
        if len(images) > options.max_images:
            raise RequestError(400, "bad_request", f"at most {options.max_images} images are taken, got {len(images)}")
    else:
        images, fields = await _images_and_fields(request, content_type, options)
        body = _checked(kind, [*request.query_params.multi_items(), *fields])
    tasks = await _tasks(body.tasks, body.labels, len(images), registry)
    if isinstance(body, ClassifyBody):
        return Question(images, tasks, body.topk, body.threshold)
    return Question(images, tasks)


async def read_json(request: Request, kind: type[AnyBody]) -> AnyBody:
    """A request's JSON as a model.

    Raises:
        RequestError: 415 or 400 for what is no JSON, 422 for what the model refuses.
    """
    if (content_type := _content_type(request)) != "application/json":
        raise RequestError(
            415, "bad_content_type", f"Content-Type must be application/json, got {content_type[:100]!r}"
        )
    try:
        value = parse_json((await request.body()).decode())
    except ValueError as error:
        raise RequestError(400, "bad_json", f"the body must be JSON in UTF-8: {error}") from error
    return _validated(kind, value)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _validated(kind: type[AnyBody], value: Any) -> AnyBody:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        parts = [f"{'.'.join(map(str, each['loc']))[:100]}: {each['msg']}" for each in error.errors()[:5]]
        raise RequestError(422, "invalid", "; ".join(parts)) from error


async def _images_and_fields(
    request: Request, content_type: str, options: ServeOptions
) -> tuple[list[bytes], list[tuple[str, Any]]]:
    if content_type == "multipart/form-data":
        room = options.limits.classes + options.max_images + len(NAMES)
        try:
            async with request.form(max_files=options.max_images, max_fields=room) as form:
                return await _uploads(form), [(key, value) for key, value in form.multi_items() if key != "image"]
        except ValueError as error:  # of the parser: older Starlettes let it through
            raise RequestError(400, "bad_request", f"the form must be whole: {error}") from error
    if content_type.startswith(RAW_TYPES):
        return [await request.body()], []
    wanted = "multipart/form-data, application/json, an image's type or application/octet-stream"
    raise RequestError(415, "bad_content_type", f"Content-Type must be {wanted}, got {content_type[:100]!r}")


async def _uploads(form: FormData) -> list[bytes]:
    parts = form.getlist("image")
    files = [part for part in parts if isinstance(part, UploadFile)]
    if not files or len(files) < len(parts):
        raise RequestError(422, "bad_image", "image must be a file, or several, got " + ("text" if parts else "none"))
    return [await file.read() for file in files]


def _decoded(place: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(422, "bad_image", f"images[{place}] must be a file in base64: {error}") from error


def _checked(kind: type[EmbedBody], fields: list[tuple[str, Any]]) -> EmbedBody:
    """The fields of a form or a URL, as the model of the JSON has them; a number that comes twice counts once."""
    known = [name for name, key in NAMES.items() if key in kind.model_fields]
    values: dict[str, Any] = {"images": [""], "tasks": [], "labels": []}
    for name, value in fields:
        if name not in known or not isinstance(value, str):
            wanted = f"a field must be image (a file) or {', '.join(known)}"
            raise RequestError(422, "bad_field", f"{wanted}, got {name[:50]!r}")
        if name in ("task", "label"):
            values[NAMES[name]].append(value)
        else:
            values[name] = _number(name, value)
    return _validated(kind, values)


WHOLE = re.compile(r"[0-9]{1,20}", re.ASCII)
DECIMAL = re.compile(r"(?=.{1,30}$)([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]{1,3})?", re.ASCII)


def _number(name: str, text: str) -> int | float:
    """A number as people and programs write it, in ASCII."""
    is_whole = name == "topk"
    if (WHOLE if is_whole else DECIMAL).fullmatch(text):
        value = int(text) if is_whole else float(text)
        if (1 <= value <= MAX_TOPK) if is_whole else value <= 1:
            return value
    wanted = "a whole number of at least 1" if is_whole else "a number from 0 to 1"
    raise RequestError(422, f"bad_{name}", f"{name} must be {wanted}, got {text[:50]!r}")


async def _tasks(
    names: list[str], labels: list[str], images: int, registry: TaskRegistry
) -> list[tuple[str | None, AdaptedTask]]:
    """Each image's task, as it is at this moment, with its name."""
    if bool(names) == bool(labels):
        came = "both" if names else "neither"
        raise RequestError(422, "bad_task", f"the request must name a task or give its class names, got {came}")
    if labels:
        return [(None, await registry.ad_hoc(labels))] * images
    if len(names) not in (1, images):
        raise RequestError(422, "bad_task", f"task must be given once, or once for each of {images} images")
    return [(name, registry.get(name)) for name in (names * images if len(names) == 1 else names)]
