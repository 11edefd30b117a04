"""Sensitivity of the kernels' tests: each mutation is one small mistake in a kernel, and some test must notice it.

    python tests/mutations.py [--only PATTERN]      # all of them take about half an hour on one core

A mutation replaces a text that occurs once in a function, in a copy of the project, never in the checkout; the tests of
that kernel then run in Triton's interpreter, in a child process that finds torch and timm already imported. The exit
status is 1 if a mutation survives. One that changes neither a value nor an access is no mistake and not listed.
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
NORM_TESTS = ("tests/test_kernel_bytes.py", "tests/test_layer_norm.py")  # the quick ones first
LINEAR_TESTS = ("tests/test_linear_bytes.py", "tests/test_linear.py")
BATCH_TESTS = ("tests/test_batch_norm_bytes.py", "tests/test_batch_norm.py")
TESTS = {
    "layer_norm_triton": NORM_TESTS,
    "layer_norm_launch": NORM_TESTS,
    "layer_norm_op": NORM_TESTS,
    "linear_triton": LINEAR_TESTS,
    "linear_launch": LINEAR_TESTS,
    "linear_op": LINEAR_TESTS,
    "batch_norm_triton": BATCH_TESTS,
    "batch_norm_sums_triton": BATCH_TESTS,
    "batch_norm_launch": BATCH_TESTS,
    "batch_norm_op": BATCH_TESTS,
}
MUTATIONS = {  # module of kernels/: function: (text, what replaces it)
    "layer_norm_triton": {
        "_row_of_sample": (
            ("row = b\n", "row = b * 0\n"),
            ("task_ids + b)", "task_ids)"),
            ("(row < T)", "(row <= T)"),
            ("row, -1)", "row, 0)"),
        ),
        "_load_row": (
            ("row * stride", "row * D"),
            ("(o_d < D) & (row >= 0)", "row >= 0"),
            ("(o_d < D) & (row >= 0)", "o_d < D"),
            ('float("nan")', "0.0"),
        ),
        "_fwd_kernel": (
            ("(tl.program_id(0) // tiles).to(tl.int64)", "tl.program_id(0) // tiles"),
            ("% tiles) * BLOCK_N", "% tiles)"),
            ("n + o_n < N", "n + o_n <= N"),
            ("n + o_n < N", "n + o_n < N - 1"),
            ("(b * N + n) * D", "b * N * D"),
            ("o_n[:, None] * D", "o_n[:, None] * BLOCK_D"),
            ("_load_row(weight, row, weight_stride", "_load_row(weight, 0, weight_stride"),
            ("_load_row(weight, row, weight_stride", "_load_row(weight, row, bias_stride"),
            ("_load_row(bias, row, bias_stride", "_load_row(bias, row, weight_stride"),
            ("_load_row(bias, row, bias_stride", "_load_row(weight, row, bias_stride"),
            ("tl.load(x + start + o_tile, mask=m_tile", "tl.load(x + start + o_tile, mask=m_n[:, None]"),
            ("b_total += tl.load(delta", "b_total = tl.load(delta"),
            ("b_total = b_rounded.to(tl.float32)", "b_total = b_total.to(tl.float32)"),
            ("b_mean = tl.sum(b_total, axis=1) / D", "b_mean = tl.sum(b_total, axis=1) / BLOCK_D"),
            ("tl.where(m_d[None, :], b_total - b_mean[:, None], 0.0)", "b_total - b_mean[:, None]"),
            ("axis=1) / D + tl.cast", "axis=1) / (D - 1) + tl.cast"),
            ("tl.cast(eps, tl.float32)", "1e-6"),
            ("tl.store(mean + (b * N + n)", "tl.store(mean + (b * N)"),
            ("b_mean, mask=m_n", "b_mean, mask=o_n >= 0"),
            ("b_rstd, mask=m_n", "b_mean, mask=m_n"),
            ("* b_weight[None, :] + b_bias", "+ b_bias"),
            (" + b_bias[None, :]", ""),
            ("b_rounded, mask=m_tile", "b_rounded, mask=m_n[:, None]"),
            ("b_out.to(out.dtype.element_ty), mask=m_tile", "b_out.to(out.dtype.element_ty), mask=m_n[:, None]"),
        ),
        "_bwd_kernel": (
            ("(tl.program_id(0) // slices).to(tl.int64)", "tl.program_id(0) // slices"),
            ("_row_of_sample(task_ids, b, T)", "0"),
            ("range(tl.program_id(0) % slices,", "range(0,"),
            ("tl.cdiv(N, BLOCK_N)", "N // BLOCK_N"),
            ("m_n = n + o_n < N", "m_n = n + o_n <= N"),
            ("start = (b * N + n) * D", "start = n * D"),
            ("b_mean = tl.load(mean + (b * N + n)", "b_mean = tl.load(mean + (b * N)"),
            ("tl.load(grad_out + start + o_tile, mask=m_tile", "tl.load(grad_out + start + o_tile, mask=m_n[:, None]"),
            ("(b_total - b_mean[:, None]) * b_rstd[:, None]", "b_total * b_rstd[:, None]"),
            ("b_sum_weight += b_grad * b_xhat", "b_sum_weight = b_grad * b_xhat"),
            ("b_sum_bias += b_grad", "b_sum_bias = b_grad"),
            ("b_grad *= b_weight[None, :]", "b_grad *= 1.0"),
            ("axis=1) / D\n", "axis=1) / BLOCK_D\n"),
            ("(tl.sum(b_grad, axis=1) / D)", "(tl.sum(b_grad, axis=1) / BLOCK_D)"),
            (" - b_xhat * b_project[:, None]) * b_rstd", ") * b_rstd"),
            ("b_project[:, None]) * b_rstd[:, None]", "b_project[:, None])"),
            ("b_grad += tl.load(grad_total", "b_grad -= tl.load(grad_total"),
            ("b_grad.to(grad_x.dtype.element_ty), mask=m_tile", "b_grad.to(grad_x.dtype.element_ty)"),
            ("tl.program_id(0).to(tl.int64) * D + o_d", "(tl.program_id(0) // slices).to(tl.int64) * D + o_d"),
            ("tl.sum(b_sum_weight, axis=0), mask=m_d", "tl.sum(b_sum_weight, axis=0), mask=o_d >= 0"),
            ("tl.sum(b_sum_bias, axis=0)", "tl.sum(b_sum_weight, axis=0)"),
        ),
        "_reduce_kernel": (
            ("tl.program_id(1) * BLOCK_D +", "tl.program_id(1) +"),
            ("m_d = o_d < D", "m_d = o_d <= D"),
            ("range(0, B, BLOCK_B)", "range(0, BLOCK_B, BLOCK_B)"),
            ("m_b = o_b < B", "m_b = o_b <= B"),
            ("== task", ">= task"),
            ("m_b &= tl.load", "m_b |= tl.load"),
            ("(r * B + o_b.to(tl.int64))", "o_b.to(tl.int64)"),
            ("range(slices)", "range(1)"),
            ("o_partial + s * D", "o_partial"),
            ("b_sum += tl.load", "b_sum = tl.load"),
            ("m_b[:, None] & m_d[None, :]", "m_b[:, None]"),
            ("(r * T + task) * D", "r * T * D"),
        ),
    },
    "layer_norm_launch": {
        "_row_stride": (("0 if table.shape[0] == 1 else table.stride(0)", "table.stride(0)"),),
        "launch_forward": (
            (
                "total = None if delta is None else torch.empty(B, N, D, dtype=x.dtype",
                "total = None if delta is None else torch.empty(B, N, D, dtype=out_dtype",
            ),
            (
                "mean = torch.empty(B, N, dtype=torch.float32, device=x.device) if keep else None",
                "mean = torch.empty(B, N, dtype=torch.float32, device=x.device)",
            ),
            ("_blocks(N, block_n)", "N // block_n"),
            ("weight_stride=_row_stride(weight)", "weight_stride=D"),
            ("bias_stride=_row_stride(bias)", "bias_stride=_row_stride(weight)"),
            ("eps=eps", "eps=1e-6"),
        ),
        "launch_backward": (
            ("min(_blocks(N, block_n),", "min(_blocks(N, block_n) + 1,"),
            ("dtype=delta_dtype", "dtype=total.dtype"),
            ("kinds = need_weight + need_bias", "kinds = 2"),
            ("partials[0] if need_weight", "partials[-1] if need_weight"),
            ("partials[-1] if need_bias", "partials[0] if need_bias"),
            ("if need_x else None", "if True else None"),
            ("weight_stride=_row_stride(weight)", "weight_stride=D"),
        ),
        "_reduce": (
            ("(1, 2) if weight.shape[0] == 1 else 2", "(1, 2) if weight.shape[0] == 1 else 1"),
            ("_blocks(D, block_d), kinds", "_blocks(D, block_d), 1"),
            ("(T, _blocks", "(T - 1, _blocks"),
        ),
    },
    "layer_norm_op": {
        "_forward": (
            ("x.contiguous(), ", "x, "),
            ("_contiguous(delta)", "delta"),
            ("weight, bias = _dense_columns(weight), _dense_columns(bias)", "weight = _dense_columns(weight)"),
        ),
        "_backward": (
            ("grad_out.contiguous(), ", "grad_out, "),
            ("_contiguous(grad_total)", "grad_total"),
            ("_dense_columns(weight)", "weight"),
        ),
        "_setup_context": (("x if delta is None else total", "x"),),
        "_gradients": (
            ("need_x or same", "need_x"),
            ("grad_x if same else grad_delta", "grad_x"),
            ("grad_rows[-1] if need_bias", "grad_rows[0] if need_bias"),
        ),
        "fused_layer_norm": (("torch.is_grad_enabled() and any", "any"),),
    },
    "linear_triton": {
        "_tile": (
            ("// (GROUP_M * columns)", "// GROUP_M"),
            ("% (GROUP_M * columns)", "% GROUP_M"),
            ("min(rows - group * GROUP_M, GROUP_M)", "GROUP_M"),
            ("group * GROUP_M + within", "within"),
            ("within % height, within // height", "within // height, within % height"),
            ("row.to(tl.int64) * BLOCK_M", "row * BLOCK_M"),
            ("column.to(tl.int64) * BLOCK_N", "column.to(tl.int64) * BLOCK_M"),
        ),
        "_columns": (
            ("n + tl.arange", "tl.arange"),
            ("o_n < F", "o_n <= F"),
        ),
        "_linear": (
            ("m + o_m < M", "m + o_m <= M"),
            ("m + o_m < M", "m + o_m < M - 1"),
            ("n + o_n < F", "n + o_n <= F"),
            ("o_m[:, None] * K", "o_m[:, None] * BLOCK_K"),
            ("range(0, K, BLOCK_K)", "range(BLOCK_K, K, BLOCK_K)"),
            ("K % BLOCK_K == 0", "K >= BLOCK_K"),
            ("k + o_k < K", "k + o_k <= K"),
            ("mask=m_x & m_k[None, :]", "mask=m_x"),
            ("mask=m_weight & m_k[:, None]", "mask=m_weight"),
            ("weight + n * K + (o_weight + k), mask=m_weight, ", "weight + (o_weight + k), mask=m_weight, "),
            ("x + m * K + (o_x + k), mask=m_x & ", "x + m * K + o_x, mask=m_x & "),
            ("tl.dot(b_x, b_weight, b_out, ", "tl.dot(b_x, b_weight, "),
            ("b_out += _columns(bias, n, F, BLOCK_N)", "b_out += _columns(bias, 0, F, BLOCK_N)"),
            ("b_out += _columns(bias, n, F, BLOCK_N)", "pass"),
        ),
        "_normal_cdf": (("0.7071067811865476", "0.7071"), ("1.0 + tl.erf", "tl.erf")),
        "_gelu_slope": (
            ("0.3989422804014327", "0.3989"),
            ("-0.5 * b_z", "0.5 * b_z"),
            ("_normal_cdf(b_z) + b_z *", "_normal_cdf(b_z) +"),
        ),
        "_linear_gelu_kernel": (
            ("m + o_m < M", "m + o_m < M - 1"),
            ("(m + o_m < M) & (n + o_n < F)", "m + o_m < M"),
            ("o_m * F + o_n", "o_m * K + o_n"),
            ("pre + (m * F + n)", "pre + m * F"),
            ("b_pre.to(pre.dtype.element_ty), mask=m_tile", "b_pre.to(pre.dtype.element_ty)"),
            ("b_pre * _normal_cdf(b_pre)", "b_pre * _normal_cdf(-b_pre)"),
            ("b_pre * _normal_cdf(b_pre)", "b_pre"),
            ("out + (m * F + n)", "out + m * F"),
            ("b_out.to(out.dtype.element_ty), mask=m_tile", "b_out.to(out.dtype.element_ty)"),
        ),
        "_linear_gelu_bwd_kernel": (
            ("(m + o_m < M) & (n + o_n < F)", "n + o_n < F"),
            ("grad_out + (m * F + n)", "grad_out + m * F"),
            ("mask=m_tile, other=0.0", "mask=m_tile, other=1.0"),
            ("b_grad *= _gelu_slope(b_pre)", "b_grad *= _normal_cdf(b_pre)"),
            ("grad_pre + (m * F + n)", "grad_pre + m * F"),
            ("b_grad.to(grad_pre.dtype.element_ty), mask=m_tile", "b_grad.to(grad_pre.dtype.element_ty)"),
            ("(m // BLOCK_M) * F + n", "n"),
            ("tl.sum(b_grad, axis=0), mask=n + o_n < F", "tl.sum(b_grad, axis=0)"),
        ),
        "_gelu_bwd_kernel": (
            ("(tl.program_id(0) // slices)", "(tl.program_id(0) % slices)"),
            ("m_n = n + o_n < F", "m_n = n + o_n <= F"),
            ("range(part,", "range(0,"),
            ("tl.cdiv(M, BLOCK_M)", "M // BLOCK_M"),
            ("(m + o_m < M) & m_n", "m_n"),
            ("grad_out + (m * F + n)", "grad_out + n"),
            (
                "mask=m_tile, other=0.0).to(tl.float32)\n        b_grad *=",
                "mask=m_tile, other=1.0).to(tl.float32)\n        b_grad *=",
            ),
            ("b_grad *= _gelu_slope(b_pre)", "b_grad *= _normal_cdf(b_pre)"),
            ("b_sum += b_grad", "b_sum = b_grad"),
            ("part * F + n", "n"),
            ("tl.sum(b_sum, axis=0), mask=m_n", "tl.sum(b_sum, axis=0)"),
        ),
        "_kept": (
            ("sample = m // N", "sample = m * 0"),
            ("m - sample * N", "m"),
            (" + o_m) // N", ") // N"),
            ("keep + sample + o_sample", "keep + sample"),
            ("m + o_m < M", "m + o_m <= M"),
        ),
        "_linear_add_kernel": (
            ("(m + o_m < M) & (n + o_n < F)", "m + o_m < M"),
            ("y + (m * F + n)", "y + m * F"),
            ("b_y.to(y.dtype.element_ty), mask=m_tile", "b_y.to(y.dtype.element_ty)"),
            ("b_y *= _columns(scale, n, F, BLOCK_N)", "b_y *= _columns(scale, 0, F, BLOCK_N)"),
            ("b_y *= _columns(scale, n, F, BLOCK_N)", "pass"),
            ("b_y *= _kept(keep, m, o_m, M, N)", "b_y *= _kept(keep, m * 0, o_m, M, N)"),
            ("b_y *= _kept(keep, m, o_m, M, N)", "pass"),
            ("b_y += tl.load(residual", "b_y = tl.load(residual"),
            ("residual + (m * F + n)", "residual + n"),
            ("out + (m * F + n)", "out + m * F"),
        ),
        "_linear_add_bwd_kernel": (
            ("m_n = n + o_n < F", "m_n = n + o_n <= F"),
            ("range(part,", "range(0,"),
            ("tl.cdiv(M, BLOCK_M)", "M // BLOCK_M"),
            ("(m + o_m < M) & m_n", "m_n"),
            ("b_grad *= _kept(keep, m, o_m, M, N)", "pass"),
            ("b_sum_scale += ", "b_sum_scale = "),
            ("tl.load(y + (m * F + n)", "tl.load(y + n"),
            ("b_grad *= _columns(scale, n, F, BLOCK_N)", "pass"),
            ("b_sum_bias += b_grad", "b_sum_bias = b_grad"),
            ("partial_scale + (part * F + n)", "partial_scale + n"),
            ("tl.sum(b_sum_scale, axis=0)", "tl.sum(b_sum_bias, axis=0)"),
            ("tl.sum(b_sum_bias, axis=0), mask=m_n", "tl.sum(b_sum_bias, axis=0)"),
        ),
    },
    "linear_launch": {
        "_precision": (
            ('"tf32" if allowed else "ieee"', '"ieee"'),
            ("dtype != torch.float32 or ", ""),
        ),
        "_product_options": (
            ("_blocks(rows, tiles.block_m)", "(rows // tiles.block_m)"),
            ("_blocks(F, tiles.block_n)", "(F // tiles.block_n)"),
        ),
        "launch_linear_gelu": (("if keep_pre else None", "if True else None"), ("pre=pre", "pre=None")),
        "launch_linear_gelu_backward": (
            ("if need_bias else None\n        if grad_out", "if True else None\n        if grad_out"),
            ('_blocks(options["M"], tiles.block_m)', '_blocks(options["M"], tiles.block_m) + 1'),
            ("partial.sum(0)", "partial[0]"),
            ("dtype=x.dtype", "dtype=torch.float32"),
        ),
        "_gelu_backward_pass": (("if need_bias else None", "if True else None"),),
        "_pass_options": (
            ("min(_blocks(rows, block_m),", "min(_blocks(rows, block_m) + 1,"),
            ("columns = _blocks(F, block_n)", "columns = F // block_n + 1"),
            ("columns * slices", "slices"),
        ),
        "launch_linear_add": (
            ("if keep_y else None", "if True else None"),
            ("N=x.shape[1]", "N=x.shape[0]"),
            ("dtype=residual.dtype", "dtype=x.dtype"),
        ),
        "launch_linear_add_backward": (
            ('"N": grad_out.shape[1]', '"N": grad_out.shape[0]'),
            ("dtype=y_dtype", "dtype=grad_out.dtype"),
            ("partial_scale.sum(0)", "partial_bias.sum(0)"),
            ("None if bias_dtype is None else _partials", "_partials"),
        ),
    },
    "linear_op": {
        "_launch": (("a.contiguous() if", "a if"),),
        "_product_gradients": (("if need_x else None", "if True else None"),),
        "_linear_add_gradients": (
            ("scale is not None or keep is not None", "scale is not None"),
            (" or grad_out.dtype != x.dtype", ""),
            ("grad_y if scaled else grad_out", "grad_out"),
            ("y if need_scale else None", "y"),
        ),
        "fused_linear_gelu": (("needs_grad and x.shape[2] > WIDEST_RECOMPUTED", "needs_grad"),),
        "fused_linear_add": (("_needs_grad(scale))\n", "_needs_grad(x))\n"),),
    },
    "batch_norm_triton": {
        "_clamp": (
            ("b_x <= LOW, LOW", "b_x <= LOW, HIGH"),
            ("b_x >= HIGH, HIGH", "b_x >= HIGH, b_x"),
        ),
        "_activate": (
            ("b_x <= 0.0, 0.0", "b_x <= 0.0, 1.0"),
            ("_clamp(b_x, 0.0, 6.0)", "_clamp(b_x, 0.0, 3.0)"),
            ("tl.sigmoid(b_x)", "tl.sigmoid(-b_x)"),
            ("(1.0 / 6.0)", "(1.0 / 3.0)"),
            ("_normal_cdf(b_x)", "_normal_cdf(-b_x)"),
        ),
        "_slope": (
            ("b_x > 0.0, 1.0", "b_x > 0.0, 2.0"),
            ("(b_x < 6.0)", "(b_x < 3.0)"),
            ("b_x * (1.0 - b_gate)", "b_x * b_gate"),
            ("b_x <= -3.0", "b_x <= 0.0"),
            ("(1.0 / 3.0)", "(1.0 / 6.0)"),
            ("_gelu_slope(b_x)", "_normal_cdf(b_x)"),
        ),
        "_spread": (
            ("if CHANNELS_LAST", "if not CHANNELS_LAST"),
            ("b_row[:, None]", "b_row[None, :]"),
        ),
        "_tile": (
            ("outer = s if", "outer = c if"),
            ("(b * OUTER + outer) * INNER", "b * OUTER * INNER"),
            ("o_outer * INNER", "o_outer * BLOCK_I"),
            ("outer + o_outer < OUTER", "outer + o_outer <= OUTER"),
            ("inner + o_inner < INNER", "inner + o_inner <= INNER"),
        ),
        "_rstd": (
            ("tl.cast(eps, tl.float32)", "1e-5"),
            ("_load_row(var, row, stride", "_load_row(var, 0, stride"),
        ),
        "_fwd_kernel": (
            ("(tl.program_id(0) // (rows * columns)).to(tl.int64)", "tl.program_id(0) // (rows * columns)"),
            ("// columns % rows", "% rows"),
            ("% columns * BLOCK_I", "% columns"),
            ("_load_row(mean, row, stats_stride", "_load_row(mean, row, weight_stride"),
            ("_load_row(weight, row, weight_stride", "_load_row(weight, row, bias_stride"),
            ("_load_row(bias, row, bias_stride", "_load_row(bias, row, weight_stride"),
            ("(b_x - _spread(b_mean, CHANNELS_LAST))", "b_x"),
            (" + _spread(b_bias, CHANNELS_LAST)", ""),
            ("_activate(b_x, ACT) + b_residual if", "_activate(b_x + b_residual, ACT) if"),
            ("b_x.to(out.dtype.element_ty), mask=m_tile", "b_x.to(out.dtype.element_ty)"),
        ),
        "_bwd_kernel": (
            ("% tiles) * BLOCK_C", "% tiles)"),
            ("(tl.program_id(0) // tiles).to(tl.int64)", "tl.program_id(0) // tiles"),
            ("% slices) * chunk", "% slices)"),
            ("_load_row(mean, row, stats_stride", "_load_row(mean, row, weight_stride"),
            ("_load_row(weight, row, weight_stride", "_load_row(weight, row, bias_stride"),
            ("_load_row(bias, row, bias_stride", "_load_row(bias, row, weight_stride"),
            ("sums + (C + o_c)", "sums + o_c"),
            ("* b_rstd * b_rstd", "* b_rstd"),
            ("tl.cdiv(S, BLOCK_S)", "S // BLOCK_S"),
            ("s = tile * BLOCK_S", "s = first * BLOCK_S"),
            (".to(tl.float32) - b_mean", ".to(tl.float32)"),
            ("_slope(b_pre, ACT)", "_activate(b_pre, ACT)"),
            ("b_pre += tl.load(residual", "b_pre = tl.load(residual"),
            ("b_sum_weight += b_grad", "b_sum_weight = b_grad"),
            ("b_sum_bias += b_grad", "b_sum_bias = b_grad"),
            ("b_grad *= b_scale", "b_grad *= b_rstd"),
            ("b_offset + b_centred * b_slope", "b_offset"),
            ("axis=AXIS) * _rstd(var, row, stats_stride, eps, o_c, C)", "axis=AXIS)"),
            ("tl.sum(b_sum_bias, axis=AXIS), mask=o_c < C", "tl.sum(b_sum_bias, axis=AXIS)"),
        ),
    },
    "batch_norm_sums_triton": {
        "_stats_kernel": (
            ("% tiles) * BLOCK_C", "% tiles)"),
            ("(tl.program_id(0) // tiles).to(tl.int64)", "tl.program_id(0) // tiles"),
            ("% slices) * chunk", "% slices)"),
            ("tl.minimum(S - s, BLOCK_S)", "tl.minimum(S, BLOCK_S)"),
            (
                "tl.where(m_tile, b_x - _spread(b_tile_mean, CHANNELS_LAST), 0.0)",
                "b_x - _spread(b_tile_mean, CHANNELS_LAST)",
            ),
            ("(count * n / (count + n))", "n"),
            ("b_m2 += tl.sum", "b_m2 = tl.sum"),
            ("b_shift * (n / count)", "b_shift"),
            ("b_m2, mask=o_c < C", "b_m2"),
        ),
        "_lines": (
            ("first + tl.arange", "tl.arange"),
            ("(o_p < P)[:, None] & ", ""),
            (" & (o_c < C)[None, :]", ""),
        ),
        "_combine_kernel": (
            ("tl.program_id(0) * BLOCK_C", "tl.program_id(0)"),
            ("b_sum += b_count * ", "b_sum += "),
            (" - b_mean[None, :]", ""),
            ("b_m2 += tl.load(partial_m2", "b_m2 = tl.load(partial_m2"),
            ("tl.where(m_lines, b_count * b_shift * b_shift, 0.0)", "b_count * b_shift * b_shift"),
            ("b_mean, mask=o_c < C", "b_mean"),
        ),
        "_sums_kernel": (
            ("tl.program_id(0) * BLOCK_C", "tl.program_id(0)"),
            ("o_p // slices", "o_p"),
            ("(row < T)", "(row <= T)"),
            ("row[:, None] * weight_stride", "row[:, None] * C"),
            ("(1 - r) * P * C", "r * P * C"),
            ("b_weight * b_part", "b_part"),
            ("b_sum += tl.where", "b_sum = tl.where"),
            ("tl.cast(count, tl.float32)", "1.0"),
            ("sums + r * C + o_c", "sums + o_c"),
        ),
    },
    "batch_norm_launch": {
        "_slices": (("_blocks(tiles, chunk), programs", "tiles, programs"),),
        "launch_statistics": (("chunk=chunk * block_s", "chunk=chunk"),),
        "_norm_arguments": (("0 if mean.dim() == 1 else _row_stride(mean)", "_row_stride(mean)"),),
        "launch_backward": (
            ("need_weight or two_passes", "need_weight"),
            ("None if two_passes else grad_x", "grad_x"),
            ("grad_residual if has_g else grad_out", "grad_out"),
            ("None if has_g else residual", "residual"),
            ('"none" if has_g else act', "act"),
            ("0 if need_weight else 1", "0"),
        ),
    },
    "batch_norm_op": {
        "_rows": (("_dense_columns(bias)", "bias"),),
        "_setup_context": ((" and not residual_after_act", ""),),
        "_gradients": (
            ("grad_residual if ctx.is_seen else grad_out", "grad_out"),
            ("grad_rows[-1] if need_bias", "grad_rows[0] if need_bias"),
        ),
    },
}


class Mutation(NamedTuple):
    """One replacement in one function of a file under kernels/."""

    module: str
    function: str
    old: str
    new: str

    def __str__(self):
        return f"{self.module}.{self.function}: {' '.join(self.old.split())!r} -> {' '.join(self.new.split())!r}"

    def apply(self, source: str) -> str:
        """The mutated source of the module.

        Raises:
            ValueError: if the function is not there, or `old` is not there exactly once.
        """
        nodes = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == self.function]
        if len(nodes) != 1:
            raise ValueError(f"{self}: the source has {len(nodes)} functions of this name, expected 1")
        lines = source.splitlines(keepends=True)
        first, last = nodes[0].lineno - 1, nodes[0].end_lineno
        body = "".join(lines[first:last])
        if body.count(self.old) != 1:
            raise ValueError(f"{self}: the text occurs {body.count(self.old)} times in the function, expected once")
        return "".join(lines[:first]) + body.replace(self.old, self.new) + "".join(lines[last:])


def mutations() -> list[Mutation]:
    """All of them, in the order of the table."""
    return [
        Mutation(module, function, *texts)
        for module, functions in MUTATIONS.items()
        for function, pairs in functions.items()
        for texts in pairs
    ]


def source_of(module: str) -> str:
    return (ROOT / "kernels" / f"{module}.py").read_text()


def run_tests(project: Path, tests: tuple[str, ...]) -> str:
    """ "passed", "failed", or what else became of them."""
    log = project / "tests.log"
    child = multiprocessing.get_context("fork").Process(target=_run_tests, args=(project, tests, log))
    child.start()
    child.join(timeout=1800)
    if child.is_alive():  # a loop without an end
        child.kill()
        child.join()
    if child.exitcode < 0 or child.exitcode == pytest.ExitCode.TESTS_FAILED:
        return "failed"
    return "passed" if child.exitcode == pytest.ExitCode.OK else f"no verdict: {log.read_text()[-2000:]}"


def _run_tests(project: Path, tests: tuple[str, ...], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(project)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure is enough: shrinking it takes minutes
    hypothesis.settings.register_profile("mutations", deadline=None, derandomize=True, phases=phases)
    os.environ["HYPERCLIP_HYPOTHESIS"] = "mutations"
    sys.path[0] = str(project)  # in the place of this script's folder
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:warnings"]
    os._exit(pytest.main([*options, *tests]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression, searched in 'module.function: old -> new'")
    only = parser.parse_args().only
    chosen = [mutation for mutation in mutations() if re.search(only, str(mutation))]
    survived = []
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("timm", "triton", "torch._dynamo", "torch._inductor"):  # once, not in every child
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for name in files:
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
        for tests in sorted({TESTS[mutation.module] for mutation in chosen}):
            if (verdict := run_tests(project, tests)) != "passed":
                raise SystemExit(f"{' '.join(tests)} without any mutation: {verdict}")
        for mutation in chosen:
            path, source = project / "kernels" / f"{mutation.module}.py", source_of(mutation.module)
            path.write_text(mutation.apply(source))
            start = time.perf_counter()
            verdict = run_tests(project, TESTS[mutation.module])
            path.write_text(source)
            word = {"failed": "killed", "passed": "SURVIVED"}.get(verdict, verdict)
            print(f"{word:<9}{time.perf_counter() - start:5.0f} s  {mutation}", flush=True)
            if verdict != "failed":
                survived.append(mutation)
    print(f"\n{len(chosen) - len(survived)} of {len(chosen)} mutations killed")
    for mutation in survived:
        print(f"not killed: {mutation}")
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
