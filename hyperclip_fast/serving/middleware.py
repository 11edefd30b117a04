"""What stands before the routes: names and paths that are answered, how many requests, how large and slow a body.

A request that may carry a body counts before its body is read, so that their number bounds the memory that uploads
take. The body is counted as it comes: a Content-Length is only believed where it already says too much.
"""

import asyncio
import re
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperclip_fast.serving.http_errors import BodyError, error_response
from hyperclip_fast.serving.metrics import Metrics
from hyperclip_fast.utils.class_names import UNPRINTABLE

BODY_METHODS = ("POST", "PUT", "PATCH")


class KnownHosts:
    """Refuses requests to other names than its own: a page elsewhere may point a name of its own at this machine.

    Args:
        app: what comes behind.
        hosts: names and addresses that clients may call the server by, without a port; "*": any.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]):
        self.app, self.hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self.hosts:
            host = Headers(scope=scope).get("host", "")
            if re.sub(r":\d*$", "", host).lower() not in self.hosts:
                message = f"Host must be a name that this server was told to answer to, got {host[:100]!r}"
                await error_response(400, "unknown_host", message)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class PlainPaths:
    """Refuses paths with control characters: a route's pattern would take "pets" and a line's end for "pets"."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and UNPRINTABLE.search(scope["path"]):
            message = f"the path must be of printable characters, got {scope['path'][:100]!r}"
            await error_response(404, "not_found", message)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Limited:
    """Refuses requests beyond a number, and bodies that are too large or too slow.

    Args:
        app: what comes behind.
        metrics: where the requests under way are shown.
        max_concurrent_requests: requests with a body that may be under way at a time.
        max_bytes: of a body.
        max_seconds: until a body has arrived.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, max_concurrent_requests: int, max_bytes: int, max_seconds: float
    ):
        self.app, self.metrics = app, metrics
        self.max_concurrent_requests = max_concurrent_requests
        self.max_bytes, self.max_seconds = max_bytes, max_seconds
        self.taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self.app(scope, receive, send)
            return
        if self.taken >= self.max_concurrent_requests:
            most = self.max_concurrent_requests
            message = f"{most} requests are under way, which is all that are taken at a time: try again"
            await error_response(503, "busy", message, {"Retry-After": "1"})(scope, receive, send)
            return
        self.taken += 1
        self.metrics.pending.inc()
        try:
            await self.app(scope, _Body(scope, receive, self.max_bytes, self.max_seconds), send)
        finally:
            self.taken -= 1
            self.metrics.pending.dec()


class _Body:
    """A request's `receive` that raises BodyError, 413 or 408, once the body is over a limit."""

    def __init__(self, scope: Scope, receive: Receive, max_bytes: int, max_seconds: float):
        self.receive, self.max_bytes, self.seconds = receive, max_bytes, max_seconds
        self.deadline = asyncio.get_running_loop().time() + max_seconds
        self.read, self.announced, self.whole = 0, 0, False
        with suppress(ValueError):
            self.announced = int(Headers(scope=scope).get("content-length", "0"))

    async def __call__(self) -> Message:
        if self.whole:  # what comes now is only the news that the client has gone
            return await self.receive()
        if self.announced > self.max_bytes:
            raise self._too_large()
        try:
            left = self.deadline - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(self.receive(), left)
        except asyncio.TimeoutError as error:
            text = f"the body must arrive within {self.seconds:g} seconds, {self.read} bytes had come"
            raise BodyError(408, "too_slow", text, {"Connection": "close"}) from error
        self.read += len(message.get("body", b""))
        if self.read > self.max_bytes:
            raise self._too_large()
        self.whole = not message.get("more_body", False)
        return message

    def _too_large(self) -> BodyError:
        came = f"at least {max(self.read, self.announced)}"
        return BodyError(413, "too_large", f"the body must be of at most {self.max_bytes} bytes, it has {came}")
