"""A client of the server, for threads and for asyncio, that comes again where the server is busy; extra: client.

It knows nothing of models, and imports neither PyTorch nor what the server needs.
"""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hyperclip_fast.utils.extras import require

AGAIN = (429, 503)  # too many requests of a key; busy, not ready, or not saved: nothing was done
MOST_SECONDS = 30.0  # of a pause
Image = str | Path | bytes


class ServerError(Exception):
    """What the server answers in place of a result.

    Args:
        status: HTTP's.
        code: a word for programs.
        message: a sentence for people.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    def __str__(self) -> str:
        return f"{self.message} ({self.status} {self.code})"


@dataclass(frozen=True)
class Classes:
    """An image's classes, best first.

    Args:
        task: its task; None where class names were given.
        names: class names; none where no score reaches the threshold.
        probabilities: softmax among all class names of the task.
        scores: how well each name fits by itself, 0 to 1.
    """

    task: str | None
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    scores: tuple[float, ...]


class _Shared:
    """What both clients say and understand."""

    def __init__(self, address: str, key: str | None, retries: int, http: Any):
        if retries < 0:
            raise ValueError(f"retries must not be negative, got {retries}")
        self._retries = retries
        self._http: Any = http(base_url=address, headers={"Authorization": f"Bearer {key}"} if key else {})

    def _pause(self, attempt: int, answer: Any) -> float | None:
        """Seconds until the next try; None where there is none. Who failed together does not come again together."""
        if attempt >= self._retries or (answer is not None and answer.status_code not in AGAIN):
            return None
        told = answer.headers.get("Retry-After", "") if answer is not None else ""
        least = float(told) if told.isascii() and told.isdigit() else 0.0
        return min(MOST_SECONDS, least + random.uniform(0.5, 1.0) * 0.2 * 2**attempt)


def _question(
    images: Iterable[Image], tasks: str | Sequence[str] | None, labels: Sequence[str] | None, **numbers: float
) -> dict[str, Any]:
    if (tasks is None) == (labels is None):
        raise ValueError(f"either tasks or labels must be given, got {tasks!r} and {labels!r}")
    files = [("image", image if isinstance(image, bytes) else Path(image).read_bytes()) for image in images]
    if not files:
        raise ValueError("images must hold at least one image, got none")
    fields: dict[str, Any] = {
        "task": [tasks] if isinstance(tasks, str) else list(tasks or ()),
        "label": list(labels or ()),
    }
    return {"files": files, "data": {**fields, **{name: f"{value}" for name, value in numbers.items()}}}


def _task(name: str) -> str:
    return f"/v1/tasks/{quote(name, safe='')}"


def _content(answer: Any) -> Any:
    """An answer's JSON; None for an answer without.

    Raises:
        ServerError: for an error.
    """
    if answer.status_code >= 400:
        try:
            raise _error(answer.json()["error"])
        except (ValueError, KeyError, TypeError):  # not our server's: a proxy's
            raise ServerError(answer.status_code, "unknown", answer.text[:200]) from None
    return answer.json() if answer.content else None


def _error(problem: dict[str, Any]) -> ServerError:
    return ServerError(problem["status"], problem["code"], problem["message"])


def _classes(content: Any) -> list[Classes | ServerError]:
    return [
        _error(result["error"])
        if "error" in result
        else Classes(
            result["task"],
            *(tuple(each[key] for each in result["ranked"]) for key in ("name", "probability", "score")),
        )
        for result in content["results"]
    ]


def _embeddings(content: Any) -> list[list[float] | ServerError]:
    return [_error(result["error"]) if "error" in result else result["embedding"] for result in content["results"]]


class Client(_Shared):
    """A client; threads may share it.

    Args:
        address: the server's, as "http://127.0.0.1:8000".
        key: an API key, where the server asks for one.
        retries: how often to come again where the server is busy (503), asks for a pause (429) or cannot be reached.
        timeout: seconds to wait for an answer.
        verify: whether to check an HTTPS server's certificate, or an ssl.SSLContext that does.
    """

    def __init__(
        self, address: str, key: str | None = None, retries: int = 5, timeout: float = 60.0, verify: Any = True
    ):
        httpx = require("httpx", "client")
        super().__init__(address, key, retries, partial(httpx.Client, timeout=timeout, verify=verify))
        self._lost = httpx.ConnectError

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def classify(
        self,
        images: Iterable[Image],
        tasks: str | Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        topk: int = 5,
        threshold: float = 0.0,
    ) -> list[Classes | ServerError]:
        """Classify images.

        Args:
            images: paths of image files, or their content.
            tasks: the task of all, or each one's.
            labels: class names, in place of tasks.
            topk: classes of each image, at most.
            threshold: leave out classes with a lower score.

        Returns:
            An answer for each image; of several images, a ServerError for one that could not be read.

        Raises:
            ServerError: if the server refuses the request.
        """
        question = _question(images, tasks, labels, topk=topk, threshold=threshold)
        return _classes(self._send("POST", "/v1/classify", **question))

    def embed(
        self,
        images: Iterable[Image],
        tasks: str | Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[list[float] | ServerError]:
        """Embed images, each by its task's row; arguments and errors as `classify`."""
        return _embeddings(self._send("POST", "/v1/embed", **_question(images, tasks, labels)))

    def tasks(self) -> dict[str, list[str]]:
        """Class names of all tasks, by name."""
        return {task["name"]: task["classes"] for task in self._send("GET", "/v1/tasks")["tasks"]}

    def put(self, name: str, classes: Sequence[str]) -> None:
        """Add a task, or replace the one of that name.

        Raises:
            ServerError: if the server refuses it.
        """
        self._send("PUT", _task(name), json={"classes": list(classes)})

    def remove(self, name: str) -> None:
        """Remove a task.

        Raises:
            ServerError: for an unknown name, among others.
        """
        self._send("DELETE", _task(name))

    def _send(self, method: str, path: str, **content: Any) -> Any:
        for attempt in range(self._retries + 1):
            answer = None
            try:
                answer = self._http.request(method, path, **content)
            except self._lost:
                if attempt == self._retries:
                    raise
            if (pause := self._pause(attempt, answer)) is None:
                break
            time.sleep(pause)
        return _content(answer)


