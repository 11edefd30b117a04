"""Where batches come from.

A source gives the batches of step s, s + 1, ... as a function of (seed, step) alone, so that a run that is stopped and
resumed sees what it would have seen.

A batch is G tasks of up to K classes with an image each, or any other number: `labels` says what an image shows, and
`counts` how many a task has. In several processes each gets whole tasks of the same global batch; where there is one
task (captions), each gets its share of the pairs, and the objective brings the texts together.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hyperclip_fast.data import Pictures, TaskBatch, TaskSampler, augment, resize
from hyperclip_fast.train_config import TrainConfig
from hyperclip_fast.utils.seeds import hash_seed, step_seed


@dataclass(frozen=True)
class Batch:
    """B images, sorted by task, and the class names of their G tasks.

    Args:
        images: (B, 3, S, S) float32 in [-1, 1].
        labels: (B,) int64, the class of each image among its task's.
        counts: images of each task; their sum is B.
        classes: class names, or captions, of each task.
        broken: samples that could not be read and were replaced.
        state: of a stream: what `Source.batches` takes to go on after this batch.
    """

    images: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    classes: tuple[tuple[str, ...], ...]
    broken: int = 0
    state: Any = None

    @property
    def task_ids(self) -> Tensor:
        """(B,) int64, the task of each image."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))

    def pin_memory(self) -> "Batch":
        """The same in memory from which a GPU copies without waiting; DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Source(Protocol):
    """What a Trainer draws from."""

    names: tuple[str, ...]  # every class name it may give, where they are known; empty for captions

    def batches(self, start: int, state: Any = None) -> Iterator[Batch]:
        """The batches of steps `start`, `start` + 1, ... without end; `state` is that of batch `start` - 1."""


@dataclass(frozen=True)
class Share:
    """Which part of each global batch is this process's.

    Args:
        rank: of this process.
        world: processes.
    """

    rank: int = 0
    world: int = 1

    def of(self, total: int, what: str) -> slice:
        """This process's part of `total` things.

        Raises:
            ValueError: where the processes do not divide them.
        """
        if total % self.world:
            raise ValueError(f"{what} must be a multiple of the number of processes, {self.world}, got {total}")
        size = total // self.world
        return slice(self.rank * size, (self.rank + 1) * size)


def draw_sizes(config: TrainConfig, step: int) -> list[int]:
    """The number of classes of each task of a step."""
    low, high = config.class_range
    generator = torch.Generator().manual_seed(hash_seed(config.seed, step, "sizes"))
    return torch.randint(low, high + 1, (config.tasks_per_batch,), generator=generator).tolist()


def share_of_tasks(sizes: list[int], share: Share) -> list[tuple[int, int]]:
    """This process's part of a batch with one image a class: (start, stop) of each of its tasks in the global batch.

    Raises:
        ValueError: where the processes divide neither the tasks nor the one task's classes.
    """
    starts = [sum(sizes[:g]) for g in range(len(sizes))]
    if len(sizes) == 1:
        mine = share.of(sizes[0], "classes_per_task, with one task,")
        return [(mine.start, mine.stop)]
    mine = share.of(len(sizes), "tasks_per_batch")
    return [(start, start + size) for start, size in zip(starts[mine], sizes[mine])]


class Sampler(Protocol):
    """What a TaskSource draws from."""

    def batch(self, step: int) -> TaskBatch:
        """The whole mixed batch of a step; images are RGBA pictures, or (B, 3, S, S) float32 that are taken as is."""


class TaskSource:
    """Batches of a sampler of pictures, augmented and resized.

    Args:
        sampler: such as `TaskSampler`; `class_ids` of its batches are indices into `names`.
        names: of all classes.
        config: of the training.
        image_size: S.
        share: of this process; each augments the global batch and keeps its part.
    """

    def __init__(
        self,
        sampler: Sampler,
        names: Sequence[str],
        config: TrainConfig,
        image_size: int,
        share: Share,
    ):
        self.sampler, self.names, self.config = sampler, tuple(names), config
        self.image_size, self.share = image_size, share

    def batches(self, start: int, state: Any = None) -> Iterator[Batch]:
        """The batches from step `start` on."""
        while True:
            yield self.batch(start)
            start += 1

    def batch(self, step: int) -> Batch:
        """The batch of a step, or this process's part of it."""
        drawn, (low, high) = self.sampler.batch(step), self.config.class_range
        tasks, most = drawn.class_ids.shape
        sizes = draw_sizes(self.config, step) if low < high else [most] * tasks
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, step))
        images, classes = self._images(drawn, sizes, generator), []
        for task, size in zip(drawn.class_ids.tolist(), sizes):
            classes += [self.names[i] for i in task[:size]]
        parts = share_of_tasks(sizes, self.share)
        return Batch(
            images=torch.cat([images[start:stop] for start, stop in parts]) if self.share.world > 1 else images,
            labels=torch.cat([torch.arange(stop - start) for start, stop in parts]),
            counts=tuple(stop - start for start, stop in parts),
            classes=tuple(tuple(classes[start:stop]) for start, stop in parts),
        )

    def _images(self, drawn: TaskBatch, sizes: list[int], generator: torch.Generator) -> Tensor:
        """The first pictures of each task, as many as it has classes, as the model takes them."""
        images, can_flip, most = drawn.images, drawn.can_flip, drawn.class_ids.shape[1]
        if min(sizes) < most:
            keep = (torch.arange(most) < torch.tensor(sizes)[:, None]).flatten()
            images, can_flip = images[keep], can_flip[keep]
        if not images.is_floating_point():
            images = augment(images, generator, can_flip)
        return resize(images, self.image_size)


class JoinedSource:
    """Batches made of those of several sources, whose tasks meet in one batch.

    Args:
        sources: each gives its own tasks, and this process its part of them; none is a stream with a state.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self.names = tuple(dict.fromkeys(name for source in sources for name in source.names))

    def batches(self, start: int, state: Any = None) -> Iterator[Batch]:
        """The batches from step `start` on."""
        for parts in zip(*(source.batches(start) for source in self.sources)):
            yield Batch(
                images=torch.cat([part.images for part in parts]),
                labels=torch.cat([part.labels for part in parts]),
                counts=sum((part.counts for part in parts), ()),
                classes=sum((part.classes for part in parts), ()),
            )


def picture_source(pictures: Pictures, config: TrainConfig, image_size: int, share: Share) -> TaskSource:
    """Batches of Pictures' training part.

    Raises:
        ValueError: as `TaskSampler`.
    """
    sampler = TaskSampler(
        pictures.subset(~pictures.held_out),
        tasks_per_batch=config.tasks_per_batch,
        classes_per_task=config.class_range[1],
        seed=config.seed,
        mixed_groups=config.mixed_groups,
    )
    return TaskSource(sampler, pictures.names, config, image_size, share)


def load(dataset: Dataset | IterableDataset, workers: int, pin: bool, sampler: Any = None) -> Iterator[Batch]:
    """Batches made by a DataLoader, in order, a few ahead; by this process itself where there are no workers.

    Args:
        dataset: gives whole batches: one an index of `sampler`, or a stream of them.
        workers: processes.
        pin: for a copy to a GPU.
        sampler: the indices, for a dataset that has them.
    """
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=_start_worker if workers else None,
            prefetch_factor=2 if workers else None,
            generator=torch.Generator(),  # else the loader would draw from the trainer's chance
        )
    )


def _start_worker(_: int) -> None:
    """Signals that reach a whole process group are for the trainer, which goes on to the step's end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
