"""Mixed batches drawn from pictures, one function of seed and step."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.utils.seeds import stable_hash


@dataclass(frozen=True)
class TaskBatch:
    """A mixed batch of G tasks with K classes: image g * K + k shows class k of task g.

    Args:
        images: (G * K, 4, S, S) uint8 RGBA.
        task_ids: (G * K,) int64, each of 0 ... G - 1 K times.
        class_ids: (G, K) int64, index into the pictures' names.
        can_flip: (G * K,) bool, images that may be mirrored.
    """

    images: Tensor
    task_ids: Tensor
    class_ids: Tensor
    can_flip: Tensor


class TaskSampler:
    """An endless stream of mixed batches; batch(step) depends on the seed and the step only.

    Groups are drawn in proportion to the square root of their number of names. A group with fewer than K names gives
    all of them, and the task is filled up from the other groups.

    Args:
        pictures: what to draw from; names without a picture are never drawn.
        tasks_per_batch: G.
        classes_per_task: K.
        seed: of the stream.
        mixed_groups: probability of a task whose names come from all groups.
        group_weights: by group, a factor of the chance that a task is drawn from it.

    Raises:
        ValueError: for fewer than K names, an unknown group, or an argument out of range.
    """

    def __init__(
        self,
        pictures: Pictures,
        tasks_per_batch: int = 8,
        classes_per_task: int = 16,
        seed: int = 0,
        mixed_groups: float = 0.25,
        group_weights: Mapping[str, float] = MappingProxyType({}),
    ):
        self.names = pictures.names
        self.counts = torch.bincount(pictures.labels, minlength=len(pictures.names))
        self.present = self.counts.nonzero().flatten()
        if tasks_per_batch < 1:
            raise ValueError(f"tasks_per_batch must be positive, got {tasks_per_batch}")
        if not 1 <= classes_per_task <= len(self.present):
            raise ValueError(f"classes_per_task must lie in [1, {len(self.present)}], got {classes_per_task}")
        if not 0 <= mixed_groups <= 1:
            raise ValueError(f"mixed_groups must lie in [0, 1], got {mixed_groups}")
        self.pictures, self.seed, self.mixed_groups = pictures, seed, mixed_groups
        self.tasks_per_batch, self.classes_per_task = tasks_per_batch, classes_per_task
        self.by_label = pictures.labels.argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts
        present = [pictures.groups[i] for i in self.present]
        known = sorted(set(present))
        if not set(group_weights) <= set(known):
            raise ValueError(f"group_weights must be of some of {known}, got {dict(group_weights)}")
        self.groups = [self.present[torch.tensor([group == wanted for group in present])] for wanted in known]
        factors = torch.tensor([float(group_weights.get(name, 1)) for name in known])
        if not factors.isfinite().all() or not factors.sum() > 0:
            raise ValueError(f"group_weights must be finite, and leave a group, got {dict(group_weights)}")
        self.weights = factors * torch.tensor([float(len(group)) for group in self.groups]).sqrt()

    def batch(self, step: int) -> TaskBatch:
        """The mixed batch of this step."""
        generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}:{step}") >> 1)
        class_ids = torch.stack([self._draw_task(generator) for _ in range(self.tasks_per_batch)])
        classes = class_ids.flatten()
        which = (torch.rand(len(classes), generator=generator, dtype=torch.float64) * self.counts[classes]).long()
        images = self.pictures.images[self.by_label[self.starts[classes] + which]]
        task_ids = torch.arange(self.tasks_per_batch).repeat_interleave(self.classes_per_task)
        return TaskBatch(images, task_ids, class_ids, self.pictures.can_flip[classes])

    def _draw_task(self, generator: torch.Generator) -> Tensor:
        """K distinct names (K,)."""
        if torch.rand((), generator=generator) < self.mixed_groups:
            names = self.present
        else:
            names = self.groups[torch.multinomial(self.weights, 1, generator=generator)]
        drawn = _shuffled(names, generator)[: self.classes_per_task]
        if missing := self.classes_per_task - len(drawn):
            others = self.present[~torch.isin(self.present, drawn)]
            drawn = _shuffled(torch.cat([drawn, _shuffled(others, generator)[:missing]]), generator)
        return drawn


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]
