"""Launches of the batch norm's kernels: what is allocated, which grid."""

from typing import Any, NamedTuple

import torch

from ..common.launch import cdiv, reduce_partials
from ..common.launcher import launch
from ..common.rows import Rows, row_stride
from ..tables import COMBINE_CONFIG, batch_norm_tiles
from .triton_kernels import _bwd_kernel, _fwd_kernel
from .triton_sums import _combine_kernel, _stats_kernel, _sums_kernel

PROGRAMS = 1024  # enough to fill a large GPU; where samples and channels give fewer, pixels are cut into slices


def _layout(x: torch.Tensor) -> dict[str, int | bool]:
    """The arguments by which every kernel that streams activations finds its tiles, for x (B, C, H, W), dense."""
    C, S = x.shape[1], x.shape[2] * x.shape[3]
    last = S == 1 or not x.is_contiguous()  # of one pixel the channels are contiguous either way
    outer, inner = (S, C) if last else (C, S)
    block_o, block_i, warps = batch_norm_tiles(inner)
    blocks = {"BLOCK_O": block_o, "BLOCK_I": block_i, "num_warps": warps}
    return {"OUTER": outer, "INNER": inner, "CHANNELS_LAST": last, **blocks}


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of x's shape, dtype and format; x is dense."""
    B, C, H, W = x.shape
    if x.is_contiguous():
        return torch.empty(B, C, H, W, dtype=x.dtype, device=x.device)
    return torch.empty(B, H, W, C, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


def _slices(x: torch.Tensor, layout: dict) -> tuple[int, int, int, int]:
    """(pixels of a tile, tiles of a slice, slices of a sample, programs of a slice) where kernels add over pixels."""
    B, C, H, W = x.shape
    block_s, block_c = layout["BLOCK_O"], layout["BLOCK_I"]
    if not layout["CHANNELS_LAST"]:
        block_s, block_c = block_c, block_s
    tiles, programs = cdiv(H * W, block_s), cdiv(C, block_c)
    chunk = cdiv(tiles, min(tiles, cdiv(PROGRAMS, max(B * programs, 1))))
    return block_s, chunk, cdiv(tiles, chunk), programs


def launch_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) float32 of each channel of x (B, C, H, W), dense and not empty."""
    B, C, H, W = x.shape
    layout = _layout(x)
    block_s, chunk, slices, programs = _slices(x, layout)
    partial_mean, partial_m2 = (torch.empty(B * slices, C, dtype=torch.float32, device=x.device) for _ in range(2))
    mean, var = (torch.empty(C, dtype=torch.float32, device=x.device) for _ in range(2))
    partials = {"partial_mean": partial_mean, "partial_m2": partial_m2, "slices": slices}
    launch(_stats_kernel, (B * slices * programs,), x=x, chunk=chunk, **partials, **layout)
    block_p, block_c, warps = COMBINE_CONFIG
    launch(
        _combine_kernel,
        (cdiv(C, block_c),),
        mean=mean,
        var=var,
        S=H * W,
        chunk=chunk * block_s,
        P=B * slices,
        count=float(B * H * W),
        C=C,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=warps,
        **partials,
    )
    return mean, var


class Norm(NamedTuple):
    """What a batch is normalised by."""

    rows: Rows
    mean: torch.Tensor  # (C,) or (T, C) float32, columns dense
    var: torch.Tensor  # likewise
    eps: float
    act: str

    def arguments(self) -> dict[str, Any]:
        """What every kernel that normalises takes of it."""
        stride = 0 if self.mean.dim() == 1 else row_stride(self.mean)
        statistics = {"mean": self.mean, "var": self.var, "stats_stride": stride, "eps": self.eps}
        return {**self.rows.arguments(), **statistics}


class Needs(NamedTuple):
    """Which gradients backward is asked for."""

    x: bool
    weight: bool
    bias: bool
    residual: bool


def launch_forward(
    x: torch.Tensor, norm: Norm, residual: torch.Tensor | None, residual_after_act: bool
) -> torch.Tensor:
    """out (B, C, H, W), of x's dtype and format; x is dense, residual as x."""
    out = _empty_like(x)
    layout = _layout(x)
    if x.numel():
        tiles = cdiv(layout["OUTER"], layout["BLOCK_O"]) * cdiv(layout["INNER"], layout["BLOCK_I"])
        launch(
            _fwd_kernel,
            (x.shape[0] * tiles,),
            x=x,
            residual=residual,
            out=out,
            ACT=norm.act,
            RESIDUAL_AFTER=residual_after_act,
            **norm.arguments(),
            **layout,
        )
    return out


