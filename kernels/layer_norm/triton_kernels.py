"""Triton kernels of `layer_norm` and `add_layer_norm`: one over the rows forward, one backward, and a small reduction.

    total = x + delta, rounded to x's dtype;  out = xhat * weight[t_b] + bias[t_b];  xhat = (total - mean) * rstd
    d x = d delta = rstd * (wg - mean(wg) - xhat * mean(wg * xhat)) + d total,  where wg = weight[t_b] * d out
    d weight[t], d bias[t] = d out * xhat, d out, summed over the tokens of task t's samples

Bytes, in units of B * N * D elements: forward reads x and delta and writes out and total: 4, without delta 2; backward
reads d out, d total and total and writes d x: 4. Each once. Kept for backward: total (x itself without delta), and mean
and rstd (B, N) in float32.

A program works on tiles of BLOCK_N tokens of one sample, so it loads one row of the table. The rows' gradients: each
program sums its slice of a sample in float32 into partials (B, S, D); `_reduce_kernel` adds the partials of each task's
samples in a fixed order: no atomics, two runs are bit-equal. xhat comes from total, not from out: a weight may be zero.
"""

import triton
import triton.language as tl

from ..common.triton_rows import load_row, row_of_sample


@triton.jit(do_not_specialize=["N", "T", "tiles"])
def _fwd_kernel(
    x,  # (B, N, D)
    delta,  # (B, N, D) or None
    weight,  # (T, D), rows weight_stride apart
    bias,  # (T, D), rows bias_stride apart
    task_ids,  # (B,) or None: sample b uses row b
    out,  # (B, N, D)
    total,  # (B, N, D), None without delta
    mean,  # (B, N), None where no backward will come
    rstd,  # (B, N), None likewise
    N,
    T,
    tiles,
    weight_stride,
    bias_stride,
    eps,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n, m_d = n + o_n < N, o_d < D
    m_tile = m_n[:, None] & m_d[None, :]
    start = (b * N + n) * D  # int64: a batch may hold more than 2^31 elements
    o_tile = o_n[:, None] * D + o_d[None, :]
    row = row_of_sample(task_ids, b, T)
    b_weight = load_row(weight, row, weight_stride, o_d, D)
    b_bias = load_row(bias, row, bias_stride, o_d, D)

    b_total = tl.load(x + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if delta is not None:
        b_total += tl.load(delta + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_rounded = b_total.to(total.dtype.element_ty)
        tl.store(total + start + o_tile, b_rounded, mask=m_tile)
        b_total = b_rounded.to(tl.float32)
    b_mean = tl.sum(b_total, axis=1) / D
    b_centred = tl.where(m_d[None, :], b_total - b_mean[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_centred * b_centred, axis=1) / D + tl.cast(eps, tl.float32))
    if mean is not None:
        tl.store(mean + (b * N + n) + o_n, b_mean, mask=m_n)
        tl.store(rstd + (b * N + n) + o_n, b_rstd, mask=m_n)
    b_out = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(out + start + o_tile, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["N", "T", "slices"])
def _bwd_kernel(
    grad_out,  # (B, N, D)
    grad_total,  # (B, N, D) or None
    total,  # (B, N, D)
    mean,  # (B, N)
    rstd,  # (B, N)
    weight,  # (T, D), rows weight_stride apart
    task_ids,  # (B,) or None
    grad_x,  # (B, N, D) in x's dtype, None where not needed
    grad_delta,  # (B, N, D) in delta's dtype, None where it is x's or not needed
    partial_weight,  # (B, S, D) float32, None where not needed
    partial_bias,  # (B, S, D) float32, None where not needed
    N,
    T,
    slices,
    weight_stride,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = (tl.program_id(0) // slices).to(tl.int64)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_tile = o_n[:, None] * D + o_d[None, :]
    b_weight = load_row(weight, row_of_sample(task_ids, b, T), weight_stride, o_d, D)
    b_sum_weight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_sum_bias = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(tl.program_id(0) % slices, tl.cdiv(N, BLOCK_N), slices):
        n = tile * BLOCK_N
        m_n = n + o_n < N
        m_tile = m_n[:, None] & m_d[None, :]
        start = (b * N + n) * D
        b_mean = tl.load(mean + (b * N + n) + o_n, mask=m_n, other=0.0)
        b_rstd = tl.load(rstd + (b * N + n) + o_n, mask=m_n, other=0.0)
        b_total = tl.load(total + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad = tl.load(grad_out + start + o_tile, mask=m_tile, other=0.0).to(
            tl.float32
        )  # 0 outside: hides xhat there
        b_xhat = (b_total - b_mean[:, None]) * b_rstd[:, None]
        if partial_weight is not None:
            b_sum_weight += b_grad * b_xhat
        if partial_bias is not None:
            b_sum_bias += b_grad
        if grad_x is not None or grad_delta is not None:
            b_grad *= b_weight[None, :]
            b_project = tl.sum(b_grad * b_xhat, axis=1) / D
            b_grad = (b_grad - (tl.sum(b_grad, axis=1) / D)[:, None] - b_xhat * b_project[:, None]) * b_rstd[:, None]
            if grad_total is not None:
                b_grad += tl.load(grad_total + start + o_tile, mask=m_tile, other=0.0).to(tl.float32)
            if grad_x is not None:
                tl.store(grad_x + start + o_tile, b_grad.to(grad_x.dtype.element_ty), mask=m_tile)
            if grad_delta is not None:
                tl.store(grad_delta + start + o_tile, b_grad.to(grad_delta.dtype.element_ty), mask=m_tile)
    o_partial = tl.program_id(0).to(tl.int64) * D + o_d
    if partial_weight is not None:
        tl.store(partial_weight + o_partial, tl.sum(b_sum_weight, axis=0), mask=m_d)
    if partial_bias is not None:
        tl.store(partial_bias + o_partial, tl.sum(b_sum_bias, axis=0), mask=m_d)
