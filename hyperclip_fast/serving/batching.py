"""Dynamic micro-batches across tasks: requests that wait at the same time share one forward pass, whatever their tasks.

A request brings its task along as a value (`AdaptedTask`: row, class embeddings, names), taken when the request was
accepted. So a task may be removed or replaced while requests for it wait, and each is answered by the task that it
asked for; and whoever runs the model needs no table of tasks, which makes its copies interchangeable.
"""

import asyncio
import contextlib
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.graphs import GraphedClassifier
from hyperclip_fast.tasks import AdaptedTask, Ranked, adapt_tasks, classify_tasks, embed_tasks

GRAPH_SIZES, GRAPH_SLOTS = (1, 2, 4, 8, 16, 32), 256  # batches that are recorded, and tasks that stay on the GPU
GRAPH_CLASSES = 1024  # of such a task: their embeddings lie in a table of all slots
Answer = TypeVar("Answer")  # of an image
Run = Callable[[list[Tensor], list[AdaptedTask], list[int]], Awaitable[list[Answer]]]


class Batches(Protocol):
    """Runs batches: a ModelThread, or what passes them on to models elsewhere."""

    async def classify(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[Ranked]:
        """Classes of a batch of images (3, S, S), see `classify_tasks`."""
        ...

    async def embed(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[list[float]]:
        """Embeddings of a batch of images (3, S, S), see `embed_tasks`; `topk` is of no use here."""
        ...


class ModelThread:
    """One thread that alone runs the model, for new tasks and for batches, in turn; on a GPU as CUDA graphs.

    Args:
        model: the model, in eval mode.
        threads: what PyTorch may use within an operation; None: as it likes.
    """

    def __init__(self, model: HyperCLIP, threads: int | None = None):
        self.model = model
        self._graphs = GraphedClassifier(model, GRAPH_SIZES, GRAPH_SLOTS) if model.device.type == "cuda" else None
        limit: dict[str, Any] = {}
        if threads is not None:
            limit = {"initializer": torch.set_num_threads, "initargs": (threads,)}
        self._thread = ThreadPoolExecutor(1, "model", **limit)

    async def make(self, classes: Sequence[str]) -> AdaptedTask:
        """A task from class names."""
        made = await asyncio.get_running_loop().run_in_executor(self._thread, adapt_tasks, self.model, [classes])
        return made[0]

    async def classify(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[Ranked]:
        """Classes of a batch of images (3, S, S), see `classify_tasks`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._classify, images, tasks, topk)

    async def embed(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[list[float]]:
        """Embeddings of a batch of images (3, S, S), see `embed_tasks`; on a GPU without graphs."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, images, tasks)

    def _embed(self, images: list[Tensor], tasks: list[AdaptedTask]) -> list[list[float]]:
        return embed_tasks(self.model, torch.stack(images).to(self.model.device), tasks).tolist()

    def _classify(self, images: list[Tensor], tasks: list[AdaptedTask], topk: list[int]) -> list[Ranked]:
        batch = torch.stack(images).to(self.model.device)
        most = max(len(task.classes) for task in tasks)
        if self._graphs is not None and len(set(tasks)) <= GRAPH_SLOTS and most <= GRAPH_CLASSES:
            return self._graphs.classify(batch, tasks, topk)
        return classify_tasks(self.model, batch, tasks, topk)

    def warm_up(self) -> None:
        """Do each thing once, so that the first request does not wait for what is loaded at first use."""
        size = self.model.image_size
        tasks = self._thread.submit(adapt_tasks, self.model, [["thing"]]).result()
        for count in GRAPH_SIZES if self._graphs is not None else (1,):
            batch = [torch.zeros(3, size, size)] * count
            try:
                self._thread.submit(self._classify, batch, tasks * count, [1] * count).result()
            except RuntimeError as error:
                if self._graphs is None:
                    raise
                warnings.warn(f"the model cannot be recorded as CUDA graphs, and runs eagerly: {error}", stacklevel=2)
                self._graphs = None
                self._thread.submit(self._classify, batch, tasks * count, [1] * count).result()

    def close(self) -> None:
        """End the thread once it has done what it was given."""
        self._thread.shutdown()


@dataclass(eq=False)
class _Waiting:
    image: Tensor
    task: AdaptedTask
    topk: int
    since: float
    answer: asyncio.Future


class Batcher(Generic[Answer]):
    """Collects images that wait, and has them answered in batches.

    A batch starts when it is full, or when its oldest image has waited for `max_wait` and the model is free. While the
    model is busy, more gather: batches grow with the load.

    Args:
        run: answers a batch.
        max_batch: images in a batch, at most.
        max_wait: seconds that an image waits for company.
        mix: False keeps a batch to the task of its oldest image: the baseline that mixing is measured against.
        max_concurrent_batches: batches under way at the same time.
        observe: called with each batch's number of images and of tasks.
    """

    def __init__(
        self,
        run: Run[Answer],
        max_batch: int = 32,
        max_wait: float = 0.002,
        mix: bool = True,
        max_concurrent_batches: int = 1,
        observe: Callable[[int, int], None] | None = None,
    ):
        self._answers, self._observe = run, observe
        self._max_batch, self._max_wait, self._mix = max_batch, max_wait, mix
        self._max_concurrent_batches = max_concurrent_batches
        self._waiting: deque[_Waiting] = deque()
        self._unanswered: set[asyncio.Future] = set()
        self._some, self._full, self._forming = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._runners: list[asyncio.Task] = []
        self._closed = False

    @property
    def waiting(self) -> int:
        """Images that no batch has taken yet."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to run batches, in the running event loop."""
        self._runners = [asyncio.create_task(self._run()) for _ in range(self._max_concurrent_batches)]

    async def close(self) -> None:
        """Answer all that was accepted, and take no more."""
        self._closed = True
        if self._unanswered:
            await asyncio.wait(self._unanswered)
        for runner in self._runners:
            runner.cancel()
        await asyncio.gather(*self._runners, return_exceptions=True)

    async def answer(self, image: Tensor, task: AdaptedTask, topk: int) -> Answer:
        """The answer of one image (3, S, S), in a batch with whatever else is waiting.

        Raises:
            RequestError: 503, once the batcher closes.
        """
        if self._closed:
            raise RequestError(503, "stopping", "the server shuts down")
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._unanswered.add(answer)
        answer.add_done_callback(self._unanswered.discard)
        self._waiting.append(_Waiting(image, task, topk, loop.time(), answer))
        self._signal()
        return await answer

    def _signal(self) -> None:
        for event, is_set in ((self._some, self._waiting), (self._full, len(self._waiting) >= self._max_batch)):
            event.set() if is_set else event.clear()

    async def _run(self) -> None:
        while True:
            async with self._forming:
                batch = await self._next_batch()
            if batch := [each for each in batch if not each.answer.done()]:  # done: whoever asked has gone
                await self._answer(batch)

    async def _next_batch(self) -> list[_Waiting]:
        await self._some.wait()
        left = self._waiting[0].since + self._max_wait - asyncio.get_running_loop().time()
        if left > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._full.wait(), left)
        oldest = self._waiting[0].task
        fitting = (each for each in self._waiting if self._mix or each.task is oldest)
        batch = list(islice(fitting, self._max_batch))
        taken = set(batch)
        self._waiting = deque(each for each in self._waiting if each not in taken)
        self._signal()
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        tasks = [each.task for each in batch]
        if self._observe is not None:
            self._observe(len(batch), len(set(tasks)))
        try:
            results = await self._answers([each.image for each in batch], tasks, [each.topk for each in batch])
        except Exception as error:  # whatever it is, it belongs to those who asked, and the next batch must run
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(error)
            return
        for each, result in zip(batch, results):
            if not each.answer.done():
                each.answer.set_result(result)
