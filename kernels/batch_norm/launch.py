"""Launches of the batch norm's kernels: what is allocated, which grid."""

import torch

from ..common.launch import cdiv, reduce_partials, row_stride
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
    _stats_kernel[(B * slices * programs,)](x=x, chunk=chunk, **partials, **layout)
    block_p, block_c, warps = COMBINE_CONFIG
    _combine_kernel[(cdiv(C, block_c),)](
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


def _norm_arguments(weight, bias, task_ids, mean, var, eps) -> dict:
    rows = {"weight": weight, "bias": bias, "task_ids": task_ids, "mean": mean, "var": var, "T": weight.shape[0]}
    strides = {"weight_stride": row_stride(weight), "bias_stride": row_stride(bias)}
    stats_stride = 0 if mean.dim() == 1 else row_stride(mean)
    return {**rows, **strides, "stats_stride": stats_stride, "eps": eps}


def launch_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    act: str,
    residual: torch.Tensor | None,
    residual_after_act: bool,
) -> torch.Tensor:
    """out (B, C, H, W), of x's dtype and format.

    x is dense, residual as x; columns of weight, bias, mean and var are contiguous; T is 1 or B where task_ids is None;
    mean and var are (C,) or (T, C) float32.
    """
    out = _empty_like(x)
    layout = _layout(x)
    if x.numel():
        tiles = cdiv(layout["OUTER"], layout["BLOCK_O"]) * cdiv(layout["INNER"], layout["BLOCK_I"])
        _fwd_kernel[(x.shape[0] * tiles,)](
            x=x,
            residual=residual,
            out=out,
            ACT=act,
            RESIDUAL_AFTER=residual_after_act,
            **_norm_arguments(weight, bias, task_ids, mean, var, eps),
            **layout,
        )
    return out


def launch_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    act: str,
    residual: torch.Tensor | None,
    is_batch: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_x and grad_residual (B, C, H, W), the rows' gradients (R, T, C): None if not asked.

    R counts the needed ones of weight and bias, in this order. `is_batch`: mean and var are those of x itself.
    grad_out and residual are dense as x is; `residual`: only where the activation sees it.
    """
    B, C = x.shape[:2]
    layout = _layout(x)
    _, chunk, slices, programs = _slices(x, layout) if x.numel() else (1, 1, 0, 1)  # of no slices the sum is 0
    two_passes = is_batch and need_x
    sum_weight, sum_bias = need_weight or two_passes, need_bias or two_passes
    kinds = sum_weight + sum_bias
    partials = torch.empty(kinds, B, slices, C, dtype=torch.float32, device=x.device) if kinds else None
    grad_x = _empty_like(x) if need_x else None
    grad_residual = _empty_like(x) if need_residual else None
    arguments = _norm_arguments(weight, bias, task_ids, mean, var, eps) | layout | {"chunk": chunk, "slices": slices}
    if x.numel():
        _bwd_kernel[(B * slices * programs,)](
            grad_out=grad_out,
            x=x,
            residual=residual,
            sums=None,
            grad_x=None if two_passes else grad_x,
            grad_residual=grad_residual,
            partial_weight=partials[0] if sum_weight else None,
            partial_bias=partials[-1] if sum_bias else None,
            ACT=act,
            **arguments,
        )
        if two_passes:
            has_g = grad_residual is not None  # g is written already: the second pass reads it
            _bwd_kernel[(B * slices * programs,)](
                grad_out=grad_residual if has_g else grad_out,
                x=x,
                residual=None if has_g else residual,
                sums=_channel_means(partials, weight, task_ids, x.numel() // C),
                grad_x=grad_x,
                grad_residual=None,
                partial_weight=None,
                partial_bias=None,
                ACT="none" if has_g else act,
                **arguments,
            )
    if not need_weight and not need_bias:
        return grad_x, grad_residual, None
    if two_passes:
        partials = partials[0 if need_weight else 1 : 2 if need_bias else 1]
    return grad_x, grad_residual, reduce_partials(partials, weight, task_ids)


def _channel_means(partials, weight, task_ids, count: int) -> torch.Tensor:
    """(2, C) float32: means over the batch of weight[t_b] * g, and of weight[t_b] * g * xhat."""
    _, B, slices, C = partials.shape
    sums = torch.empty(2, C, dtype=torch.float32, device=weight.device)
    block_p, block_c, warps = COMBINE_CONFIG
    _sums_kernel[(cdiv(C, block_c), 2)](
        partials=partials,
        weight=weight,
        task_ids=task_ids,
        sums=sums,
        P=B * slices,
        T=weight.shape[0],
        slices=slices,
        weight_stride=row_stride(weight),
        count=float(count),
        C=C,
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=warps,
    )
    return sums
