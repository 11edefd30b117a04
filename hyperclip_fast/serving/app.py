"""The HTTP server: routes over a Service, which holds the tasks, the batcher and what decodes images.

    body -> limits -> task (taken here, kept whatever happens to it) -> decoding threads -> batcher -> model

Everything but decoding and the model runs on the event loop.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import FormData, UploadFile
from starlette.middleware.cors import CORSMiddleware
from torch import Tensor

from hyperclip_fast.data.image_files import image_transform, open_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.serving.bank_file import BankFile
from hyperclip_fast.serving.batching import Batcher, Classify, ModelThread, Ranked
from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.gate.bodies import Admitted
from hyperclip_fast.serving.gate.hosts import KnownHosts, OwnPages, PlainPaths
from hyperclip_fast.serving.gate.keys import Keys
from hyperclip_fast.serving.http_errors import add_error_handlers
from hyperclip_fast.serving.metrics import Metrics, Observed
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.task_registry import TaskRegistry
from hyperclip_fast.tasks import AdaptedTask

PAGE = Path(__file__).with_name("static") / "index.html"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
RAW_TYPES = ("application/octet-stream", "image/")
FIELDS = ("task", "label", "topk")


class Service:
    """What the routes work with.

    Args:
        preprocessing: the model's.
        make: makes a task of class names, see TaskRegistry.
        classify: runs a batch, see Batcher.
        bank: keeps the named tasks; None: nothing does.
        options: see ServeOptions.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        make: Callable[..., Awaitable[AdaptedTask]],
        classify: Classify,
        bank: BankFile | None = None,
        options: ServeOptions | None = None,
    ):
        self.options = options or ServeOptions()
        self.metrics, self.ready = Metrics(), False
        self._bank = bank
        self.registry = TaskRegistry(make, self.options.limits, bank.write if bank else None)
        if bank is not None:
            self.registry.fill(bank.read())
        self.batcher = Batcher(
            classify,
            self.options.max_batch,
            self.options.max_wait,
            self.options.mix,
            self.options.max_concurrent_batches,
            self.metrics.batch,
        )
        self._transform = image_transform(preprocessing)
        self._decoders = ThreadPoolExecutor(self.options.decoders, "decode")
        self.metrics.tasks.set_function(lambda: len(self.registry))
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.metrics.failed_saves.set_function(lambda: self.registry.failed_saves)
        self.metrics.saves_fail.set_function(lambda: self.registry.saves_fail)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches; at the end, answer what was accepted and let another server have the bank."""
        self.batcher.start()
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            await self.batcher.close()
            self._decoders.shutdown()
            await self.registry.close()
            if self._bank is not None:
                self._bank.close()

    async def decode(self, content: bytes) -> Tensor:
        """An image (3, S, S) from a file's content, in a thread.

        Raises:
            RequestError: 422, if it is no image, is damaged or has too many pixels.
        """
        return await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, content)

    def _decode(self, content: bytes) -> Tensor:
        try:
            return self._transform(open_image(content, max_pixels=self.options.max_pixels))
        except ValueError as error:
            raise RequestError(422, "bad_image", str(error)) from error


def bank_service(
    path: Path,
    runner: ModelThread,
    options: ServeOptions | None = None,
    classify: Classify | None = None,
    create: bool = False,
) -> Service:
    """A service of the tasks in a file, warm; it has the file to itself.

    Args:
        path: the file.
        runner: makes the tasks.
        options: see ServeOptions.
        classify: runs the batches; None: the runner.
        create: make an empty file where there is none.

    Raises:
        ValueError: if the file does not exist, is no bank of the runner's model, or another server has it.
    """
    bank = BankFile(path, runner.model, create)
    service = Service(runner.model.preprocessing, runner.make, classify or runner.classify, bank, options)
    runner.warm_up()
    return service


class TaskBody(BaseModel):
    """The body of PUT /v1/tasks/{name}."""

    model_config = ConfigDict(extra="forbid", strict=True)
    classes: list[str]


@dataclass
class Question:
    """What a request to classify asks: images' contents, each image's task with its name, and how many classes."""

    images: list[bytes]
    tasks: list[tuple[str | None, AdaptedTask]]
    topk: int


router = APIRouter()


async def _service(request: Request) -> Service:
    return request.app.state.service


Served = Annotated[Service, Depends(_service)]


@router.post("/v1/classify")
async def classify(request: Request, service: Served) -> dict:
    """Classify one image or several: multipart/form-data with image, or an image file as the body."""
    question = await _question(request, service)
    images = await asyncio.gather(*(service.decode(content) for content in question.images))
    answers = await asyncio.gather(
        *(service.batcher.classify(image, task, question.topk) for image, (_, task) in zip(images, question.tasks))
    )
    return {"results": [_result(name, ranked) for (name, _), ranked in zip(question.tasks, answers)]}


@router.get("/v1/tasks")
async def list_tasks(service: Served) -> dict:
    """Every named task with its class names."""
    registry = service.registry
    return {"tasks": [{"name": name, "classes": registry.get(name).classes} for name in registry]}


@router.get("/v1/tasks/{name:path}")
async def get_task(name: str, service: Served) -> dict:
    """One task."""
    return {"name": name, "classes": service.registry.get(name).classes}


@router.put("/v1/tasks/{name:path}")
async def put_task(name: str, body: TaskBody, service: Served, response: Response) -> dict:
    """Add a task, or replace it; it serves from the answer on."""
    is_new = await service.registry.put(name, body.classes)
    response.status_code = 201 if is_new else 200
    return {"name": name, "classes": body.classes}


@router.delete("/v1/tasks/{name:path}", status_code=204)
async def delete_task(name: str, service: Served) -> None:
    """Remove a task; requests that were accepted before are still answered."""
    await service.registry.remove(name)


@router.api_route("/healthz", methods=["GET", "HEAD"])
async def healthz() -> dict:
    """Whether the process lives."""
    return {"status": "ok"}


@router.api_route("/readyz", methods=["GET", "HEAD"])
async def readyz(service: Served) -> dict:
    """Whether it takes requests: not before the model is there, nor while it shuts down."""
    if not service.ready:
        raise RequestError(503, "not_ready", "the server starts or shuts down", {"Retry-After": "1"})
    saves = "failing" if service.registry.saves_fail else "ok"
    return {"status": "ready", "tasks": len(service.registry), "saves": saves}


@router.get("/metrics", include_in_schema=False)
async def metrics(service: Served) -> Response:
    """Prometheus metrics."""
    return Response(generate_latest(service.metrics.collection), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page for people."""
    return FileResponse(PAGE, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})


