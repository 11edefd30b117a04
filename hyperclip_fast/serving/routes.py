"""The server's routes."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from torch import Tensor

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.openapi import asks_of_images, errors, reads
from hyperclip_fast.serving.questions import Question, read_json, read_question
from hyperclip_fast.serving.schemas import (
    Classifications,
    ClassifyBody,
    EmbedBody,
    Embeddings,
    Health,
    Readiness,
    Task,
    TaskBody,
    Tasks,
)
from hyperclip_fast.serving.service import Service
from hyperclip_fast.tasks import AdaptedTask

STATIC = Path(__file__).with_name("static")
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
router = APIRouter(generate_unique_id_function=lambda route: route.name)  # what generated clients call them


async def _service(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


@router.post(
    "/v1/classify",
    response_model=Classifications,
    responses=errors(400, 404, 408, 413, 415, 422, 503),
    openapi_extra=asks_of_images(ClassifyBody),
)
async def classify(request: Request, service: Served) -> Response:
    """Classify one image or several, each against the class names of its task."""
    question = await read_question(request, service.options, service.registry, ClassifyBody)

    async def answer(image: Tensor, task: AdaptedTask) -> dict[str, Any]:
        ranked = await service.classifier.answer(image, task, question.topk)
        kept = [each for each in ranked if each[2] >= question.threshold]
        return {"ranked": [{"name": name, "probability": share, "score": score} for name, share, score in kept]}

    return await _answers(question, service, answer)


@router.post(
    "/v1/embed",
    response_model=Embeddings,
    responses=errors(400, 404, 408, 413, 415, 422, 503),
    openapi_extra=asks_of_images(EmbedBody),
)
async def embed(request: Request, service: Served) -> Response:
    """Embed one image or several, each by the row of its task."""
    question = await read_question(request, service.options, service.registry, EmbedBody)

    async def answer(image: Tensor, task: AdaptedTask) -> dict[str, Any]:
        return {"embedding": await service.embedder.answer(image, task, 0)}

    return await _answers(question, service, answer)


async def _answers(
    question: Question, service: Service, answer: Callable[[Tensor, AdaptedTask], Awaitable[dict[str, Any]]]
) -> Response:
    """Each image's answer; of several images a bad one has its error in its place, a single one is refused."""

    async def one(content: bytes, name: str | None, task: AdaptedTask) -> dict[str, Any]:
        try:
            image = await service.decode(content)
        except RequestError as error:
            if len(question.images) == 1:
                raise
            return {"task": name, "error": error.content}
        return {"task": name, **await answer(image, task)}

    parts = zip(question.images, question.tasks)
    return JSONResponse({"results": await asyncio.gather(*(one(content, *task) for content, task in parts))})


@router.get("/v1/tasks", response_model=Tasks)
async def list_tasks(service: Served) -> Response:
    """Every named task with its class names."""
    registry = service.registry
    return JSONResponse({"tasks": [{"name": name, "classes": registry.get(name).classes} for name in registry]})


@router.get("/v1/tasks/{name:path}", responses=errors(404))
async def get_task(name: str, service: Served) -> Task:
    """One task."""
    return Task(name=name, classes=list(service.registry.get(name).classes))


@router.put(
    "/v1/tasks/{name:path}",
    status_code=201,
    responses={200: {"model": Task, "description": "Replaced"}, **errors(400, 409, 413, 415, 422, 503)},
    openapi_extra=reads(TaskBody),
)
async def put_task(name: str, request: Request, service: Served, response: Response) -> Task:
    """Add a task, or replace it; from the answer on it serves and is on the disk."""
    body = await read_json(request, TaskBody)
    is_new = await service.registry.put(name, body.classes)
    response.status_code = 201 if is_new else 200
    return Task(name=name, classes=body.classes)


@router.delete("/v1/tasks/{name:path}", status_code=204, responses=errors(404, 503))
async def delete_task(name: str, service: Served) -> None:
    """Remove a task; requests that were accepted before are still answered."""
    await service.registry.remove(name)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process lives."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=errors(503))
async def readyz(service: Served) -> Readiness:
    """Whether it takes requests: not before the model is there, nor while it shuts down."""
    if not service.ready:
        raise RequestError(503, "not_ready", "the server starts or shuts down", {"Retry-After": "1"})
    saves = "failing" if service.registry.saves_fail else "ok"
    return Readiness(status="ready", tasks=len(service.registry), saves=saves)


@router.get("/metrics", include_in_schema=False)
async def metrics(service: Served) -> Response:
    """Prometheus metrics."""
    return Response(generate_latest(service.metrics.collection), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page for people."""
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    """/openapi.json for people."""
    return FileResponse(STATIC / "docs.html", headers=PAGE_HEADERS)
