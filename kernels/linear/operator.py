"""The operators behind `linear_gelu` and `linear_add`: checks, autograd, torch.compile.

Eager calls go straight to the launches; what traces (torch.compile, export, fake tensors) sees the operators
`hyperclip_fast::linear_gelu`, `hyperclip_fast::linear_add` and their `_backward`s. The products of the backward, d x
and d weight, are torch's own, cuBLAS, in both. Kept for backward: x and weight; the pre-activation unless x is narrow
enough to compute it again (tables.py); y only where scale has a gradient; nothing where no backward will come.
"""

import torch
from torch.autograd.function import once_differentiable

from ..common.checks import check_devices, check_dtype
from ..common.operator import filled, is_plain, needs_grad
from ..tables import WIDEST_RECOMPUTED
from .launch import launch_linear_add, launch_linear_add_backward, launch_linear_gelu, launch_linear_gelu_backward


def _launch(launch, like: torch.Tensor, *arguments):
    """A launch on `like`'s device, every tensor made contiguous."""
    dense = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments)
    with torch.cuda.device_of(like):
        return launch(*dense)


def _define(name: str, schema: str, launch) -> None:
    torch.library.define(f"hyperclip_fast::{name}", schema, tags=torch.Tag.pt2_compliant_tag)

    @torch.library.impl(f"hyperclip_fast::{name}", "default")
    def run(first, *rest):
        return filled(_launch(launch, first, first, *rest), first)


_define(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor? bias, bool keep_pre) -> (Tensor out, Tensor pre)",
    launch_linear_gelu,
)
_define(
    "linear_gelu_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? pre, bool need_bias) "
    "-> (Tensor grad_pre, Tensor grad_bias)",
    launch_linear_gelu_backward,
)
_define(
    "linear_add",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? scale, Tensor? keep, bool keep_y) "
    "-> (Tensor out, Tensor y)",
    launch_linear_add,
)
_define(
    "linear_add_backward",
    "(Tensor grad_out, Tensor? y, Tensor? scale, Tensor? keep, ScalarType? y_dtype, ScalarType? bias_dtype) "
    "-> (Tensor grad_y, Tensor grad_bias, Tensor grad_scale)",
    launch_linear_add_backward,
)


@torch.library.register_fake("hyperclip_fast::linear_gelu")
def _linear_gelu_fake(x, weight, bias, keep_pre):
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    return filled((out, torch.empty_like(out) if keep_pre else None), x)


@torch.library.register_fake("hyperclip_fast::linear_gelu_backward")
def _linear_gelu_backward_fake(grad_out, x, weight, bias, pre, need_bias):
    return filled((x.new_empty(grad_out.shape), torch.empty_like(bias) if need_bias else None), grad_out)


@torch.library.register_fake("hyperclip_fast::linear_add")
def _linear_add_fake(x, weight, bias, residual, scale, keep, keep_y):
    return filled((residual.new_empty(residual.shape), x.new_empty(residual.shape) if keep_y else None), x)


@torch.library.register_fake("hyperclip_fast::linear_add_backward")
def _linear_add_backward_fake(grad_out, y, scale, keep, y_dtype, bias_dtype):
    grad_y = None if y_dtype is None else grad_out.new_empty(grad_out.shape, dtype=y_dtype)
    grad_bias = None if bias_dtype is None else grad_out.new_empty(grad_out.shape[2], dtype=bias_dtype)
    grad_scale = None if y is None else scale.new_empty(scale.shape)
    return filled((grad_y, grad_bias, grad_scale), grad_out)


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
    arguments = (grad_out, x, weight, bias, pre, need_bias)
    if is_plain(x):
        grad_pre, grad_bias = _launch(launch_linear_gelu_backward, x, *arguments)
    else:
        grad_pre, grad_bias = torch.ops.hyperclip_fast.linear_gelu_backward(*arguments)
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
        arguments = (grad_out, y, scale, keep, y_dtype, bias_dtype)
        if is_plain(grad_out):
            grad_y, grad_bias, grad_scale = _launch(launch_linear_add_backward, grad_out, *arguments)
        else:
            grad_y, grad_bias, grad_scale = torch.ops.hyperclip_fast.linear_add_backward(*arguments)
    products = (None, None)
    if need_y:
        products = _product_gradients(grad_y if scaled else grad_out, x, weight, need_x, need_weight)
    needed = ((need_bias, grad_bias), (need_residual, grad_out), (need_scale, grad_scale))
    return *products, *(grad if need else None for need, grad in needed), None, None


torch.library.register_autograd("hyperclip_fast::linear_gelu", _linear_gelu_gradients, setup_context=_setup_linear_gelu)
torch.library.register_autograd("hyperclip_fast::linear_add", _linear_add_gradients, setup_context=_setup_linear_add)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _launch(launch_linear_gelu, inputs[0], *inputs)
        _setup_linear_gelu(ctx, inputs, output)
        return output

    backward = staticmethod(_linear_gelu_gradients)  # type: ignore[assignment]  # one argument an output, not *grads


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _launch(launch_linear_add, inputs[0], *inputs)
        _setup_linear_add(ctx, inputs, output)
        return output

    backward = staticmethod(_linear_add_gradients)  # type: ignore[assignment]  # one argument an output, not *grads


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
    differentiable = needs_grad(x, weight, bias)
    arguments = (x, weight, bias, differentiable and x.shape[2] > WIDEST_RECOMPUTED)
    if not is_plain(x):
        return torch.ops.hyperclip_fast.linear_gelu(*arguments)[0]
    return (_LinearGelu.apply(*arguments) if differentiable else _launch(launch_linear_gelu, x, *arguments))[0]


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
    arguments = (x, weight, bias, residual, scale, keep, needs_grad(scale))
    if not is_plain(x):
        return torch.ops.hyperclip_fast.linear_add(*arguments)[0]
    differentiable = needs_grad(x, weight, bias, residual, scale)
    return (_LinearAdd.apply(*arguments) if differentiable else _launch(launch_linear_add, x, *arguments))[0]
