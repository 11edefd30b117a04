"""The operator behind `layer_norm` and `add_layer_norm`: checks, autograd, torch.compile.

Eager calls go straight to the launches; what traces (torch.compile, export, fake tensors) sees the operators
`hyperclip_fast::layer_norm` and `hyperclip_fast::layer_norm_backward`, whose gradient is the same code.
Kept for backward: total (x itself without delta), mean and rstd (B, N) float32; nothing where no backward will come.
"""

import torch
from torch.autograd.function import once_differentiable

from ..common.autograd import needs_grad
from ..common.checks import check_devices, check_dtype, check_row_dtype
from ..common.operator import contiguous, register, register_differentiable
from ..common.rows import Rows, dense_columns, dense_rows
from ..tables import MAX_WIDTH
from .launch import Kept, Needs, launch_backward, launch_forward


def _forward(x, delta, weight, bias, task_ids, eps, out_dtype, keep):
    rows = dense_rows(weight, bias, task_ids)
    return launch_forward(x.contiguous(), contiguous(delta), rows, eps, out_dtype, keep)


def _backward(grad_out, grad_total, total, mean, rstd, weight, task_ids, need_x, delta_dtype, need_weight, need_bias):
    kept = Kept(total.contiguous(), mean, rstd, dense_columns(weight), contiguous(task_ids))
    needs = Needs(need_x, delta_dtype, need_weight, need_bias)
    return launch_backward(grad_out.contiguous(), contiguous(grad_total), kept, needs)


def _forward_fake(x, delta, weight, bias, task_ids, eps, out_dtype, keep):
    out = x.new_empty(x.shape, dtype=out_dtype)
    total = None if delta is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) if keep else None for _ in range(2))
    return out, total, mean, rstd


def _backward_fake(
    grad_out, grad_total, total, mean, rstd, weight, task_ids, need_x, delta_dtype, need_weight, need_bias
):
    grad_x = total.new_empty(total.shape) if need_x else None
    grad_delta = None if delta_dtype is None else total.new_empty(total.shape, dtype=delta_dtype)
    kinds = need_weight + need_bias
    return grad_x, grad_delta, weight.new_empty(kinds, *weight.shape) if kinds else None


_layer_norm_backward = register(
    "layer_norm_backward",
    "(Tensor grad_out, Tensor? grad_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor? task_ids, "
    "bool need_x, ScalarType? delta_dtype, bool need_weight, bool need_bias) "
    "-> (Tensor grad_x, Tensor grad_delta, Tensor grad_rows)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    x, delta, weight, _, task_ids, _, _, keep = inputs
    _, total, mean, rstd = output
    if not keep:
        raise ValueError("keep must be true where a gradient is wanted, got False")
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if delta is None else total, mean, rstd, weight, task_ids)
    ctx.delta_dtype = None if delta is None else delta.dtype


@once_differentiable
def _gradients(ctx, grad_out, grad_total, _grad_mean, _grad_rstd):
    saved = ctx.saved_tensors  # once: checkpointing gives each tensor once
    dtype = saved[0].dtype
    need_x, need_delta, need_weight, need_bias = ctx.needs_input_grad[:4]
    if ctx.delta_dtype is None:
        grad_total = None  # the operator's placeholder for total
    if grad_out is None:  # only total was used: the gradient of a plain addition
        grad_delta = None if grad_total is None or not need_delta else grad_total.to(ctx.delta_dtype)
        return grad_total, grad_delta, *[None] * 6
    same = need_delta and ctx.delta_dtype == dtype
    delta_dtype = ctx.delta_dtype if need_delta and not same else None
    tensors, needs = (grad_out, grad_total, *saved), (need_x or same, delta_dtype, need_weight, need_bias)
    grad_x, grad_delta, grad_rows = _layer_norm_backward(*tensors, *needs)
    return (
        grad_x if need_x else None,
        (grad_x if same else grad_delta) if need_delta else None,
        grad_rows[0] if need_weight else None,
        grad_rows[-1] if need_bias else None,
        *[None] * 4,
    )


_layer_norm = register_differentiable(
    "layer_norm",
    "(Tensor x, Tensor? delta, Tensor weight, Tensor bias, Tensor? task_ids, float eps, ScalarType out_dtype, "
    "bool keep) -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)


def check_fused(
    x: torch.Tensor, delta: torch.Tensor | None, rows: Rows, out_dtype: torch.dtype, prefix: str = ""
) -> None:
    """Raise ValueError for dtypes, widths and devices that the kernels do not take; `prefix`: of the rows' names."""
    dtype, width = x.dtype, x.size(2)
    check_dtype("x", dtype)
    if delta is not None and delta.dtype != dtype:
        check_dtype("delta", delta.dtype)
    if out_dtype != dtype:
        check_dtype("out_dtype", out_dtype)
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x must be (B, N, D) with D in 1..{MAX_WIDTH} for the Triton kernel, got D = {width}")
    weight, bias, task_ids = rows
    if weight.dtype != dtype:
        check_row_dtype(weight, x, prefix)
    check_devices(x, prefix, weight=weight, bias=bias)
    check_devices(x, delta=delta, task_ids=task_ids)


def fused_layer_norm(
    x: torch.Tensor, delta: torch.Tensor | None, rows: Rows, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`add_layer_norm`, or `layer_norm` where delta is None, by the Triton kernels; the caller has checked the shapes.

    A task id outside [0, T) makes its sample's output NaN: looking at the ids here would synchronise the device.

    Raises:
        ValueError: for dtypes, widths and devices that the kernels do not take.
    """
    check_fused(x, delta, rows, out_dtype)
    weight, bias, task_ids = rows
    if weight.size(0) == 1:
        task_ids = None
    keep = needs_grad(x, delta, weight, bias)
    out, total, _, _ = _layer_norm(keep, x, delta, weight, bias, task_ids, eps, out_dtype, keep)
    return out, None if delta is None else total
