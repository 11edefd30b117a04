"""Batches, whose share of them a process takes, and the protocol of what gives them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperclip_fast.utils.seeds import generator_of


@dataclass(frozen=True)
class BatchShape:
    """What a source needs to know of the training: how large batches are, and where their chance comes from.

    Args:
        tasks_per_batch: G, of all processes together.
        classes_per_task: K; or the least and the most, from which each task draws its own.
        seed: of the stream.
        mixed_groups: probability of a task whose names come from all groups.
    """

    tasks_per_batch: int = 8
    classes_per_task: int | tuple[int, int] = 16
    seed: int = 0
    mixed_groups: float = 0.25

    @property
    def class_range(self) -> tuple[int, int]:
        """The least and the most classes of a task."""
        both = self.classes_per_task
        return (both, both) if isinstance(both, int) else both


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


def batch_of(pairs: Sequence[tuple[Tensor, str]], counts: tuple[int, ...], broken: int, state: Any = None) -> Batch:
    """The Batch of images and their texts, task by task, each text a class of its own."""
    texts = iter(text for _, text in pairs)
    return Batch(
        images=torch.stack([image for image, _ in pairs]),
        labels=torch.cat([torch.arange(count) for count in counts]),
        counts=counts,
        classes=tuple(tuple(next(texts) for _ in range(count)) for count in counts),
        broken=broken,
        state=state,
    )


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


def draw_sizes(shape: BatchShape, step: int) -> list[int]:
    """The number of classes of each task of a step."""
    low, high = shape.class_range
    generator = generator_of(shape.seed, step, "sizes")
    return torch.randint(low, high + 1, (shape.tasks_per_batch,), generator=generator).tolist()


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
