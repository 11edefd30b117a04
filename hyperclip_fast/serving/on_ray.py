"""The same server on a Ray cluster: one ingress with routes, tasks and batches; model replicas, as many as are wanted.

    serve run hyperclip_fast.serving.on_ray:build_app bank=/data/tasks.safetensors replicas=4 device=cuda gpus=1

A batch brings its tasks along, so model replicas know no tasks and need not agree on any: the ingress alone has them,
and adds and saves them as the server on one machine does.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from hyperclip_fast.hyperclip import load_model
from hyperclip_fast.serving.app import create_app
from hyperclip_fast.serving.batching import ModelThread
from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.gate.keys import read_keys
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.service import bank_service
from hyperclip_fast.tasks import AdaptedTask, Ranked


class RayOptions(BaseModel):
    """What `serve run` takes as key=value.

    Args:
        bank: file of the tasks, as an absolute path where the ingress can read and write it.
        create: make the file where there is none.
        model: a trained model's folder on every node, or a hub id; None: the demo model.
        device: of the model replicas.
        replicas: of the model.
        cpus: of each model replica.
        gpus: of each model replica, or a part of one.
        max_batch: images in a forward pass, at most.
        max_wait_ms: that an image waits for company.
        max_concurrent_requests: requests under way at a time; one more is answered 503.
        api_key_file: keys of those who may ask, see gate/keys.py; where the ingress can read it.
    """

    model_config = ConfigDict(extra="forbid")
    bank: Path
    create: bool = False
    model: str | None = None
    device: str = "cpu"
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    max_batch: int = Field(32, ge=1)
    max_wait_ms: float = Field(2.0, ge=0)
    max_concurrent_requests: int = Field(256, ge=1)
    api_key_file: Path | None = None

    @field_validator("bank")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        if not path.is_absolute():  # the ingress runs in a folder of Ray's choosing
            raise ValueError(f"bank must be an absolute path, got {path}")
        return path


@serve.deployment(max_ongoing_requests=2)  # one runs, the next is there already
class ModelReplica:
    """Runs batches.

    Args:
        model: as in RayOptions.
        device: where it runs.
    """

    def __init__(self, model: str | None, device: str):
        self.thread = ModelThread(load_model(model, device))

    async def classify(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[Ranked]:
        """Classes of a batch."""
        return await self.thread.classify(images, tasks, topk)

    async def embed(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[list[float]]:
        """Embeddings of a batch."""
        return await self.thread.embed(images, tasks, topk)


class Replicas:
    """Passes batches on to the replicas, as Batches.

    Args:
        handle: Ray's, of the replicas.
    """

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle

    async def classify(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[Ranked]:
        """Classes of a batch."""
        return await self.handle.classify.remote(images, tasks, topk)

    async def embed(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[list[float]]:
        """Embeddings of a batch."""
        return await self.handle.embed.remote(images, tasks, topk)


@serve.deployment(num_replicas=1)
@serve.ingress()
class Ingress:
    """The routes of routes.py; its batches run on the model replicas.

    Args:
        replicas: the model replicas.
        options: see RayOptions.
    """

    def __init__(self, replicas: DeploymentHandle, options: RayOptions):
        serve_options = ServeOptions(
            max_batch=options.max_batch,
            max_wait=options.max_wait_ms / 1000,
            max_concurrent_batches=options.replicas,
            bodies=BodyLimits(options.max_concurrent_requests),
            keys=read_keys(options.api_key_file) if options.api_key_file else (),
        )
        runner = ModelThread(load_model(options.model))
        self.service = bank_service(options.bank, runner, serve_options, Replicas(replicas), options.create)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)


def build_app(args: RayOptions) -> Application:
    """The application for `serve run`, `serve build` or `ray.serve.run`."""
    resources = {"num_cpus": args.cpus, "num_gpus": args.gpus}
    replica: Any = ModelReplica  # a Deployment, by the decorator
    replicas = replica.options(num_replicas=args.replicas, ray_actor_options=resources)
    most = 2 * args.max_concurrent_requests  # more than the server takes: its health is always answered
    web: Any = Ingress
    ingress = web.options(max_ongoing_requests=most)
    return ingress.bind(replicas.bind(args.model, args.device), args)