class AsyncClient(_Shared):
    """The same client for asyncio; arguments, methods and errors as Client's."""

    def __init__(
        self, address: str, key: str | None = None, retries: int = 5, timeout: float = 60.0, verify: Any = True
    ):
        httpx = require("httpx", "client")
        super().__init__(
            address, key, retries, lambda **more: httpx.AsyncClient(timeout=timeout, verify=verify, **more)
        )
        self._lost = httpx.ConnectError

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def classify(
        self,
        images: Iterable[Image],
        tasks: str | Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        topk: int = 5,
        threshold: float = 0.0,
    ) -> list[Classes | ServerError]:
        """Classify images, as `Client.classify`."""
        question = _question(images, tasks, labels, topk=topk, threshold=threshold)
        return _classes(await self._send("POST", "/v1/classify", **question))

    async def embed(
        self,
        images: Iterable[Image],
        tasks: str | Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> list[list[float] | ServerError]:
        """Embed images, as `Client.embed`."""
        return _embeddings(await self._send("POST", "/v1/embed", **_question(images, tasks, labels)))

    async def tasks(self) -> dict[str, list[str]]:
        """Class names of all tasks, by name."""
        return {task["name"]: task["classes"] for task in (await self._send("GET", "/v1/tasks"))["tasks"]}

    async def put(self, name: str, classes: Sequence[str]) -> None:
        """Add a task, or replace the one of that name, as `Client.put`."""
        await self._send("PUT", _task(name), json={"classes": list(classes)})

    async def remove(self, name: str) -> None:
        """Remove a task, as `Client.remove`."""
        await self._send("DELETE", _task(name))

    async def _send(self, method: str, path: str, **content: Any) -> Any:
        for attempt in range(self._retries + 1):
            answer = None
            try:
                answer = await self._http.request(method, path, **content)
            except self._lost:
                if attempt == self._retries:
                    raise
            if (pause := self._pause(attempt, answer)) is None:
                break
            await asyncio.sleep(pause)
        return _content(answer)
