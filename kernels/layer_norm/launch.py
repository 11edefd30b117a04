"""Launches of the layer norm's kernels: what is allocated, which grid."""

import torch

from ..common.launch import cdiv, reduce_partials, row_stride
from ..tables import layer_norm_tiles
from .triton_kernels import _bwd_kernel, _fwd_kernel

MAX_WIDTH = 8192
BACKWARD_PROGRAMS = 1024  # enough to fill a large GPU; fewer samples than this are cut into slices


def launch_forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """out (B, N, D), total (B, N, D) or None without delta, mean and rstd (B, N) or None where `keep` is false.

    x and delta are contiguous, weight's and bias's columns too; T is 1 or B where task_ids is None.
    """
    B, N, D = x.shape
    out = torch.empty(B, N, D, dtype=out_dtype, device=x.device)
    total = None if delta is None else torch.empty(B, N, D, dtype=x.dtype, device=x.device)
    mean = torch.empty(B, N, dtype=torch.float32, device=x.device) if keep else None
    rstd = torch.empty(B, N, dtype=torch.float32, device=x.device) if keep else None
    padded, (block_n, warps), _ = layer_norm_tiles(D)
    tiles = cdiv(N, block_n)
    if x.numel():
        _fwd_kernel[(B * tiles,)](
            x=x,
            delta=delta,
            weight=weight,
            bias=bias,
            task_ids=task_ids,
            out=out,
            total=total,
            mean=mean,
            rstd=rstd,
            N=N,
            T=weight.shape[0],
            tiles=tiles,
            weight_stride=row_stride(weight),
            bias_stride=row_stride(bias),
            eps=eps,
            D=D,
            BLOCK_N=block_n,
            BLOCK_D=padded,
            num_warps=warps,
        )
    return out, total, mean, rstd


def launch_backward(
    grad_out: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    task_ids: torch.Tensor | None,
    need_x: bool,
    delta_dtype: torch.dtype | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_x (B, N, D) of total's dtype, its copy in `delta_dtype`, the rows' gradients (R, T, D): None if not asked.

    R counts the needed ones of weight and bias, in this order. All inputs are contiguous, weight in its columns only.
    """
    B, N, D = total.shape
    padded, _, (block_n, warps) = layer_norm_tiles(D)
    slices = min(cdiv(N, block_n), cdiv(BACKWARD_PROGRAMS, max(B, 1)))
    grad_x = torch.empty(B, N, D, dtype=total.dtype, device=total.device) if need_x else None
    grad_delta = None if delta_dtype is None else torch.empty(B, N, D, dtype=delta_dtype, device=total.device)
    kinds = need_weight + need_bias
    partials = torch.empty(kinds, B, slices, D, dtype=torch.float32, device=total.device) if kinds else None
    if total.numel():
        _bwd_kernel[(B * slices,)](
            grad_out=grad_out,
            grad_total=grad_total,
            total=total,
            mean=mean,
            rstd=rstd,
            weight=weight,
            task_ids=task_ids,
            grad_x=grad_x,
            grad_delta=grad_delta,
            partial_weight=partials[0] if need_weight else None,
            partial_bias=partials[-1] if need_bias else None,
            N=N,
            T=weight.shape[0],
            slices=slices,
            weight_stride=row_stride(weight),
            D=D,
            BLOCK_N=block_n,
            BLOCK_D=padded,
            num_warps=warps,
        )
    return grad_x, grad_delta, reduce_partials(partials, weight, task_ids) if kinds else None
