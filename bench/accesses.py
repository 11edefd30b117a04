"""What kernels and PyTorch's operators read and write, without a GPU.

Kernels run in Triton's interpreter (TRITON_INTERPRET=1 before triton is imported), which shows the address of every
unmasked lane. Other operators are taken at their word: each tensor they are given is read once, each one they return is
written once, views are free.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from hyperclip_fast.utils.private_api import TorchDispatchMode, tree_leaves, written_arguments

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Moved(NamedTuple):
    """What one step loads from, or stores to, one tensor."""

    name: str  # the kernel's argument; none for an operator's tensor
    kind: str  # load or store
    tensor: torch.Tensor
    unique: int  # bytes, each counted once: what memory must deliver
    total: int  # bytes, counted as often as they are asked for: what the caches must deliver


@dataclass
class Step:
    """One launch of a kernel, or one operator of PyTorch."""

    name: str
    tensors: list[torch.Tensor]  # its arguments and results
    moved: list[Moved]
    is_kernel: bool = False


class Accesses:
    """Byte addresses of the unmasked lanes that kernels loaded and stored, duplicates kept, and the steps they make."""

    def __init__(self):
        self.addresses: dict[str, list[np.ndarray]] = defaultdict(list)
        self.steps: list[Step] = []
        self.launched: dict[str, torch.Tensor] = {}  # the tensors of the launch that is running

    def record(self, kind: str, pointers, mask) -> None:
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        self.addresses[kind].append(pointers.data[lanes].astype(np.int64).reshape(-1))

    def is_wild(self, kind: str) -> bool:
        """Whether a lane of the last access is in no tensor of its launch: it must not happen, the launch will fail."""
        addresses = self.addresses[kind][-1]
        inside = np.zeros(len(addresses), bool)
        for tensor in self.launched.values():
            inside |= (addresses >= tensor.data_ptr()) & (addresses < tensor.data_ptr() + _extent(tensor))
        return not inside.all()

    def of(self, kind: str, tensor: torch.Tensor) -> np.ndarray:
        """Sorted offsets, in elements, of the accesses inside `tensor`, which is contiguous."""
        every = np.concatenate(self.addresses[kind])
        offsets = every - tensor.data_ptr()
        inside = (offsets >= 0) & (offsets < tensor.numel() * tensor.element_size())
        return np.sort(offsets[inside]) / tensor.element_size()

    def total(self, kind: str) -> int:
        """Accesses of all kernels."""
        return sum(len(addresses) for addresses in self.addresses[kind])

    def end_launch(self, name: str, tensors: dict[str, torch.Tensor], before: dict[str, int]) -> None:
        """Make a step of the accesses since `before`, the lengths of the address lists when the launch began."""
        distinct = {tensor.data_ptr(): (argument, tensor) for argument, tensor in reversed(tensors.items())}
        moved = []
        for kind, start in before.items():
            addresses = np.concatenate([np.empty(0, np.int64), *self.addresses[kind][start:]])
            placed = 0
            for argument, tensor in distinct.values():
                offsets = addresses - tensor.data_ptr()
                offsets = offsets[(offsets >= 0) & (offsets < _extent(tensor))]
                placed += len(offsets)
                if len(offsets):
                    size = tensor.element_size()
                    moved.append(Moved(argument, kind, tensor, len(np.unique(offsets)) * size, len(offsets) * size))
            if placed != len(addresses):
                raise ValueError(f"{name}: {placed} of {len(addresses)} {kind}s lie in its tensors, each in one")
        self.steps.append(Step(name, list(tensors.values()), moved, is_kernel=True))


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))) * tensor.element_size()


@contextlib.contextmanager
def accesses(execute: bool = True, first_program: int = 0) -> Iterator[Accesses]:
    """Record all loads and stores of interpreted kernels, and each launch as a step.

    Args:
        execute: false: nothing is loaded (loads give zero) or stored, so that any address may be computed.
        first_program: what the launches' first programs take for their number on axis 0.
    """
    log = Accesses()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    place, launch = InterpreterBuilder.set_grid_idx, GridExecutor.__call__

    def recording_load(self, ptrs, mask, *rest):
        log.record("load", ptrs, mask)
        if not execute or log.is_wild("load"):
            mask = TensorHandle(np.zeros_like(mask.data), mask.dtype)
        return load(self, ptrs, mask, *rest)

    def recording_store(self, ptrs, value, mask, *rest):
        log.record("store", ptrs, mask)
        if execute and not log.is_wild("store"):
            store(self, ptrs, value, mask, *rest)

    def shifted_place(self, x, y, z):
        place(self, x, y, z)
        self.grid_idx = (x + first_program, y, z)

    def recording_launch(self, *arguments, **keywords):
        before = {kind: len(log.addresses[kind]) for kind in ("load", "store")}
        named = {**dict(zip(self.arg_names, arguments)), **keywords}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        log.launched = tensors
        try:
            launch(self, *arguments, **keywords)
        finally:
            log.launched = {}
        if execute:
            log.end_launch(self.fn.__name__, tensors, before)

    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (InterpreterBuilder, "create_masked_load", recording_load),
            (InterpreterBuilder, "create_masked_store", recording_store),
            (InterpreterBuilder, "set_grid_idx", shifted_place),
            (GridExecutor, "__call__", recording_launch),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield log


class _Operators(TorchDispatchMode):
    """Makes a step of every operator that is neither a view nor an allocation, nor part of a launch."""

    def __init__(self, log: Accesses):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.log.launched and name not in ALLOCATIONS:
            inputs, outputs = _tensors((args, kwargs)), _tensors(result)
            written = _tensors([a for a, is_written in zip(args, written_arguments(func)) if is_written])
            storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            views = all(tensor.untyped_storage().data_ptr() in storages for tensor in outputs)
            if written or not views:
                moved = [Moved("", "load", tensor, _bytes(tensor), _bytes(tensor)) for tensor in inputs]
                moved += [Moved("", "store", tensor, _bytes(tensor), _bytes(tensor)) for tensor in written or outputs]
                self.log.steps.append(Step(name, [*inputs, *outputs], moved))
        return result


def _tensors(tree) -> list[torch.Tensor]:
    """The distinct tensors of some arguments."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return list({(t.data_ptr(), t.shape, t.stride()): t for t in found}.values())


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: those of an expanded dimension are one."""
    return tensor.element_size() * math.prod(n for n, s in zip(tensor.shape, tensor.stride()) if s)


@contextlib.contextmanager
def steps() -> Iterator[list[Step]]:
    """The launches and the operators of PyTorch, in their order."""
    with accesses() as log, _Operators(log):
        yield log.steps
