"""The mutations of what the kernels share; see table.py. Data."""

COMMON = {
    "common/triton_rows": {
        "row_of_sample": (
            ("row = b\n", "row = b * 0\n"),
            ("task_ids + b)", "task_ids)"),
            ("(row < T)", "(row <= T)"),
            ("row, -1)", "row, 0)"),
        ),
        "load_row": (
            ("row * stride", "row * D"),
            ("(o_d < D) & (row >= 0)", "row >= 0"),
            ("(o_d < D) & (row >= 0)", "o_d < D"),
            ('float("nan")', "0.0"),
        ),
        "_reduce_kernel": (
            ("tl.program_id(1) * BLOCK_D +", "tl.program_id(1) +"),
            ("m_d = o_d < D", "m_d = o_d <= D"),
            ("mask=o_i < b,", "mask=o_i <= b,"),
            ("if (earlier == 0)", "if (earlier >= 0)"),
            ("tl.where(m_i, o_i, b)", "tl.where(m_i, b, b)"),
            ("range(b // BLOCK_B * BLOCK_B, last + 1, BLOCK_B)", "range(b // BLOCK_B * BLOCK_B, b + 1, BLOCK_B)"),
            ("m_b = tl.load(task_ids + o_b, mask=o_b <= last, other=-1) == task", "m_b = o_b <= last"),
            ("mask=o_b <= last, other=-1) == task", "mask=o_b <= last, other=-1) >= task"),
            ("> 0:", "> 1:"),
            ("(r * B + o_b.to(tl.int64))", "o_b.to(tl.int64)"),
            ("range(slices)", "range(1)"),
            ("o_partial + s * D", "o_partial"),
            ("b_sum += tl.load", "b_sum = tl.load"),
            ("m_b[:, None] & m_d[None, :]", "m_b[:, None]"),
            ("(r * T + task) * D", "r * T * D"),
        ),
        "load_columns": (
            ("n + tl.arange", "tl.arange"),
            ("o_n < F", "o_n <= F"),
        ),
    },
    "common/autograd": {
        "needs_grad": (("return False", "pass"),),
        "traced_gradients": (
            ("create_graph=True", "create_graph=False"),
            ("next(grads) if need else None", "next(grads, None)"),
        ),
    },
    "common/operator": {
        "register": ((" if is_plain(arguments[0]) else operator(*arguments)", ""),),
        "register_differentiable": (("eager.apply(*arguments) if needs_grad else run", "run"),),
        "_filled": (("first.new_empty(0) if result is None else result", "result"),),
    },
    "common/rows": {
        "row_stride": (("0 if table.size(0) == 1 else table.stride(0)", "table.stride(0)"),),
        "dense_rows": (("dense_columns(weight)", "weight"), ("dense_columns(bias)", "bias")),
    },
    "common/launch": {
        "reduce_partials": (
            ("(1, 2) if weight.shape[0] == 1 else 2", "(1, 2) if weight.shape[0] == 1 else 1"),
            ("cdiv(D, block_d), kinds", "cdiv(D, block_d), 1"),
            ("(B, cdiv", "(B - 1, cdiv"),
            ("torch.zeros", "torch.empty"),
        ),
    },
    "common/triton_activations": {
        "normal_cdf": (("0.7071067811865476", "0.7071"), ("1.0 + tl.erf", "tl.erf")),
        "gelu_slope": (
            ("0.3989422804014327", "0.3989"),
            ("-0.5 * b_z", "0.5 * b_z"),
            ("normal_cdf(b_z) + b_z *", "normal_cdf(b_z) +"),
        ),
        "_clamp": (
            ("b_x <= LOW, LOW", "b_x <= LOW, HIGH"),
            ("b_x >= HIGH, HIGH", "b_x >= HIGH, b_x"),
        ),
        "activate": (
            ("b_x <= 0.0, 0.0", "b_x <= 0.0, 1.0"),
            ("_clamp(b_x, 0.0, 6.0)", "_clamp(b_x, 0.0, 3.0)"),
            ("tl.sigmoid(b_x)", "tl.sigmoid(-b_x)"),
            ("(1.0 / 6.0)", "(1.0 / 3.0)"),
            ("normal_cdf(b_x)", "normal_cdf(-b_x)"),
        ),
        "activation_slope": (
            ("b_x > 0.0, 1.0", "b_x > 0.0, 2.0"),
            ("(b_x < 6.0)", "(b_x < 3.0)"),
            ("b_x * (1.0 - b_gate)", "b_x * b_gate"),
            ("b_x <= -3.0", "b_x <= 0.0"),
            ("(1.0 / 3.0)", "(1.0 / 6.0)"),
            ("gelu_slope(b_x)", "normal_cdf(b_x)"),
        ),
    },
}
