"""The operators behind `batch_norm_act` and `batch_norm_act_train`: checks, autograd, torch.compile.

Eager calls go straight to the launches; what traces (torch.compile, export, fake tensors) sees the operators
`hyperclip_fast::batch_norm_act`, its `_backward` and `hyperclip_fast::batch_norm_statistics`, whose gradient is part of
the first's. Kept for backward: x, residual where the activation sees it, mean and var; nothing where none will come.
"""

import torch
from torch.autograd.function import once_differentiable

from ..common.autograd import needs_grad
from ..common.checks import check_devices, check_dtype, check_row_dtype
from ..common.operator import register, register_differentiable
from ..common.rows import dense_rows
from .launch import Needs, Norm, launch_backward, launch_forward, launch_statistics


def _format(x: torch.Tensor) -> torch.memory_format:
    """x's own memory format, contiguous where it has none."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """All of them in x's memory format."""
    layout = _format(x)
    return [None if t is None else t.contiguous(memory_format=layout) for t in (x, *others)]


def _norm(weight, bias, task_ids, mean, var, eps, act) -> Norm:
    mean, var = mean.float().contiguous(), var.float().contiguous()
    return Norm(dense_rows(weight, bias, task_ids), mean, var, eps, act)


def _forward(x, weight, bias, task_ids, mean, var, eps, act, residual, residual_after_act, is_batch):
    x, residual = _dense(x, residual)
    norm = _norm(weight, bias, task_ids, mean, var, eps, act)
    return launch_forward(x, norm, residual, residual_after_act)


def _backward(grad_out, x, weight, bias, task_ids, mean, var, eps, act, residual, is_batch, *needed):
    x, grad_out, residual = _dense(x, grad_out, residual)
    norm = _norm(weight, bias, task_ids, mean, var, eps, act)
    return launch_backward(grad_out, x, norm, residual, is_batch, Needs(*needed))


def _statistics(x):
    return launch_statistics(x.contiguous(memory_format=_format(x)))


def _forward_fake(x, *rest):
    return torch.empty_like(x, memory_format=_format(x))


def _backward_fake(grad_out, x, weight, *rest):
    need_x, need_weight, need_bias, need_residual = rest[-4:]
    grad_x, grad_residual = (
        torch.empty_like(x, memory_format=_format(x)) if need else None for need in (need_x, need_residual)
    )
    kinds = need_weight + need_bias
    return grad_x, grad_residual, weight.new_empty(kinds, *weight.shape) if kinds else None


def _statistics_fake(x):
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))


NORM = "Tensor x, Tensor weight, Tensor bias, Tensor? task_ids, Tensor mean, Tensor var, float eps, str act"
_batch_norm_statistics = register(
    "batch_norm_statistics", "(Tensor x) -> (Tensor mean, Tensor var)", _statistics, _statistics_fake
)
_batch_norm_act_backward = register(
    "batch_norm_act_backward",
    f"(Tensor grad_out, {NORM}, Tensor? residual, bool is_batch, bool need_x, bool need_weight, bool need_bias, "
    "bool need_residual) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_rows)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, task_ids, mean, var, eps, act, residual, residual_after_act, is_batch = inputs
    ctx.set_materialize_grads(False)
    ctx.is_seen = residual is not None and act != "none" and not residual_after_act
    ctx.save_for_backward(x, weight, bias, task_ids, mean, var, residual if ctx.is_seen else None)
    ctx.options = eps, act, is_batch


@once_differentiable
def _gradients(ctx, grad_out):
    if grad_out is None:
        return (None,) * 11
    *tensors, residual = ctx.saved_tensors
    eps, act, is_batch = ctx.options
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_residual = ctx.needs_input_grad[8]
    grads: tuple = (None, None, None)
    if need_x or need_weight or need_bias or ctx.is_seen:
        needed = need_x, need_weight, need_bias, need_residual and ctx.is_seen
        grads = _batch_norm_act_backward(grad_out, *tensors, eps, act, residual, is_batch, *needed)
    grad_x, grad_residual, grad_rows = grads
    return (
        grad_x if need_x else None,
        grad_rows[0] if need_weight else None,
        grad_rows[-1] if need_bias else None,
        *[None] * 5,
        (grad_residual if ctx.is_seen else grad_out) if need_residual else None,
        *[None] * 2,
    )


_batch_norm_act = register_differentiable(
    "batch_norm_act",
    f"({NORM}, Tensor? residual, bool residual_after_act, bool is_batch) -> Tensor",
    _forward,
    _forward_fake,
    _setup_context,
    _gradients,
)


def fused_batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
    act: str,
    residual: torch.Tensor | None,
    residual_after_act: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`batch_norm_act`, or `batch_norm_act_train` where mean is None, by the Triton kernels; the shapes are checked.

    A task id outside [0, T) makes its sample's output NaN: looking at the ids here would synchronise the device.

    Raises:
        ValueError: for dtypes and devices that the kernels do not take.
    """
    check_dtype("x", x.dtype)
    check_row_dtype(weight, x)
    check_devices(x, weight=weight, bias=bias, task_ids=task_ids, mean=mean, var=var, residual=residual)
    if weight.shape[0] == 1:
        task_ids = None
    is_batch = mean is None or var is None
    if mean is None or var is None:
        mean, var = _batch_norm_statistics(x.detach())
    options = (eps, act, residual, residual_after_act, is_batch)
    out = _batch_norm_act(needs_grad(x, weight, bias, residual), x, weight, bias, task_ids, mean, var, *options)
    return out, mean, var
