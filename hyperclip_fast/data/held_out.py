"""The held-out pictures as tasks for evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperclip_fast.data.pictures import Pictures


@dataclass(frozen=True)
class EvalTask:
    """Pictures and the class names they are to be told apart by.

    Args:
        name: of the task.
        class_names: K names.
        images: (M, 4, S, S) uint8 RGBA.
        labels: (M,) index into class_names.
    """

    name: str
    class_names: tuple[str, ...]
    images: Tensor
    labels: Tensor


def held_out_tasks(pictures: Pictures, classes: int = 10, min_classes: int = 4, seed: int = 0) -> list[EvalTask]:
    """The held-out pictures as tasks of at most `classes` names, each of one group.

    A group with more held-out names gives several tasks of about equal size ("animals 1", "animals 2", ...); one with
    fewer than `min_classes` gives none.
    """
    held = pictures.subset(pictures.held_out)
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for group in sorted(set(held.groups)):
        ids = [i for i in held.labels.unique().tolist() if held.groups[i] == group]
        if len(ids) < min_classes:
            continue
        ids = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
        parts = -(-len(ids) // classes)
        for part in range(parts):
            name = group if parts == 1 else f"{group} {part + 1}"
            tasks.append(_task(held, name, ids[part::parts]))
    return tasks


def group_of(task: str) -> str:
    """The group of names that a task of `held_out_tasks` belongs to: "animals 2" is of animals."""
    return task.rstrip("0123456789 ")


def _task(pictures: Pictures, name: str, ids: Sequence[int]) -> EvalTask:
    place = torch.full((len(pictures.names),), -1)
    place[list(ids)] = torch.arange(len(ids))
    labels = place[pictures.labels]
    return EvalTask(name, tuple(pictures.names[i] for i in ids), pictures.images[labels >= 0], labels[labels >= 0])