def launch_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None,
    is_batch: bool,
    needs: Needs,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_x and grad_residual (B, C, H, W), the rows' gradients (R, T, C): None if not asked.

    R counts the needed ones of weight and bias, in this order. `is_batch`: mean and var are those of x itself: then
    grad_x takes two passes, of which the first adds up what the second subtracts.
    grad_out and residual are dense as x is; `residual`: only where the activation sees it.
    """
    B, C = x.shape[:2]
    layout = _layout(x)
    slices = _slices(x, layout)[2] if x.numel() else 0  # of no slices the sum is 0
    two_passes = is_batch and needs.x
    sum_weight, sum_bias = needs.weight or two_passes, needs.bias or two_passes
    kinds = sum_weight + sum_bias
    partials = torch.empty(kinds, B, slices, C, dtype=torch.float32, device=x.device) if kinds else None
    grad_x = _empty_like(x) if needs.x else None
    grad_residual = _empty_like(x) if needs.residual else None
    if x.numel():
        _launch_pass(
            grad_out,
            x,
            norm,
            residual,
            grad_x=None if two_passes else grad_x,
            grad_residual=grad_residual,
            partial_weight=partials[0] if partials is not None and sum_weight else None,
            partial_bias=partials[-1] if partials is not None and sum_bias else None,
        )
        if partials is not None and two_passes:
            sums = _channel_means(partials, norm.rows, x.numel() // C)
            if grad_residual is None:
                _launch_pass(grad_out, x, norm, residual, sums=sums, grad_x=grad_x)
            else:  # what passed the activation is written already
                _launch_pass(grad_residual, x, norm._replace(act="none"), None, sums=sums, grad_x=grad_x)
    if partials is None or not (needs.weight or needs.bias):
        return grad_x, grad_residual, None
    if two_passes:
        partials = partials[0 if needs.weight else 1 : 2 if needs.bias else 1]
    return grad_x, grad_residual, reduce_partials(partials, norm.rows.weight, norm.rows.task_ids)


def _launch_pass(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    residual: torch.Tensor | None,
    sums: torch.Tensor | None = None,
    grad_x: torch.Tensor | None = None,
    grad_residual: torch.Tensor | None = None,
    partial_weight: torch.Tensor | None = None,
    partial_bias: torch.Tensor | None = None,
) -> None:
    """One pass of backward, which writes the outputs that it is given."""
    layout = _layout(x)
    _, chunk, slices, programs = _slices(x, layout)
    launch(
        _bwd_kernel,
        (x.shape[0] * slices * programs,),
        grad_out=grad_out,
        x=x,
        residual=residual,
        sums=sums,
        grad_x=grad_x,
        grad_residual=grad_residual,
        partial_weight=partial_weight,
        partial_bias=partial_bias,
        chunk=chunk,
        slices=slices,
        ACT=norm.act,
        **norm.arguments(),
        **layout,
    )


def _channel_means(partials: torch.Tensor, rows: Rows, count: int) -> torch.Tensor:
    """(2, C) float32: means over the batch of weight[t_b] * g, and of weight[t_b] * g * xhat."""
    _, B, slices, C = partials.shape
    sums = torch.empty(2, C, dtype=torch.float32, device=partials.device)
    block_p, block_c, warps = COMBINE_CONFIG
    launch(
        _sums_kernel,
        (cdiv(C, block_c), 2),
        partials=partials,
        weight=rows.weight,
        task_ids=rows.task_ids,
        sums=sums,
        P=B * slices,
        T=rows.weight.shape[0],
        slices=slices,
        weight_stride=row_stride(rows.weight),
        count=float(count),
        C=C,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return sums
