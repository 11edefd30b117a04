"""Triton kernels that add: the batch norm's statistics, in two stages, and the batch's means for its backward.

    mean, var    = of each channel over batch and pixels: each slice of a sample gives a mean and the sum of squares M2
                   about it; Chan's formula combines them: M2 = sum M2_p + n_p (mean_p - mean)^2
    sum_0, sum_1 = means over the batch of weight[t_b] * g and weight[t_b] * g * xhat, from the rows' partials

The statistics read x once. Everything is added in a fixed order, in float32: two runs are bit-equal.
"""

import triton
import triton.language as tl

from .triton_kernels import _place, _spread, _tile


@triton.jit(do_not_specialize=["OUTER", "chunk", "slices"])
def _stats_kernel(
    x,  # (B, OUTER, INNER)
    partial_mean,  # (B, S, C) float32
    partial_m2,  # (B, S, C) float32: sum of squares about that mean
    OUTER,
    chunk,
    slices,
    INNER: tl.constexpr,
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
    b = part // slices
    b_mean, b_m2 = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for tile in range(first, tl.minimum(first + chunk, tl.cdiv(S, BLOCK_S))):
        s = tile * BLOCK_S
        start, o_tile, m_tile = _tile(b, c, s, OUTER, INNER, CHANNELS_LAST, BLOCK_O, BLOCK_I)
        b_x = tl.load(x + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        n = tl.minimum(S - s, BLOCK_S).to(tl.float32)
        b_tile_mean = tl.sum(b_x, axis=AXIS) / n
        b_x = tl.where(m_tile, b_x - _spread(b_tile_mean, CHANNELS_LAST), 0.0)
        b_shift = b_tile_mean - b_mean
        b_m2 += tl.sum(b_x * b_x, axis=AXIS) + b_shift * b_shift * (count * n / (count + n))
        count += n
        b_mean += b_shift * (n / count)
    o_c = c + tl.arange(0, BLOCK_C)
    tl.store(partial_mean + part * C + o_c, b_mean, mask=o_c < C)
    tl.store(partial_m2 + part * C + o_c, b_m2, mask=o_c < C)


@triton.jit
def _lines(first, P, o_c, C, BLOCK_P: tl.constexpr):
    """Lines from `first` of partials (P, C): their numbers, the elements' offsets and mask."""
    o_p = first + tl.arange(0, BLOCK_P)
    return o_p, o_p.to(tl.int64)[:, None] * C + o_c[None, :], (o_p < P)[:, None] & (o_c < C)[None, :]


@triton.jit(do_not_specialize=["S", "P", "chunk", "slices"])
def _combine_kernel(
    partial_mean,  # (P, C) float32, P = B * slices
    partial_m2,  # (P, C) float32
    mean,  # (C,) float32
    var,  # (C,) float32, biased
    S,
    P,
    chunk,
    slices,
    count,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum, b_m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32), tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        o_p, o_lines, m_lines = _lines(first, P, o_c, C, BLOCK_P)
        b_count = tl.minimum(S - (o_p % slices) * chunk, chunk).to(tl.float32)[:, None]
        b_sum += b_count * tl.load(partial_mean + o_lines, mask=m_lines, other=0.0)
    b_mean = tl.sum(b_sum, axis=0) / tl.cast(count, tl.float32)
    for first in range(0, P, BLOCK_P):
        o_p, o_lines, m_lines = _lines(first, P, o_c, C, BLOCK_P)
        b_count = tl.minimum(S - (o_p % slices) * chunk, chunk).to(tl.float32)[:, None]
        b_shift = tl.load(partial_mean + o_lines, mask=m_lines, other=0.0) - b_mean[None, :]
        b_m2 += tl.load(partial_m2 + o_lines, mask=m_lines, other=0.0)
        b_m2 += tl.where(m_lines, b_count * b_shift * b_shift, 0.0)
    tl.store(mean + o_c, b_mean, mask=o_c < C)
    tl.store(var + o_c, tl.sum(b_m2, axis=0) / tl.cast(count, tl.float32), mask=o_c < C)


@triton.jit(do_not_specialize=["P", "T", "slices"])
def _sums_kernel(
    partials,  # (2, P, C) float32: those of weight, then those of bias; P = B * slices
    weight,  # (T, C), rows weight_stride apart
    task_ids,  # (B,) or None
    sums,  # (2, C) float32: the means of weight * g, then those of weight * g * xhat
    P,
    T,
    slices,
    weight_stride,
    count,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sum = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        o_p, o_lines, m_lines = _lines(first, P, o_c, C, BLOCK_P)
        row = (o_p // slices).to(tl.int64)
        if task_ids is not None:
            row = tl.load(task_ids + row, mask=o_p < P, other=0).to(tl.int64)
            row = tl.where((row >= 0) & (row < T), row, -1)
        m_row = m_lines & (row >= 0)[:, None]
        b_weight = tl.load(weight + row[:, None] * weight_stride + o_c[None, :], mask=m_row, other=0.0).to(tl.float32)
        b_part = tl.load(partials + (1 - r) * P * C + o_lines, mask=m_lines, other=0.0)
        b_sum += tl.where(m_lines, b_weight * b_part, 0.0)
    tl.store(sums + r * C + o_c, tl.sum(b_sum, axis=0) / tl.cast(count, tl.float32), mask=o_c < C)
