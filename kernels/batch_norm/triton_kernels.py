"""Triton kernels of `batch_norm_act` and `batch_norm_act_train`: one pass forward, one backward, two by the batch's own
statistics. What adds up their partial sums, and the statistics, is in triton_sums.py.

    xhat = (x - mean) * rsqrt(var + eps);  pre = xhat * weight[t_b] + bias[t_b] + residual;  out = act(pre)
    g = d out * act'(pre) = d residual
    d weight[t], d bias[t] = g * xhat, g, summed over the pixels of task t's samples
    d x = rstd * weight[t_b] * g, and by the batch's own statistics rstd * (weight[t_b] * g - sum_0 - xhat * sum_1)
    where sum_0, sum_1 = means over the batch of weight[t_b] * g and weight[t_b] * g * xhat

Bytes, in units of B * C * H * W elements: forward reads x (and residual) and writes out: 2 (3); backward reads d out,
x (and residual) and writes d x (and d residual): 3 (5). By the batch's statistics backward reads twice: first for the
sums, which give both the rows' gradients and the channels' means, writing d residual; then for d x. Kept for backward:
x (and residual), mean and var; the activation's input is computed again.

A program works on tiles of one sample, (channels, pixels) or, channels-last, (pixels, channels): INNER is the one that
is contiguous. Sums: each program adds its slice of a sample in float32 into partials (B, S, C), which small kernels add
in a fixed order: no atomics, two runs are bit-equal. xhat comes from x, not from out: a weight may be zero.
"""

import triton
import triton.language as tl

from ..common.triton_activations import activate, activation_slope
from ..common.triton_rows import load_row, row_of_sample


@triton.jit
def _spread(b_row, CHANNELS_LAST: tl.constexpr):
    """A vector over a tile's channels, (1, channels) or (channels, 1)."""
    return b_row[None, :] if CHANNELS_LAST else b_row[:, None]


