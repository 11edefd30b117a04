"""What the operations' launches share: sizes of grids, strides of rows, and the sum of partial gradients by task."""

from typing import Any, NamedTuple

import torch

from .triton_rows import _reduce_kernel

REDUCE_CONFIG = (64, 32, 4)  # BLOCK_B, BLOCK_D, warps


class Rows(NamedTuple):
    """Tables of rows, and which of them each sample uses: None where T is 1 or B."""

    weight: torch.Tensor  # (T, D), columns dense
    bias: torch.Tensor  # (T, D), columns dense
    task_ids: torch.Tensor | None  # (B,), dense

    def arguments(self) -> dict[str, Any]:
        """What every kernel that applies rows takes of them."""
        weight, bias, task_ids = self
        tables = {"weight": weight, "bias": bias, "task_ids": task_ids, "T": weight.shape[0]}
        return {**tables, "weight_stride": row_stride(weight), "bias_stride": row_stride(bias)}


def cdiv(count: int, size: int) -> int:
    """count / size, rounded up."""
    return -(-count // size)  # triton.cdiv takes 2 us a call


def row_stride(table: torch.Tensor) -> int:
    """Elements from one row to the next; 0 for one row that all samples use."""
    return 0 if table.shape[0] == 1 else table.stride(0)


def reduce_partials(partials: torch.Tensor, weight: torch.Tensor, task_ids: torch.Tensor | None) -> torch.Tensor:
    """Partials (R, B, S, D) summed to (R, T, D) of weight's dtype, each task's samples in the batch's order."""
    if task_ids is None:
        dims = (1, 2) if weight.shape[0] == 1 else 2
        return partials.sum(dims).view(-1, *weight.shape).to(weight.dtype)
    kinds, B, slices, D = partials.shape
    T = weight.shape[0]
    grads = torch.empty(kinds, T, D, dtype=weight.dtype, device=weight.device)
    block_b, block_d, warps = REDUCE_CONFIG
    _reduce_kernel[(T, cdiv(D, block_d), kinds)](
        partials=partials,
        task_ids=task_ids,
        grads=grads,
        B=B,
        T=T,
        slices=slices,
        D=D,
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return grads
