"""What the server counts, times and logs."""

import logging
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

access_log = logging.getLogger("hyperclip_fast.access")
GONE = 499  # the client had gone before its answer began


class Metrics:
    """Prometheus metrics of one server, in a collection of their own."""

    def __init__(self):
        self.collection = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.collection, "namespace": "hyperclip"}
        labels = ("method", "route", "status")
        self.requests = Counter("requests", "Requests answered; status 499: the client had gone", labels, **made)
        self.seconds = Histogram("request_seconds", "From a request's headers to its answer", ("route",), **made)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.batch_images = Histogram("batch_images", "Images in a forward pass", buckets=sizes, **made)
        self.batch_tasks = Histogram("batch_tasks", "Tasks in a forward pass", buckets=sizes, **made)
        self.pending = Gauge("pending_requests", "Requests that hold a place", **made)
        self.waiting = Gauge("waiting_images", "Images that wait for a forward pass", **made)
        self.tasks = Gauge("tasks", "Named tasks", **made)
        self.saves_fail = Gauge("saves_fail", "Whether the last save of the tasks failed", **made)
        self.failed_saves = Gauge("failed_saves", "Times that the tasks could not be saved", **made)

    def batch(self, images: int, tasks: int) -> None:
        """Count a forward pass."""
        self.batch_images.observe(images)
        self.batch_tasks.observe(tasks)


class Observed:
    """Counts, times and logs every request by the route that answers it.

    Args:
        app: what comes behind.
        metrics: what counts.
        logs: log every request; False: only those whose client had gone.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, logs: bool = False):
        self.app, self.metrics, self.logs = app, metrics, logs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begin = GONE, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except BaseException:
            status = 500 if status == GONE else status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")  # a path that nobody serves would be a label of its own
            seconds = time.perf_counter() - begin
            self.metrics.requests.labels(scope["method"], route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            if self.logs or status == GONE:
                self._log(scope, status, seconds)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        """One line; the path is as it was sent, percent-encoded, so that it cannot look like another line."""
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:500]
        key = scope.get("hyperclip_key", "-")
        access_log.info("%s %s %s %s %d %.1f ms", client, key, scope["method"], path, status, 1000 * seconds)
