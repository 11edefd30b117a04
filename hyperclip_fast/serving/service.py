"""What serves, apart from HTTP: tasks and their file, batches of images, and threads that decode them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from hyperclip_fast.data.image_files import image_transform, open_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.serving.bank_file import BankFile
from hyperclip_fast.serving.batching import Answer, Batcher, Batches, ModelThread, Run
from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.metrics import Metrics
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.task_registry import TaskRegistry
from hyperclip_fast.tasks import AdaptedTask, Ranked


class Service:
    """What the routes work with.

    Args:
        preprocessing: the model's.
        make: makes a task of class names, see TaskRegistry.
        batches: runs them.
        bank: keeps the named tasks; None: nothing does.
        options: see ServeOptions.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        make: Callable[..., Awaitable[AdaptedTask]],
        batches: Batches,
        bank: BankFile | None = None,
        options: ServeOptions | None = None,
    ):
        self.options = options or ServeOptions()
        self.metrics, self.ready = Metrics(), False
        self._bank = bank
        self.registry = TaskRegistry(make, self.options.limits, bank.write if bank else None)
        if bank is not None:
            self.registry.fill(bank.read())
        self.classifier: Batcher[Ranked] = self._batcher(batches.classify)
        self.embedder: Batcher[list[float]] = self._batcher(batches.embed)
        self._transform = image_transform(preprocessing)
        self._decoders = ThreadPoolExecutor(self.options.decoders, "decode")
        self.metrics.tasks.set_function(lambda: len(self.registry))
        self.metrics.waiting.set_function(lambda: self.classifier.waiting + self.embedder.waiting)
        self.metrics.failed_saves.set_function(lambda: self.registry.failed_saves)
        self.metrics.saves_fail.set_function(lambda: self.registry.saves_fail)

    def _batcher(self, run: Run[Answer]) -> Batcher[Answer]:
        options = self.options
        return Batcher(
            run, options.max_batch, options.max_wait, options.mix, options.max_concurrent_batches, self.metrics.batch
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run batches; at the end, answer what was accepted and let another server have the bank."""
        self.classifier.start()
        self.embedder.start()
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            await asyncio.gather(self.classifier.close(), self.embedder.close())
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
    batches: Batches | None = None,
    create: bool = False,
) -> Service:
    """A service of the tasks in a file, warm; it has the file to itself.

    Args:
        path: the file.
        runner: makes the tasks.
        options: see ServeOptions.
        batches: runs them; None: the runner.
        create: make an empty file where there is none.

    Raises:
        ValueError: if the file does not exist, is no bank of the runner's model, or another server has it.
    """
    bank = BankFile(path, runner.model, create)
    service = Service(runner.model.preprocessing, runner.make, batches or runner, bank, options)
    runner.warm_up()
    return service
