"""Which task each image of a batch belongs to."""

from collections.abc import Callable

import torch
from torch import Tensor


def _identical(batch: int, tasks: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64)


def _uniform(batch: int, tasks: int, generator: torch.Generator) -> Tensor:
    return torch.randint(tasks, (batch,), generator=generator)


def _skewed(batch: int, tasks: int, generator: torch.Generator) -> Tensor:
    zipf = 1 / torch.arange(1, tasks + 1, dtype=torch.float64)
    return torch.multinomial(zipf, batch, replacement=True, generator=generator)


def _distinct(batch: int, tasks: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tasks, generator=generator)
    return order[torch.arange(batch) % tasks]


MIXES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "identical": _identical,  # all images of one task
    "uniform": _uniform,  # each image of any task
    "skewed": _skewed,  # the k-th task 1/k as often as the first (Zipf)
    "distinct": _distinct,  # as many tasks as images, or all T
}


def make_task_ids(mix: str, batch: int, tasks: int, seed: int = 0) -> Tensor:
    """Task ids (B,), int64 in [0, T), of a named mix.

    Raises:
        ValueError: for a mix that does not exist.
    """
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, got {mix!r}")
    return MIXES[mix](batch, tasks, torch.Generator().manual_seed(seed))
