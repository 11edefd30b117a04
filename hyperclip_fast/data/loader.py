"""Batches made ahead by worker processes."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hyperclip_fast.data.batch import Batch


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
