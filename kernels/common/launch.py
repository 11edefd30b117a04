"""What the operations' launches share: sizes of grids, and the sum of partial gradients by task."""

import torch

from .launcher import launch
from .triton_rows import _reduce_kernel

REDUCE_CONFIG = (256, 32, 32, 4)  # BLOCK_I of ids, BLOCK_B, BLOCK_D, warps


def cdiv(count: int, size: int) -> int:
    """count / size, rounded up."""
    return -(-count // size)  # triton.cdiv takes 2 us a call


def reduce_partials(partials: torch.Tensor, weight: torch.Tensor, task_ids: torch.Tensor | None) -> torch.Tensor:
    """Partials (R, B, S, D) summed to (R, T, D) of weight's dtype, each task's samples in the batch's order."""
    if task_ids is None:
        dims = (1, 2) if weight.shape[0] == 1 else 2
        return partials.sum(dims).view(-1, *weight.shape).to(weight.dtype)
    kinds, B, slices, D = partials.shape
    T = weight.shape[0]
    grads = torch.zeros(kinds, T, D, dtype=weight.dtype, device=weight.device)
    if not partials.numel():
        return grads
    block_i, block_b, block_d, warps = REDUCE_CONFIG
    launch(
        _reduce_kernel,
        (B, cdiv(D, block_d), kinds),
        partials=partials,
        task_ids=task_ids,
        grads=grads,
        B=B,
        T=T,
        slices=slices,
        D=D,
        BLOCK_I=block_i,
        BLOCK_B=block_b,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return grads
