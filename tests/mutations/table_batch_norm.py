"""The part of table.py for the batch norm. Data."""

BATCH_NORM = {
    "batch_norm/triton_kernels": {
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
            ("load_row(var, row, stride", "load_row(var, 0, stride"),
        ),
        "_grad_at": (
            (".to(tl.float32) - b_mean", ".to(tl.float32)"),
            ("activation_slope(b_pre, ACT)", "activate(b_pre, ACT)"),
            ("b_pre += tl.load(residual", "b_pre = tl.load(residual"),
            ("b_centred * b_scale + b_bias", "b_centred * b_scale"),
        ),
        "_place": (
            ("% tiles) * BLOCK_C", "% tiles)"),
            ("line.to(tl.int64)", "line"),
            ("line % slices * chunk", "line % slices"),
        ),
        "_norm": (
            ("load_row(mean, row, strides[2]", "load_row(mean, row, strides[0]"),
            ("load_row(weight, row, strides[0]", "load_row(weight, row, strides[1]"),
            ("load_row(bias, row, strides[1]", "load_row(bias, row, strides[0]"),
            ("CHANNELS_LAST) * b_rstd", "CHANNELS_LAST)"),
        ),
        "_batch_terms": (
            ("sums + (C + o_c)", "sums + o_c"),
            ("* b_rstd * b_rstd", "* b_rstd"),
        ),
        "_fwd_kernel": (
            ("(tl.program_id(0) // (rows * columns)).to(tl.int64)", "tl.program_id(0) // (rows * columns)"),
            ("// columns % rows", "% rows"),
            ("% columns * BLOCK_I", "% columns"),
            ("(b_x - b_mean)", "b_x"),
            (" + b_bias", ""),
            ("(weight_stride, bias_stride, stats_stride)", "(bias_stride, weight_stride, stats_stride)"),
            ("activate(b_x, ACT) + b_residual if", "activate(b_x + b_residual, ACT) if"),
            ("b_x.to(out.dtype.element_ty), mask=m_tile", "b_x.to(out.dtype.element_ty)"),
        ),
        "_bwd_kernel": (
            ("(weight_stride, bias_stride, stats_stride)", "(bias_stride, weight_stride, stats_stride)"),
            ("tl.cdiv(S, BLOCK_S)", "S // BLOCK_S"),
            ("tile * BLOCK_S, OUTER", "first * BLOCK_S, OUTER"),
            ("b_sum_weight += b_grad", "b_sum_weight = b_grad"),
            ("b_sum_bias += b_grad", "b_sum_bias = b_grad"),
            ("b_grad *= b_scale", "b_grad *= b_rstd"),
            ("b_constant + b_centred * b_slope", "b_constant"),
            ("axis=AXIS) * _rstd(var, row, stats_stride, eps, o_c, C)", "axis=AXIS)"),
            ("tl.sum(b_sum_bias, axis=AXIS), mask=o_c < C", "tl.sum(b_sum_bias, axis=AXIS)"),
        ),
    },
    "batch_norm/triton_sums": {
        "_stats_kernel": (
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
    "batch_norm/launch": {
        "_slices": (("cdiv(tiles, chunk), programs", "tiles, programs"),),
        "launch_statistics": (("chunk=chunk * block_s", "chunk=chunk"),),
        "launch_backward": (
            ("needs.weight or two_passes", "needs.weight"),
            ("None if two_passes else grad_x", "grad_x"),
            ("_launch_pass(grad_residual, x", "_launch_pass(grad_out, x"),
            ('norm._replace(act="none")', "norm"),
            ("0 if needs.weight else 1", "0"),
        ),
    },
    "batch_norm/operator": {
        "_norm": (("dense_rows(weight, bias", "dense_rows(bias, weight"),),
        "_setup_context": ((" and not residual_after_act", ""),),
        "_gradients": (
            ("grad_residual if ctx.is_seen else grad_out", "grad_out"),
            ("grad_rows[-1] if need_bias", "grad_rows[0] if need_bias"),
        ),
    },
}
