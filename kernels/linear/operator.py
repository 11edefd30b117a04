"""The operators behind `linear_gelu` and `linear_add`: checks, autograd, torch.compile.

Eager calls go straight to the launches; what traces (torch.compile, export, fake tensors) sees the operators
`hyperclip_fast::linear_gelu`, `hyperclip_fast::linear_add` and their `_backward`s. The products of the backward, d x
and d weight, are torch's own, cuBLAS, in both. Kept for backward: x and weight; the pre-activation unless x is narrow
enough to compute it again (tables.py); y only where scale has a gradient; nothing where no backward will come.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ..common.autograd import needs_grad
from ..common.checks import check_devices, check_dtype
from ..common.operator import register, register_differentiable
from ..tables import WIDEST_RECOMPUTED
from .launch import launch_linear_add, launch_linear_add_backward, launch_linear_gelu, launch_linear_gelu_backward


def _launching(launch: Callable) -> Callable:
    """A launch, every tensor made contiguous."""

    def run(*arguments):
        return launch(*(a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments))

    return run


def _linear_gelu_fake(x, weight, bias, keep_pre):
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    return out, torch.empty_like(out) if keep_pre else None


def _linear_gelu_backward_fake(grad_out, x, weight, bias, pre, need_bias):
    return x.new_empty(grad_out.shape), torch.empty_like(bias) if need_bias else None


def _linear_add_fake(x, weight, bias, residual, scale, keep, keep_y):
    return residual.new_empty(residual.shape), x.new_empty(residual.shape) if keep_y else None


def _linear_add_backward_fake(grad_out, y, scale, keep, y_dtype, bias_dtype):
    grad_y = None if y_dtype is None else grad_out.new_empty(grad_out.shape, dtype=y_dtype)
    grad_bias = None if bias_dtype is None else grad_out.new_empty(grad_out.shape[2], dtype=bias_dtype)
    return grad_y, grad_bias, None if y is None else scale.new_empty(scale.shape)


_linear_gelu_backward = register(
    "linear_gelu_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? pre, bool need_bias) "
    "-> (Tensor grad_pre, Tensor grad_bias)",
    _launching(launch_linear_gelu_backward),
    _linear_gelu_backward_fake,
)
_linear_add_backward = register(
    "linear_add_backward",
    "(Tensor grad_out, Tensor? y, Tensor? scale, Tensor? keep, ScalarType? y_dtype, ScalarType? bias_dtype) "
    "-> (Tensor grad_y, Tensor grad_bias, Tensor grad_scale)",
    _launching(launch_linear_add_backward),
    _linear_add_backward_fake,
)


def _product_gradients(grad_y, x, weight, need_x, need_weight):
    """d x (B, N, K) and d weight (F, K) of y = x weight^T, from d y (B, N, F)."""
    rows = grad_y.flatten(0, 1)
    grad_x = torch.mm(rows, weight).view(x.shape) if need_x else None
    return grad_x, torch.mm(rows.t(), x.flatten(0, 1)) if need_weight else None


def _setup_linear_gelu(ctx, inputs, output) -> None:
    x, weight, bias, keep_pre = inputs
    pre = output[1] if keep_pre else None
    ctx.set_materialize_grads(False)
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, pre)


@once_differentiable
def _linear_gelu_gradients(ctx, grad_out, _grad_pre):
    x, weight, bias, pre = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 4
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_pre, grad_bias = _linear_gelu_backward(grad_out, x, weight, bias, pre, need_bias)
    products = _product_gradients(grad_pre, x, weight, need_x, need_weight)
    return *products, grad_bias if need_bias else None, None


def _setup_linear_add(ctx, inputs, output) -> None:
    x, weight, bias, _, scale, keep, keep_y = inputs
    if scale is not None and ctx.needs_input_grad[4] and not keep_y:
        raise ValueError("keep_y must be true where scale's gradient is wanted, got False")
    ctx.set_materialize_grads(False)
    if output[1] is not None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, scale, keep, output[1] if keep_y else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


@once_differentiable
def _linear_add_gradients(ctx, grad_out, _grad_y):
    x, weight, scale, keep, y = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 7
    need_x, need_weight, need_bias, need_residual, need_scale = ctx.needs_input_grad[:5]
    need_y = need_x or need_weight
    scaled = scale is not None or keep is not None or grad_out.dtype != x.dtype  # otherwise d y is d out itself
    y_dtype, bias_dtype = x.dtype if need_y and scaled else None, ctx.bias_dtype if need_bias else None
    grad_y = grad_bias = grad_scale = None
    if y_dtype is not None or need_bias or need_scale:
        grad_y, grad_bias, grad_scale = _linear_add_backward(grad_out, y, scale, keep, y_dtype, bias_dtype)
    products = (None, None)
    if need_y:
        products = _product_gradients(grad_y if scaled else grad_out, x, weight, need_x, need_weight)
    needed = ((need_bias, grad_bias), (need_residual, grad_out), (need_scale, grad_scale))
    return *products, *(grad if need else None for need, grad in needed), None, None


_linear_gelu = register_differentiable(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, bool keep_pre) -> (Tensor out, Tensor pre)",
    _launching(launch_linear_gelu),
    _linear_gelu_fake,
    _setup_linear_gelu,
    _linear_gelu_gradients,
)
_linear_add = register_differentiable(
    "linear_add",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? scale, Tensor? keep, bool keep_y) "
    "-> (Tensor out, Tensor y)",
    _launching(launch_linear_add),
    _linear_add_fake,
    _setup_linear_add,
    _linear_add_gradients,
)


def check_fused(x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError for dtypes and devices that the kernels do not take."""
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None:
            check_dtype(name, tensor.dtype)
    check_devices(x, **others)


def fused_linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear_gelu` by the Triton kernels; the caller has checked the shapes, weight has x's dtype.

    Raises:
        ValueError: for dtypes and devices that the kernels do not take.
    """
    check_fused(x, weight=weight, bias=bias)
    with_gradient = needs_grad(x, weight, bias)
    return _linear_gelu(with_gradient, x, weight, bias, with_gradient and x.shape[2] > WIDEST_RECOMPUTED)[0]


def fused_linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """`linear_add` by the Triton kernels; the caller has checked the shapes, weight has x's dtype.

    Raises:
        ValueError: for dtypes and devices that the kernels do not take.
    """
    check_fused(x, weight=weight, bias=bias, residual=residual, scale=scale, keep=keep)
    with_gradient, keep_y = needs_grad(x, weight, bias, residual, scale), needs_grad(scale)
    return _linear_add(with_gradient, x, weight, bias, residual, scale, keep, keep_y)[0]
