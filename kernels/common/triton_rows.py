"""Rows of tables in Triton: which row a sample uses, how it is loaded, and how rows' gradients are summed by task."""

import triton
import triton.language as tl


@triton.jit
def row_of_sample(task_ids, b, T):
    """The table's row of sample b, or -1 for a task id outside [0, T); without ids, b itself."""
    if task_ids is None:
        row = b
    else:
        row = tl.load(task_ids + b).to(tl.int64)
        row = tl.where((row >= 0) & (row < T), row, -1)
    return row


@triton.jit
def load_row(table, row, stride, o_d, D):
    """Columns o_d of a row in float32; NaN for row -1, so that a wrong task id shows and reads nothing."""
    b_row = tl.load(table + row * stride + o_d, mask=(o_d < D) & (row >= 0), other=0.0).to(tl.float32)
    return tl.where(row >= 0, b_row, float("nan"))


@triton.jit(do_not_specialize=["B", "T", "slices"])
def _reduce_kernel(
    partials,  # (R, B, S, D) float32: R = 2 for weight and bias, 1 for one of them
    task_ids,  # (B,)
    grads,  # (R, T, D), all zero
    B,
    T,
    slices,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The program of a task's first sample sums its row, in the batch's order: work grows with B, not with T.

    The others end as soon as they meet an earlier sample of their task: at once where tasks are few.
    """
    b, r = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    task = tl.load(task_ids + b.to(tl.int64)).to(tl.int64)
    earlier, first = 0, 0
    while (first < b) & (earlier == 0):
        o_i = first + tl.arange(0, BLOCK_I)
        earlier = tl.sum((tl.load(task_ids + o_i, mask=o_i < b, other=-1) == task).to(tl.int32))
        first += BLOCK_I
    if (earlier == 0) & (task >= 0) & (task < T):
        last = b
        for start in range(b, B, BLOCK_I):
            o_i = start + tl.arange(0, BLOCK_I)
            m_i = tl.load(task_ids + o_i, mask=o_i < B, other=-1) == task
            last = tl.maximum(last, tl.max(tl.where(m_i, o_i, b)))
        b_sum = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for start in range(b // BLOCK_B * BLOCK_B, last + 1, BLOCK_B):
            o_b = start + tl.arange(0, BLOCK_B)
            m_b = tl.load(task_ids + o_b, mask=o_b <= last, other=-1) == task
            if tl.sum(m_b.to(tl.int32)) > 0:
                o_partial = (r * B + o_b.to(tl.int64)) * slices * D
                for s in range(slices):
                    o_slice = (o_partial + s * D)[:, None] + o_d[None, :]
                    b_sum += tl.load(partials + o_slice, mask=m_b[:, None] & m_d[None, :], other=0.0)
        tl.store(grads + (r * T + task) * D + o_d, tl.sum(b_sum, axis=0).to(grads.dtype.element_ty), mask=m_d)


@triton.jit
def load_columns(vector, n, F, BLOCK_N: tl.constexpr):
    """Elements n to n + BLOCK_N of a vector over the columns, (1, BLOCK_N) float32."""
    o_n = n + tl.arange(0, BLOCK_N)
    return tl.load(vector + o_n, mask=o_n < F, other=0.0).to(tl.float32)[None, :]
