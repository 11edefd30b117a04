"""Where batches come from.

A source gives the batches of step s, s + 1, ... as a function of (seed, step) alone, so that a run that is stopped and
resumed sees what it would have seen.

A batch is G tasks of up to K classes with an image each, or any other number: `labels` says what an image shows, and
`counts` how many a task has. In several processes each gets whole tasks of the same global batch; where there is one
task (captions), each gets its share of the pairs, and the objective brings the texts together.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from hyperclip_fast.data.augmentation import augment, normalize, resize
from hyperclip_fast.data.batch import Batch, BatchShape, Share, Source, draw_sizes, share_of_tasks
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.task_sampler import TaskBatch, TaskSampler
from hyperclip_fast.utils.seeds import step_seed


class Sampler(Protocol):
    """What a TaskSource draws from."""

    @property
    def names(self) -> Sequence[str]:
        """Of all classes; `class_ids` of a batch are indices into them."""

    def batch(self, step: int) -> TaskBatch:
        """The whole mixed batch of a step; images are RGBA pictures, or (B, 3, S, S) float32 in [-1, 1]."""


class TaskSource:
    """Batches of a sampler of pictures, augmented and resized.

    Args:
        sampler: such as `TaskSampler`; `class_ids` of its batches are indices into `names`.
        names: of all classes.
        shape: of the batches.
        preprocessing: the model's, of which size, mean and std count.
        share: of this process; each augments the global batch and keeps its part.
        wordings: of the names; every task draws one.
    """

    def __init__(
        self,
        sampler: Sampler,
        names: Sequence[str],
        shape: BatchShape,
        preprocessing: Preprocessing,
        share: Share,
        wordings: Sequence[str] = ("{}",),
    ):
        self.sampler, self.shape, self.preprocessing, self.share = sampler, shape, preprocessing, share
        self.wordings = len(wordings)
        self.names = tuple(wording.replace("{}", name) for wording in wordings for name in names)

    def batches(self, start: int, state: Any = None) -> Iterator[Batch]:
        """The batches from step `start` on."""
        while True:
            yield self.batch(start)
            start += 1

    def batch(self, step: int) -> Batch:
        """The batch of a step, or this process's part of it."""
        drawn, (low, high) = self.sampler.batch(step), self.shape.class_range
        tasks, most = drawn.class_ids.shape
        sizes = draw_sizes(self.shape, step) if low < high else [most] * tasks
        generator = torch.Generator().manual_seed(step_seed(self.shape.seed, step))
        images, classes = self._images(drawn, sizes, generator), []
        starts = torch.randint(self.wordings, (tasks, 1), generator=generator) * (len(self.names) // self.wordings)
        for task, size in zip((drawn.class_ids + starts).tolist(), sizes):
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
        return normalize(resize(images, self.preprocessing.size), self.preprocessing)


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


class StagedSource:
    """Sources that follow one another, each for an equal part of a run's steps.

    Args:
        sources: of the same names; none is a stream with a state.
        steps: of the run.
    """

    def __init__(self, sources: Sequence[Source], steps: int):
        self.sources, self.steps, self.names = tuple(sources), steps, sources[0].names

    def batches(self, start: int, state: Any = None) -> Iterator[Batch]:
        """The batches from step `start` on; after the last step the last source goes on."""
        count = len(self.sources)
        for stage in range(min(start * count // self.steps, count - 1), count):
            end = -(-(stage + 1) * self.steps // count) if stage < count - 1 else None
            yield from islice(self.sources[stage].batches(start), None if end is None else end - start)
            start = end or start


def picture_source(
    pictures: Pictures,
    shape: BatchShape,
    preprocessing: Preprocessing,
    share: Share,
    wordings: Sequence[str] = ("{}",),
    group_weights: Mapping[str, float] = MappingProxyType({}),
) -> TaskSource:
    """Batches of Pictures' training part.

    Raises:
        ValueError: as `TaskSampler`.
    """
    sampler = TaskSampler(
        pictures.subset(~pictures.held_out),
        tasks_per_batch=shape.tasks_per_batch,
        classes_per_task=shape.class_range[1],
        seed=shape.seed,
        mixed_groups=shape.mixed_groups,
        group_weights=group_weights,
    )
    return TaskSource(sampler, pictures.names, shape, preprocessing, share, wordings)
