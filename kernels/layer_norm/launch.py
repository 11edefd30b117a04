"""Launches of the layer norm's kernels: what is allocated, which grid."""

from typing import NamedTuple

import torch

from ..common.launch import cdiv, reduce_partials
from ..common.launcher import launch
from ..common.rows import Rows, row_stride
from ..tables import layer_norm_tiles
from .triton_kernels import _bwd_kernel, _fwd_kernel

BACKWARD_PROGRAMS = 512  # fewer samples are cut into slices; of 256 to 4,096 the best on an H100 (bench/results)


class Kept(NamedTuple):
    """What forward leaves to backward."""

    total: torch.Tensor  # (B, N, D)
    mean: torch.Tensor  # (B, N) float32
    rstd: torch.Tensor  # (B, N) float32
    weight: torch.Tensor  # (T, D), columns dense
    task_ids: torch.Tensor | None  # (B,)


class Needs(NamedTuple):
    """Which gradients backward is asked for."""

    x: bool
    delta_dtype: torch.dtype | None  # of a copy of x's gradient
    weight: bool
    bias: bool


def launch_forward(
    x: torch.Tensor, delta: torch.Tensor | None, rows: Rows, eps: float, out_dtype: torch.dtype, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """out (B, N, D), total (B, N, D) or None without delta, mean and rstd (B, N) or None where `keep` is false.

    x and delta are contiguous.
    """
    B, N, D = x.shape
    out = torch.empty_like(x) if out_dtype == x.dtype else torch.empty_like(x, dtype=out_dtype)
    total = None if delta is None else torch.empty_like(x)
    mean = torch.empty(B, N, dtype=torch.float32, device=x.device) if keep else None
    rstd = torch.empty(B, N, dtype=torch.float32, device=x.device) if keep else None
    padded, (block_n, warps), _ = layer_norm_tiles(D)
    tiles = cdiv(N, block_n)
    if out.numel():
        launch(
            _fwd_kernel,
            (B * tiles,),
            x=x,
            delta=delta,
            out=out,
            total=total,
            mean=mean,
            rstd=rstd,
            N=N,
            tiles=tiles,
            eps=eps,
            D=D,
            BLOCK_N=block_n,
            BLOCK_D=padded,
            num_warps=warps,
            **rows.arguments(),
        )
    return out, total, mean, rstd


def launch_backward(
    grad_out: torch.Tensor, grad_total: torch.Tensor | None, kept: Kept, needs: Needs
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_x (B, N, D) of total's dtype, its copy in `delta_dtype`, the rows' gradients (R, T, D): None if not asked.

    R counts the needed ones of weight and bias, in this order. All inputs are contiguous.
    """
    total, mean, rstd, weight, task_ids = kept
    B, N, D = total.shape
    padded, _, (block_n, warps) = layer_norm_tiles(D)
    slices = min(cdiv(N, block_n), cdiv(BACKWARD_PROGRAMS, max(B, 1)))
    grad_x = torch.empty_like(total) if needs.x else None
    grad_delta = None
    if needs.delta_dtype is not None:
        grad_delta = torch.empty(B, N, D, dtype=needs.delta_dtype, device=total.device)
    kinds = needs.weight + needs.bias
    partials = torch.empty(kinds, B, slices, D, dtype=torch.float32, device=total.device) if kinds else None
    if total.numel():
        launch(
            _bwd_kernel,
            (B * slices,),
            grad_out=grad_out,
            grad_total=grad_total,
            total=total,
            mean=mean,
            rstd=rstd,
            weight=weight,
            task_ids=task_ids,
            grad_x=grad_x,
            grad_delta=grad_delta,
            partial_weight=partials[0] if partials is not None and needs.weight else None,
            partial_bias=partials[-1] if partials is not None and needs.bias else None,
            N=N,
            T=weight.shape[0],
            slices=slices,
            weight_stride=row_stride(weight),
            D=D,
            BLOCK_N=block_n,
            BLOCK_D=padded,
            num_warps=warps,
        )
    return grad_x, grad_delta, None if partials is None else reduce_partials(partials, weight, task_ids)
