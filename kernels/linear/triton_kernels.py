"""Triton kernels of `linear_gelu` and `linear_add`: products with their epilogues, and the passes of their backward.

    linear_gelu: out = GELU(x w^T + b);  backward: d pre = d out * GELU'(pre), d b = column sums of d pre
    linear_add:  out = residual + keep[b] * scale[d] * (x w^T + b);  backward: d y = keep * scale * d out

Rows are tokens of the whole batch: M = B * N. Bytes, beside the reads of x and w that tiling repeats: the forwards
read residual once and write out once, and what is kept for backward (pre, y) once; backward reads d out and pre or y
once and writes d pre or d y once. `_linear_gelu_bwd_kernel` computes pre again instead, in the accumulators of the same
product. Epilogues are float32; out comes from the unrounded product whether pre is kept or not.

Column sums: every program sums its rows in float32 into its own line of partials; the lines are added by torch.sum. No
atomics, two runs are bit-equal. y is kept, not rebuilt from out - residual: a scale may be zero.
"""

import triton
import triton.language as tl

from ..common.triton_activations import gelu_slope, normal_cdf
from ..common.triton_rows import load_columns


@triton.jit
def _tile(M, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and first column of this program's tile: GROUP_M row tiles take the columns together and share L2."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * columns)
    within = tl.program_id(0) % (GROUP_M * columns)
    height = min(rows - group * GROUP_M, GROUP_M)
    row, column = group * GROUP_M + within % height, within // height
    return row.to(tl.int64) * BLOCK_M, column.to(tl.int64) * BLOCK_N


@triton.jit
def _linear(
    x,
    weight,
    bias,
    m,
    n,
    M,
    F,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows from m of x times rows from n of weight, transposed, and bias: (BLOCK_M, BLOCK_N) float32."""
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_x, m_weight = (m + o_m < M)[:, None], (n + o_n < F)[None, :]
    o_x = o_m[:, None] * K + o_k[None, :]
    o_weight = o_n[None, :] * K + o_k[:, None]
    b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            b_x = tl.load(x + m * K + (o_x + k), mask=m_x, other=0.0)
            b_weight = tl.load(weight + n * K + (o_weight + k), mask=m_weight, other=0.0)
        else:
            m_k = k + o_k < K
            b_x = tl.load(x + m * K + (o_x + k), mask=m_x & m_k[None, :], other=0.0)
            b_weight = tl.load(weight + n * K + (o_weight + k), mask=m_weight & m_k[:, None], other=0.0)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)
    if bias is not None:
        b_out += load_columns(bias, n, F, BLOCK_N)
    return b_out


@triton.jit(do_not_specialize=["M"])
def _linear_gelu_kernel(
    x,  # (M, K)
    weight,  # (F, K)
    bias,  # (F,) or None
    out,  # (M, F)
    pre,  # (M, F), None where it is not kept
    M,
    F,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = _tile(M, F, BLOCK_M, BLOCK_N, GROUP_M)
    b_pre = _linear(x, weight, bias, m, n, M, F, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    o_m, o_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_tile = (m + o_m < M) & (n + o_n < F)
    o_tile = o_m * F + o_n
    if pre is not None:
        tl.store(pre + (m * F + n) + o_tile, b_pre.to(pre.dtype.element_ty), mask=m_tile)
    b_out = b_pre * normal_cdf(b_pre)
    tl.store(out + (m * F + n) + o_tile, b_out.to(out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["M"])
def _linear_gelu_bwd_kernel(
    x,  # (M, K)
    weight,  # (F, K)
    bias,  # (F,) or None
    grad_out,  # (M, F)
    grad_pre,  # (M, F)
    partial_bias,  # (row tiles, F) float32, None where not needed
    M,
    F,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = _tile(M, F, BLOCK_M, BLOCK_N, GROUP_M)
    b_pre = _linear(x, weight, bias, m, n, M, F, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    o_m, o_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_tile = (m + o_m < M) & (n + o_n < F)
    o_tile = o_m * F + o_n
    b_grad = tl.load(grad_out + (m * F + n) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_grad *= gelu_slope(b_pre)
    tl.store(grad_pre + (m * F + n) + o_tile, b_grad.to(grad_pre.dtype.element_ty), mask=m_tile)
    if partial_bias is not None:
        o_n = tl.arange(0, BLOCK_N)
        o_partial = (m // BLOCK_M) * F + n
        tl.store(partial_bias + o_partial + o_n, tl.sum(b_grad, axis=0), mask=n + o_n < F)


@triton.jit(do_not_specialize=["M", "slices"])
def _gelu_bwd_kernel(
    grad_out,  # (M, F)
    pre,  # (M, F)
    grad_pre,  # (M, F)
    partial_bias,  # (S, F) float32, None where not needed
    M,
    slices,
    F,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m, o_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)
    part = (tl.program_id(0) % slices).to(tl.int64)
    n = (tl.program_id(0) // slices).to(tl.int64) * BLOCK_N
    m_n = n + o_n < F
    o_tile = o_m * F + o_n[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK_M), slices):
        m = tile * BLOCK_M
        m_tile = (m + o_m < M) & m_n[None, :]
        b_pre = tl.load(pre + (m * F + n) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad = tl.load(grad_out + (m * F + n) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_grad *= gelu_slope(b_pre)
        tl.store(grad_pre + (m * F + n) + o_tile, b_grad.to(grad_pre.dtype.element_ty), mask=m_tile)
        b_sum += b_grad
    if partial_bias is not None:
        tl.store(partial_bias + (part * F + n) + o_n, tl.sum(b_sum, axis=0), mask=m_n)


@triton.jit
def _kept(keep, m, o_m, M, N):
    """keep of each row's sample, float32; rows from m, N rows a sample."""
    sample = m // N
    o_sample = ((m - sample * N).to(tl.int32) + o_m) // N
    return tl.load(keep + sample + o_sample, mask=m + o_m < M, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M", "N"])
def _linear_add_kernel(
    x,  # (M, K)
    weight,  # (F, K)
    bias,  # (F,) or None
    residual,  # (M, F)
    scale,  # (F,) or None
    keep,  # (M / N,) or None
    out,  # (M, F)
    y,  # (M, F), None where it is not kept
    M,
    N,
    F,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = _tile(M, F, BLOCK_M, BLOCK_N, GROUP_M)
    b_y = _linear(x, weight, bias, m, n, M, F, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    o_m, o_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    m_tile = (m + o_m < M) & (n + o_n < F)
    o_tile = o_m * F + o_n
    if y is not None:
        tl.store(y + (m * F + n) + o_tile, b_y.to(y.dtype.element_ty), mask=m_tile)
    if scale is not None:
        b_y *= load_columns(scale, n, F, BLOCK_N)
    if keep is not None:
        b_y *= _kept(keep, m, o_m, M, N)
    b_y += tl.load(residual + (m * F + n) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(out + (m * F + n) + o_tile, b_y.to(out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["M", "N", "slices"])
def _linear_add_bwd_kernel(
    grad_out,  # (M, F)
    y,  # (M, F), None unless scale's gradient is needed
    scale,  # (F,) or None
    keep,  # (M / N,) or None
    grad_y,  # (M, F) in x's dtype, None where it is grad_out or not needed
    partial_bias,  # (S, F) float32, None where not needed
    partial_scale,  # (S, F) float32, None where not needed
    M,
    N,
    slices,
    F,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m, o_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)
    part = (tl.program_id(0) % slices).to(tl.int64)
    n = (tl.program_id(0) // slices).to(tl.int64) * BLOCK_N
    m_n = n + o_n < F
    o_tile = o_m * F + o_n[None, :]
    b_sum_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_sum_scale = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(part, tl.cdiv(M, BLOCK_M), slices):
        m = tile * BLOCK_M
        m_tile = (m + o_m < M) & m_n[None, :]
        b_grad = tl.load(grad_out + (m * F + n) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        if keep is not None:
            b_grad *= _kept(keep, m, o_m, M, N)
        if partial_scale is not None:
            b_sum_scale += b_grad * tl.load(y + (m * F + n) + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        if scale is not None:
            b_grad *= load_columns(scale, n, F, BLOCK_N)
        if grad_y is not None:
            tl.store(grad_y + (m * F + n) + o_tile, b_grad.to(grad_y.dtype.element_ty), mask=m_tile)
        b_sum_bias += b_grad
    if partial_bias is not None:
        tl.store(partial_bias + (part * F + n) + o_n, tl.sum(b_sum_bias, axis=0), mask=m_n)
    if partial_scale is not None:
        tl.store(partial_scale + (part * F + n) + o_n, tl.sum(b_sum_scale, axis=0), mask=m_n)
