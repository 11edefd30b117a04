"""The tasks of a server: named ones, kept in a file, and ad hoc ones, the last few of them kept in memory.

Only the event loop touches the registry, and a task in it is a value that never changes. So nothing is locked: what a
request was given stays its own, and a copy of the dictionary is a consistent state to save from another thread.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.tasks import AdaptedTask
from hyperclip_fast.utils.class_names import check_name, check_task

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # after a save that failed


@dataclass(frozen=True)
class TaskLimits:
    """What a server refuses to keep.

    Args:
        tasks: named tasks.
        ad_hoc: tasks without a name that are remembered; the one not used for longest goes first.
        classes: class names of a task.
        length: characters of a class name, or of a task's name.
    """

    tasks: int = 1000
    ad_hoc: int = 100
    classes: int = 1000
    length: int = 200


class TaskRegistry:
    """Named and ad hoc tasks.

    Args:
        make: makes a task of class names, away from the event loop.
        limits: see TaskLimits.
        save: writes named tasks, called in a thread; None: they are not kept.
        delay: seconds that a change waits for others to be saved with.
    """

    def __init__(
        self,
        make: Callable[[Sequence[str]], Awaitable[AdaptedTask]],
        limits: TaskLimits | None = None,
        save: Callable[[Mapping[str, AdaptedTask]], None] | None = None,
        delay: float = 0.5,
    ):
        self.limits = limits or TaskLimits()
        self.failed_saves = 0
        self._make, self._save, self._delay = make, save, delay
        self._named: dict[str, AdaptedTask] = {}
        self._ad_hoc: OrderedDict[tuple[str, ...], AdaptedTask] = OrderedDict()
        self._making = asyncio.Lock()  # one new task at a time, so that batches get their turn between them
        self._changed, self._closing = False, asyncio.Event()
        self._saving: asyncio.Task | None = None

    def __len__(self) -> int:
        return len(self._named)

    def __iter__(self):
        return iter(self._named)

    @property
    def unsaved(self) -> bool:
        """Whether a change is not in the file."""
        return self._save is not None and self._changed

    def fill(self, tasks: Mapping[str, AdaptedTask]) -> None:
        """Take over tasks that are saved already."""
        self._named.update(tasks)

    def get(self, name: str) -> AdaptedTask:
        """A named task.

        Raises:
            RequestError: 404, for an unknown name.
        """
        if name not in self._named:
            raise RequestError(404, "unknown_task", f"task must be one of the {len(self)} tasks here, got {name!r}")
        return self._named[name]

    async def put(self, name: str, classes: Sequence[str]) -> bool:
        """Add a task, or replace the one of that name; whether it is new.

        Raises:
            RequestError: 422 for a bad name or bad classes, 409 where there is no room for another task.
        """
        with _refused("bad_name"):
            check_name(name, most_characters=self.limits.length)
        classes = self._checked(classes)
        async with self._making:
            if name not in self._named and len(self) >= self.limits.tasks:
                raise RequestError(409, "too_many_tasks", f"at most {self.limits.tasks} tasks are kept: remove one")
            task = await self._make(classes)
            is_new = name not in self._named
            self._named[name] = task
        self._keep()
        return is_new

    def remove(self, name: str) -> None:
        """Remove a named task; requests that were accepted before keep it.

        Raises:
            RequestError: 404, for an unknown name.
        """
        self.get(name)
        del self._named[name]
        self._keep()

    async def ad_hoc(self, classes: Sequence[str]) -> AdaptedTask:
        """A task without a name, made once and remembered for a while.

        Raises:
            RequestError: 422, for bad classes.
        """
        classes = self._checked(classes)
        if classes not in self._ad_hoc:
            async with self._making:
                if classes not in self._ad_hoc:  # another request may have made it meanwhile
                    self._ad_hoc[classes] = await self._make(classes)
        task = self._ad_hoc[classes]
        self._ad_hoc.move_to_end(classes)
        if len(self._ad_hoc) > self.limits.ad_hoc:
            self._ad_hoc.popitem(last=False)
        return task

    def _checked(self, classes: Sequence[str]) -> tuple[str, ...]:
        with _refused("bad_classes"):
            check_task(classes, self.limits.classes, self.limits.length)
        return tuple(classes)

    async def close(self) -> None:
        """Save what is not saved yet.

        Raises:
            Exception: what the save raised, if it fails.
        """
        self._closing.set()
        if self._saving is not None:
            await self._saving

    def _keep(self) -> None:
        self._changed = True
        if self._save is not None and (self._saving is None or self._saving.done()):
            self._saving = asyncio.create_task(self._save_changes())

    async def _save_changes(self) -> None:
        pause = self._delay
        while self._changed:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)
            self._changed = False
            try:
                if self._save is not None:
                    await asyncio.to_thread(self._save, dict(self._named))
                pause = self._delay
            except Exception:  # not the disk's alone: a GPU may lack the room to gather rows; no change is forgotten
                self.failed_saves += 1
                self._changed, pause = True, RETRY_SECONDS
                if self._closing.is_set():
                    raise
                log.exception("The tasks could not be saved; the next try is in %g s", pause)


def read_bank(path: Path, model: HyperCLIP) -> dict[str, AdaptedTask]:
    """Tasks of a bank file; none where there is no file yet.

    Raises:
        ValueError: if its folder does not exist, or it is no bank of this model.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--bank must lie in a folder that exists, got {path}")
    if not path.exists():
        return {}
    bank = TaskBank.load(path, model)
    return {name: bank[name] for name in bank}


def write_bank(path: Path, model: HyperCLIP, tasks: Mapping[str, AdaptedTask]) -> None:
    """Write a bank file (beside, then renamed); without tasks there is none."""
    if tasks:
        TaskBank.of(model, tasks).save(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _refused(code: str) -> Iterator[None]:
    """What is wrong with a name becomes an answer, 422."""
    try:
        yield
    except ValueError as error:
        raise RequestError(422, code, str(error)) from error
