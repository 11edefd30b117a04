"""The HTTP server: routes over a Service, behind a gate.

    connection -> host, origin, key -> body -> place -> task (taken here, kept whatever happens to it)
               -> decoding threads -> batcher -> model

Everything but decoding, saving and the model runs on the event loop.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from hyperclip_fast.serving.gate.bodies import Admitted
from hyperclip_fast.serving.gate.hosts import KnownHosts, OwnPages, PlainPaths
from hyperclip_fast.serving.gate.keys import Keys
from hyperclip_fast.serving.http_errors import add_error_handlers
from hyperclip_fast.serving.metrics import Observed
from hyperclip_fast.serving.openapi import describe
from hyperclip_fast.serving.routes import router
from hyperclip_fast.serving.service import Service
from hyperclip_fast.version import __version__


def create_app(service: Service) -> FastAPI:
    """The app of a service; it runs the service from its startup to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    off: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="hyperclip_fast", version=__version__, lifespan=lifespan, **off)
    app.state.service = service
    app.include_router(router)
    describe(app)
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