@triton.jit
def _tile(
    b,
    c,
    s,
    OUTER,
    INNER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Sample b's tile from channel c and pixel s: its start, in int64, its elements' offsets from there, its mask."""
    outer = s if CHANNELS_LAST else c
    inner = c if CHANNELS_LAST else s
    o_outer, o_inner = tl.arange(0, BLOCK_O)[:, None], tl.arange(0, BLOCK_I)[None, :]
    start = (b * OUTER + outer) * INNER + inner
    return start, o_outer * INNER + o_inner, (outer + o_outer < OUTER) & (inner + o_inner < INNER)


@triton.jit
def _rstd(var, row, stride, eps, o_c, C):
    """1 / sqrt(var + eps) of channels o_c; NaN for row -1."""
    return tl.rsqrt(load_row(var, row, stride, o_c, C) + tl.cast(eps, tl.float32))


@triton.jit
def _norm(weight, bias, mean, var, row, strides, eps, o_c, C, CHANNELS_LAST: tl.constexpr):
    """mean, rstd, rstd * weight and bias of channels o_c, spread; strides: of weight, of bias, of mean and var."""
    b_mean = _spread(load_row(mean, row, strides[2], o_c, C), CHANNELS_LAST)
    b_rstd = _spread(_rstd(var, row, strides[2], eps, o_c, C), CHANNELS_LAST)
    b_scale = _spread(load_row(weight, row, strides[0], o_c, C), CHANNELS_LAST) * b_rstd
    b_bias = _spread(load_row(bias, row, strides[1], o_c, C), CHANNELS_LAST)
    return b_mean, b_rstd, b_scale, b_bias


@triton.jit
def _batch_terms(sums, b_rstd, o_c, C, CHANNELS_LAST: tl.constexpr):
    """What d x loses since mean and var are those of the batch: a constant, and a slope over x - mean."""
    b_constant = _spread(tl.load(sums + o_c, mask=o_c < C, other=0.0), CHANNELS_LAST) * b_rstd
    b_slope = _spread(tl.load(sums + (C + o_c), mask=o_c < C, other=0.0), CHANNELS_LAST) * b_rstd * b_rstd
    return b_constant, b_slope


@triton.jit
def _grad_at(
    grad_out,
    x,
    residual,
    start,
    o_tile,
    m_tile,
    b_mean,
    b_scale,
    b_bias,
    ACT: tl.constexpr,
):
    """A tile's gradient in front of the activation, 0 outside, and x - mean."""
    b_grad = tl.load(grad_out + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)  # 0 outside: hides x there
    b_centred = tl.load(x + start + o_tile, mask=m_tile, other=0.0).to(tl.float32) - b_mean
    if ACT != "none":
        b_pre = b_centred * b_scale + b_bias
        if residual is not None:
            b_pre += tl.load(residual + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad *= activation_slope(b_pre, ACT)
    return b_grad, b_centred


@triton.jit
def _place(chunk, slices, C, BLOCK_C: tl.constexpr):
    """A program's slice of a sample: its line of partials, in int64, its first channel and its first tile."""
    tiles = tl.cdiv(C, BLOCK_C)
    line = tl.program_id(0) // tiles
    return line.to(tl.int64), (tl.program_id(0) % tiles) * BLOCK_C, line % slices * chunk


@triton.jit(do_not_specialize=["OUTER", "T"])
def _fwd_kernel(
    x,  # (B, OUTER, INNER)
    residual,  # (B, OUTER, INNER) or None
    weight,  # (T, C), rows weight_stride apart
    bias,  # (T, C), rows bias_stride apart
    task_ids,  # (B,) or None: sample b uses row b
    mean,  # (T, C) float32, rows stats_stride apart
    var,  # (T, C) float32, likewise
    out,  # (B, OUTER, INNER)
    OUTER,
    T,
    weight_stride,
    bias_stride,
    stats_stride,
    eps,
    INNER: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    C = INNER if CHANNELS_LAST else OUTER
    columns, rows = tl.cdiv(INNER, BLOCK_I), tl.cdiv(OUTER, BLOCK_O)
    b = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    outer, inner = tl.program_id(0) // columns % rows * BLOCK_O, tl.program_id(0) % columns * BLOCK_I
    c = inner if CHANNELS_LAST else outer
    s = outer if CHANNELS_LAST else inner
    o_c = c + tl.arange(0, BLOCK_I if CHANNELS_LAST else BLOCK_O)
    row = row_of_sample(task_ids, b, T)
    strides = (weight_stride, bias_stride, stats_stride)
    b_mean, _, b_scale, b_bias = _norm(weight, bias, mean, var, row, strides, eps, o_c, C, CHANNELS_LAST)
    start, o_tile, m_tile = _tile(b, c, s, OUTER, INNER, CHANNELS_LAST, BLOCK_O, BLOCK_I)
    b_x = tl.load(x + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_x = (b_x - b_mean) * b_scale + b_bias
    if residual is None:
        b_x = activate(b_x, ACT)
    else:
        b_residual = tl.load(residual + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_x = activate(b_x, ACT) + b_residual if RESIDUAL_AFTER else activate(b_x + b_residual, ACT)
    tl.store(out + start + o_tile, b_x.to(out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["OUTER", "T", "chunk", "slices"])
def _bwd_kernel(
    grad_out,  # (B, OUTER, INNER)
    x,  # (B, OUTER, INNER)
    residual,  # (B, OUTER, INNER), None where the activation does not see it
    weight,  # (T, C), rows weight_stride apart
    bias,  # (T, C), rows bias_stride apart
    task_ids,  # (B,) or None
    mean,  # (T, C) float32, rows stats_stride apart
    var,  # (T, C) float32, likewise
    sums,  # (2, C) float32: the batch's means of weight * g and weight * g * xhat, None where not needed
    grad_x,  # (B, OUTER, INNER), None where not needed
    grad_residual,  # (B, OUTER, INNER), None where it is grad_out or not needed
    partial_weight,  # (B, S, C) float32, None where not needed
    partial_bias,  # (B, S, C) float32, None where not needed
    OUTER,
    T,
    chunk,
    slices,
    weight_stride,
    bias_stride,
    stats_stride,
    eps,
    INNER: tl.constexpr,
    ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    C = INNER if CHANNELS_LAST else OUTER
    S = OUTER if CHANNELS_LAST else INNER
    BLOCK_C: tl.constexpr = BLOCK_I if CHANNELS_LAST else BLOCK_O
    BLOCK_S: tl.constexpr = BLOCK_O if CHANNELS_LAST else BLOCK_I
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    part, c, first = _place(chunk, slices, C, BLOCK_C)
    b, o_c = part // slices, c + tl.arange(0, BLOCK_C)
    row = row_of_sample(task_ids, b, T)
    strides = (weight_stride, bias_stride, stats_stride)
    b_mean, b_rstd, b_scale, b_bias = _norm(weight, bias, mean, var, row, strides, eps, o_c, C, CHANNELS_LAST)
    if sums is not None:
        b_constant, b_slope = _batch_terms(sums, b_rstd, o_c, C, CHANNELS_LAST)
    b_sum_weight, b_sum_bias = tl.zeros((BLOCK_O, BLOCK_I), tl.float32), tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for tile in range(first, tl.minimum(first + chunk, tl.cdiv(S, BLOCK_S))):
        start, o_tile, m_tile = _tile(b, c, tile * BLOCK_S, OUTER, INNER, CHANNELS_LAST, BLOCK_O, BLOCK_I)
        b_grad, b_centred = _grad_at(grad_out, x, residual, start, o_tile, m_tile, b_mean, b_scale, b_bias, ACT)
        if grad_residual is not None:
            tl.store(grad_residual + start + o_tile, b_grad.to(grad_residual.dtype.element_ty), mask=m_tile)
        if partial_weight is not None:
            b_sum_weight += b_grad * b_centred
        if partial_bias is not None:
            b_sum_bias += b_grad
        if grad_x is not None:
            b_grad *= b_scale
            if sums is not None:
                b_grad -= b_constant + b_centred * b_slope
            tl.store(grad_x + start + o_tile, b_grad.to(grad_x.dtype.element_ty), mask=m_tile)
    if partial_weight is not None:
        b_sum = tl.sum(b_sum_weight, axis=AXIS) * _rstd(var, row, stats_stride, eps, o_c, C)
        tl.store(partial_weight + part * C + o_c, b_sum, mask=o_c < C)
    if partial_bias is not None:
        tl.store(partial_bias + part * C + o_c, tl.sum(b_sum_bias, axis=AXIS), mask=o_c < C)