def create_app(service: Service) -> FastAPI:
    """The app of a service; it runs the service from its startup to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="hyperclip_fast", docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    add_error_handlers(app)
    options = service.options
    app.add_middleware(Admitted, metrics=service.metrics, limits=options.bodies)
    app.add_middleware(Keys, keys=options.keys, rate=options.rate)
    app.add_middleware(OwnPages, origins=options.origins)
    if options.origins:
        headers, methods = ("Authorization", "Content-Type"), ("GET", "POST", "PUT", "DELETE")
        app.add_middleware(CORSMiddleware, allow_origins=options.origins, allow_headers=headers, allow_methods=methods)
    app.add_middleware(PlainPaths)
    app.add_middleware(KnownHosts, hosts=options.hosts)
    app.add_middleware(Observed, metrics=service.metrics, logs=options.access_log)
    return app


async def _question(request: Request, service: Service) -> Question:
    """What a request asks, checked."""
    options = service.options
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        room = options.limits.classes + options.max_images + len(FIELDS)
        async with request.form(max_files=options.max_images, max_fields=room) as form:
            images = await _uploads(form)
            fields = [(key, value) for key, value in form.multi_items() if key != "image"]
    elif kind.startswith(RAW_TYPES):
        images, fields = [await request.body()], []
    else:
        wanted = "multipart/form-data, an image's type or application/octet-stream"
        raise RequestError(415, "bad_content_type", f"Content-Type must be {wanted}, got {kind!r}")
    values: dict[str, list[str]] = {name: [] for name in FIELDS}
    for key, value in [*request.query_params.multi_items(), *fields]:
        if key not in values or not isinstance(value, str):
            raise RequestError(422, "bad_field", f"a field must be image (a file) or {', '.join(FIELDS)}, got {key!r}")
        values[key].append(value)
    topk = _topk(values["topk"])
    return Question(images, await _tasks(values["task"], values["label"], len(images), service.registry), topk)


async def _uploads(form: FormData) -> list[bytes]:
    parts = form.getlist("image")
    files = [part for part in parts if isinstance(part, UploadFile)]
    if not files or len(files) < len(parts):
        raise RequestError(422, "bad_image", "image must be a file, or several, got " + ("text" if parts else "none"))
    return [await file.read() for file in files]


async def _tasks(
    names: list[str], labels: list[str], images: int, registry: TaskRegistry
) -> list[tuple[str | None, AdaptedTask]]:
    """Each image's task, as it is at this moment, with its name."""
    if bool(names) == bool(labels):
        came = "both" if names else "neither"
        raise RequestError(
            422, "bad_task", f"the request must name a task or give its class names as label, got {came}"
        )
    if labels:
        return [(None, await registry.ad_hoc(labels))] * images
    if len(names) not in (1, images):
        raise RequestError(422, "bad_task", f"task must be given once, or once for each of {images} images")
    return [(name, registry.get(name)) for name in (names * images if len(names) == 1 else names)]


def _topk(values: list[str]) -> int:
    text = values[-1] if values else "5"
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise RequestError(422, "bad_topk", f"topk must be a whole number of at least 1, got {text[:50]!r}")
    return int(text)


def _result(name: str | None, ranked: Ranked) -> dict:
    return {"task": name, "ranked": [{"name": label, "probability": share} for label, share in ranked]}
