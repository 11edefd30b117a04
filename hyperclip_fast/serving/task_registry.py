"""The tasks of a server: named ones, kept in a file, and ad hoc ones, the last few of them kept in memory.

A change of named tasks is staged, saved, and only then served and acknowledged; what cannot be saved is refused, and
never was. Changes that come during a save share the next one. So what is served is what the file holds.

Only the event loop touches the registry, and a task in it is a value that never changes. So nothing is locked: what a
request was given stays its own, and a copy of the dictionary is a consistent state to save from another thread.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.tasks import AdaptedTask
from hyperclip_fast.utils.class_names import check_name, check_task

log = logging.getLogger(__name__)

NOT_SAVED = "the change could not be saved, and was not made: try again"


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
    """

    def __init__(
        self,
        make: Callable[[Sequence[str]], Awaitable[AdaptedTask]],
        limits: TaskLimits | None = None,
        save: Callable[[Mapping[str, AdaptedTask]], None] | None = None,
    ):
        self.limits = limits or TaskLimits()
        self.failed_saves, self.saves_fail = 0, False
        self._make, self._save = make, save
        self._named: dict[str, AdaptedTask] = {}  # as saved
        self._staged: dict[str, AdaptedTask] = {}  # as the next save will have them
        self._waiting: list[asyncio.Future] = []  # for that save
        self._saving: asyncio.Task | None = None
        self._ad_hoc: OrderedDict[tuple[str, ...], AdaptedTask] = OrderedDict()
        # One new task of each kind at a time: batches get their turn between them, and neither kind starves the other.
        self._making_named, self._making_ad_hoc = asyncio.Lock(), asyncio.Lock()

    def __len__(self) -> int:
        return len(self._named)

    def __iter__(self):
        return iter(self._named)

    def fill(self, tasks: Mapping[str, AdaptedTask]) -> None:
        """Take over tasks that are saved already."""
        self._named.update(tasks)
        self._staged.update(tasks)

    def get(self, name: str) -> AdaptedTask:
        """A named task.

        Raises:
            RequestError: 404, for an unknown name.
        """
        if name not in self._named:
            raise self._unknown(name)
        return self._named[name]

    def _unknown(self, name: str) -> RequestError:
        return RequestError(404, "unknown_task", f"task must be one of the {len(self)} tasks here, got {name!r}")

    async def put(self, name: str, classes: Sequence[str]) -> bool:
        """Add a task, or replace the one of that name, and save it; whether it is new.

        Raises:
            RequestError: 422 for a bad name or bad classes, 409 where there is no room for another task, 503 if it
                cannot be saved.
        """
        with _refused("bad_name"):
            check_name(name, most_characters=self.limits.length)
        classes = self._checked(classes)
        async with self._making_named:
            if name not in self._staged and len(self._staged) >= self.limits.tasks:
                raise RequestError(409, "too_many_tasks", f"at most {self.limits.tasks} tasks are kept: remove one")
            task = await self._make(classes)
            is_new = name not in self._staged
            self._staged[name] = task
        await self._saved()
        return is_new

    async def remove(self, name: str) -> None:
        """Remove a named task from the file and from here; requests that were accepted before keep it.

        Raises:
            RequestError: 404 for an unknown name, 503 if that cannot be saved.
        """
        if name not in self._staged:
            raise self._unknown(name)
        del self._staged[name]
        await self._saved()

    async def ad_hoc(self, classes: Sequence[str]) -> AdaptedTask:
        """A task without a name, made once and remembered for a while.

        Raises:
            RequestError: 422, for bad classes.
        """
        classes = self._checked(classes)
        if classes not in self._ad_hoc:
            async with self._making_ad_hoc:
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
        """Wait for the save that is under way."""
        if self._saving is not None:
            await self._saving

    async def _saved(self) -> None:
        """Wait until what is staged now is in the file, and served.

        Raises:
            RequestError: 503, if it cannot be saved.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        if self._saving is None or self._saving.done():
            self._saving = asyncio.create_task(self._save_all())
        await done

    async def _save_all(self) -> None:
        while self._waiting:
            tasks, waiting = dict(self._staged), self._waiting
            self._waiting = []
            try:
                if self._save is not None:
                    await asyncio.to_thread(self._save, tasks)
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._refuse(waiting, error)
                continue
            self._named, self.saves_fail = tasks, False
            for done in waiting:
                if not done.done():  # whoever waited has gone
                    done.set_result(None)

    def _refuse(self, waiting: list[asyncio.Future], error: Exception) -> None:
        """Take back all that is staged; what came during the save that failed may rest on what it was to save."""
        self.failed_saves, self.saves_fail = self.failed_saves + 1, True
        log.error("The tasks could not be saved; changes refused: %d; %s", len(waiting), error)
        waiting, self._waiting = waiting + self._waiting, []
        self._staged = dict(self._named)
        for done in waiting:
            if not done.done():
                done.set_exception(RequestError(503, "not_saved", NOT_SAVED, {"Retry-After": "5"}))


@contextlib.contextmanager
def _refused(code: str) -> Iterator[None]:
    """What is wrong with a name becomes an answer, 422."""
    try:
        yield
    except ValueError as error:
        raise RequestError(422, code, str(error)) from error
