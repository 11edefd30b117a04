"""Bodies and places: a request is let in once its body has arrived, and while there is a place for its kind.

A body is counted as it comes: a Content-Length is only believed where it already says too much. While it comes it holds
no place, so that clients who send slowly keep nobody out; a deadline, a least rate and a bound on the bytes of all
bodies together end them. Changes of tasks have places of their own, so that any number of questions leaves them some.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.http_errors import error_response
from hyperclip_fast.serving.metrics import Metrics

GRACE = 5.0  # seconds before a body's rate counts
CHANGES = "/v1/tasks"


@dataclass(frozen=True)
class BodyLimits:
    """What a server lets in.

    Args:
        max_concurrent_requests: requests with a body under way, changes of tasks not counted.
        max_concurrent_changes: changes of tasks under way.
        max_bytes: of a body.
        max_total_bytes: of the bodies of all requests that are arriving or under way.
        max_seconds: until a body has arrived.
        min_rate: bytes a second that must arrive on average, after the first few seconds.
    """

    max_concurrent_requests: int = 256
    max_concurrent_changes: int = 32
    max_bytes: int = 8 << 20
    max_total_bytes: int = 512 << 20
    max_seconds: float = 30.0
    min_rate: float = 1024.0


class Admitted:
    """Reads bodies, gives places, and stops the work for clients that have gone.

    Args:
        app: what comes behind.
        metrics: where the requests under way are shown.
        limits: see BodyLimits.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: BodyLimits):
        self.app, self.metrics, self.limits = app, metrics, limits
        self.bytes = 0
        self._places = {
            False: _Places(limits.max_concurrent_requests, "requests", metrics),
            True: _Places(limits.max_concurrent_changes, "changes of tasks", metrics),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        places = self._places[scope["path"].startswith(CHANGES)]
        body = _Body(scope, self)
        try:
            places.check()  # before the body comes, too, and spare the client the upload
            if await body.arrive(receive):
                with places.taken():
                    await self._while_connected(scope, body, receive, send)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        finally:
            body.forget()

    async def _while_connected(self, scope: Scope, body: "_Body", receive: Receive, send: Send) -> None:
        """Run the app until it has answered, or its client has gone."""
        is_answered = False

        async def noting(message: Message) -> None:
            nonlocal is_answered
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        work = asyncio.ensure_future(self.app(scope, body.receive, noting))
        news = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, news}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not is_answered:
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            news.cancel()
            work.cancel()


async def _gone(receive: Receive) -> None:
    """Wait for what comes behind a body: the news that the client has gone, or has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Places:
    """So many requests of a kind at a time."""

    def __init__(self, most: int, kind: str, metrics: Metrics):
        self.most, self.kind, self.metrics, self.used = most, kind, metrics, 0

    def check(self) -> None:
        if self.used >= self.most:
            message = f"{self.most} {self.kind} are under way, which is all that are taken at a time: try again"
            raise RequestError(503, "busy", message, {"Retry-After": "1"})

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        self.check()
        self.used += 1
        self.metrics.pending.inc()
        try:
            yield
        finally:
            self.used -= 1
            self.metrics.pending.dec()


class _Body:
    """A request's body, as it arrives and as the app reads it."""

    def __init__(self, scope: Scope, gate: Admitted):
        self.gate, self.limits, self.read = gate, gate.limits, 0
        self.parts: deque[bytes] = deque()
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self.announced = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
        self.encoding = headers.get("content-encoding", "identity").strip().lower()

    async def arrive(self, receive: Receive) -> bool:
        """Whether it has come whole, and not gone away before.

        Raises:
            RequestError: 413, 408, 415 or 503, for a body that is too large, too slow, packed, or one too many.
        """
        if self.encoding != "identity":
            text = f"the body must come as it is, without Content-Encoding, got {self.encoding[:50]!r}"
            raise RequestError(415, "bad_encoding", text)
        if self.announced > self.limits.max_bytes:
            raise self._too_large()
        begin = asyncio.get_running_loop().time()
        while True:
            message = await self._next(receive, begin)
            if message["type"] == "http.disconnect":
                return False
            self._keep(message.get("body", b""))
            if not message.get("more_body", False):
                return True

    async def _next(self, receive: Receive, begin: float) -> Message:
        seconds = min(self.limits.max_seconds, GRACE + self.read / self.limits.min_rate)
        try:
            return await asyncio.wait_for(receive(), begin + seconds - asyncio.get_running_loop().time())
        except asyncio.TimeoutError as error:
            text = f"the body must arrive within {self.limits.max_seconds:g} seconds and at {self.limits.min_rate:g} "
            text += f"bytes a second, {self.read} bytes had come after {seconds:.3g} seconds"
            raise RequestError(408, "too_slow", text, {"Connection": "close"}) from error

    def _keep(self, part: bytes) -> None:
        self.read += len(part)
        self.gate.bytes += len(part)
        self.parts.append(part)
        if self.read > self.limits.max_bytes:
            raise self._too_large()
        if self.gate.bytes > self.limits.max_total_bytes:
            message = f"the bodies of all requests hold {self.limits.max_total_bytes} bytes, which is all: try again"
            raise RequestError(503, "busy", message, {"Retry-After": "1"})

    def _too_large(self) -> RequestError:
        came = f"at least {max(self.read, self.announced)}"
        return RequestError(
            413, "too_large", f"the body must be of at most {self.limits.max_bytes} bytes, it has {came}"
        )

    async def receive(self) -> Message:
        """What the app receives: the parts, and then nothing until it is stopped."""
        if self.parts:
            part = self.parts.popleft()
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")

    def forget(self) -> None:
        """Give back its bytes."""
        self.parts.clear()
        self.gate.bytes -= self.read
        self.read = 0
