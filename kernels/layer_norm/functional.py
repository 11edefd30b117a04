"""LayerNorm whose weight and bias belong to the sample: row `task_ids[b]` of a table, with the residual add fused in.

    total = x + delta                                          rounded to x's dtype, as eager PyTorch does
    out   = (total - mean) * rstd * weight[t_b] + bias[t_b]    mean, rstd over D in float32

Shapes: x, delta, out, total (B, N, D); weight, bias (T, D) with any row stride; task_ids (B,) or None (T is 1 or B).
"""

import functools

import torch
import torch.nn.functional as F

from ..common.autograd import traced_gradients
from ..common.checks import check_rows
from ..common.private_api import native_layer_norm, native_layer_norm_backward
from ..common.rows import Rows
from ..dispatch import get_backend, has_triton, is_traced, use_triton
from ..tables import MAX_WIDTH

if has_triton():
    from .operator import fused_layer_norm


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The specification of `layer_norm` in plain PyTorch; with one row it is F.layer_norm, bit for bit."""
    out_dtype, width = out_dtype or x.dtype, (x.shape[-1],)
    if weight.shape[0] == 1:
        if not x.dtype == weight.dtype == out_dtype:
            compute = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), out_dtype)
            x, weight, bias = x.to(compute), weight.to(compute), bias.to(compute)
        return F.layer_norm(x, width, weight[0], bias[0], eps).to(out_dtype)
    if task_ids is not None:
        weight, bias = weight[task_ids], bias[task_ids]
    compute = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    x = x.to(compute)
    weight, bias = weight.to(compute), bias.to(compute)
    if is_traced():
        return _mixed_layer_norm(x, weight, bias, eps).to(out_dtype)
    if torch.is_grad_enabled():
        return _MixedLayerNorm.apply(x, weight, bias, eps).to(out_dtype)
    return _mixed_layer_norm_eager(x, weight, bias, eps)[0].to(out_dtype)


def _normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x - mean) * rstd, mean, rstd."""
    D = x.shape[-1]
    return native_layer_norm(x, (D,), x.new_ones(D), x.new_zeros(D), eps)  # given None, the CPU kernel is scalar


def _mixed_layer_norm(x, weight, bias, eps) -> torch.Tensor:
    """Row b of weight and bias (B, D) for sample b of x (B, N, D), in operations that anything can trace."""
    return torch.addcmul(bias.unsqueeze(1), _normalize(x, eps)[0], weight.unsqueeze(1))


def _mixed_layer_norm_eager(x, weight, bias, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, written over the normed x, which nobody else has seen; and mean and rstd (B, N, 1)."""
    normed, mean, rstd = _normalize(x, eps)
    return torch.addcmul(bias.unsqueeze(1), normed, weight.unsqueeze(1), out=normed), mean, rstd


class _MixedLayerNorm(torch.autograd.Function):
    """The same with a gradient that keeps x alone; autograd's own would keep the normed x too, and read it again."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        out, mean, rstd = _mixed_layer_norm_eager(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient's own gradient: autograd writes that graph
            plain = functools.partial(_mixed_layer_norm, eps=ctx.eps)
            return *traced_gradients(plain, (x, weight, bias), grad, ctx.needs_input_grad), None
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x, grad_weight, scratch = None, None, None
        if need_weight:
            scratch = (x - mean).mul_(rstd).mul_(grad)
            grad_weight = scratch.sum(1)
        if need_x:
            scaled = torch.mul(grad, weight.unsqueeze(1), out=scratch)
            one, statistics = x.new_ones(x.shape[-1]), (x, x.shape[-1:], mean, rstd)
            grad_x = native_layer_norm_backward(scaled, *statistics, one, None, [True, False, False])[0]
        return grad_x, grad_weight, grad.sum(1) if need_bias else None, None


def add_layer_norm_reference(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `add_layer_norm` in plain PyTorch."""
    total = (x + delta).to(x.dtype)
    return layer_norm_reference(total, weight, bias, task_ids, eps, out_dtype), total


def check_arguments(x: torch.Tensor, delta: torch.Tensor | None, rows: Rows, prefix: str = "") -> None:
    """Raise ValueError for shapes that `add_layer_norm` does not take; `prefix`: of the rows' names."""
    shape = x.shape
    if len(shape) != 3:
        raise ValueError(f"x must be (B, N, D), got shape {tuple(shape)}")
    if delta is not None and delta.shape != shape:
        raise ValueError(f"delta must have x's shape {tuple(shape)}, got {tuple(delta.shape)}")
    check_rows(rows, shape[0], shape[2], prefix=prefix)


def run_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    rows: Rows,
    eps: float,
    out_dtype: torch.dtype | None = None,
    fused: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm`, or `layer_norm` and x itself where delta is None, for a caller that may know who computes it.

    Args:
        x: (B, N, D), as all others of `add_layer_norm`.
        delta: (B, N, D), or None.
        rows: weight and bias (T, D), and task_ids (B,) or None.
        eps: added to the variance.
        out_dtype: dtype of the normalised output, x's by default.
        fused: what `use_triton` said of x; None: ask it.
    """
    check_arguments(x, delta, rows)
    fused = use_triton(x) if fused is None else fused
    if fused and (x.size(2) <= MAX_WIDTH or get_backend() == "triton"):
        out, total = fused_layer_norm(x, delta, rows, eps, out_dtype or x.dtype)
        return out, x if total is None else total
    if delta is None:
        return layer_norm_reference(x, *rows, eps, out_dtype), x
    return add_layer_norm_reference(x, delta, *rows, eps, out_dtype)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Layer normalisation over D with each sample's own weight and bias.

    Args:
        x: (B, N, D), float32, bfloat16 or float16.
        weight: (T, D), x's dtype or float32; rows may be strided, columns may not.
        bias: (T, D), weight's dtype.
        task_ids: (B,) int64 or int32, row of each sample; None where T is 1 (shared row) or B (row b for sample b).
        eps: added to the variance.
        out_dtype: dtype of the output, x's by default.

    Returns:
        (B, N, D) of `out_dtype`.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    return run_layer_norm(x, None, Rows(weight, bias, task_ids), eps, out_dtype)[0]


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual add, then `layer_norm` of the sum: the two memory-bound steps between two products, in one pass.

    Args:
        x: (B, N, D), the residual stream.
        delta: (B, N, D), what the last sub-layer adds to it; its dtype may be narrower than x's.
        weight: (T, D); see `layer_norm`.
        bias: (T, D).
        task_ids: (B,) or None.
        eps: added to the variance.
        out_dtype: dtype of the normalised output, x's by default.

    Returns:
        out (B, N, D) of `out_dtype`, and total = x + delta (B, N, D) of x's dtype.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    return run_layer_norm(x, delta, Rows(weight, bias, task_ids), eps, out_dtype)
