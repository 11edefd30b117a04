"""Mixed batches of the batch norm in plain PyTorch: fast on a CPU, and traceable.

    out = (x - mean) * rsqrt(var + eps) * weight[b] + bias[b] = x * scale[b] + shift[b]      scale, shift (B, C)

Eager calls choose the operators that PyTorch has vectorised for the memory format: addcmul channels-last, and, since
that is scalar where channels are outermost, F.batch_norm of x seen as (1, B * C, H, W). What traces sees the equation.
"""

import torch
import torch.nn.functional as F

from ..common.autograd import traced_gradients
from ..common.private_api import batch_norm_update_stats, native_batch_norm_backward, unsafe_view
from ..dispatch import is_traced


def mixed(x, weight, bias, mean, var, eps, is_batch) -> torch.Tensor:
    """Row b of weight and bias (B, C) for sample b; mean, var (C,) or (B, C); `is_batch`: they are functions of x."""
    if is_traced():
        return _mixed_plain(x, weight, bias, mean, var, eps)
    x = x if _is_dense(x) else x.contiguous()
    arguments = (x, weight, bias, mean.detach(), var.detach(), eps)
    return _MixedBatchNorm.apply(*arguments, is_batch) if torch.is_grad_enabled() else _mixed_eager(*arguments)


def _mixed_plain(x, weight, bias, mean, var, eps) -> torch.Tensor:
    """The same in operations that anything can trace; a gradient flows through mean and var, if they have one."""
    scale = weight * torch.rsqrt(var + eps)
    return torch.addcmul(_spread(bias - mean * scale), x, _spread(scale))


def _spread(rows: torch.Tensor) -> torch.Tensor:
    return rows.unsqueeze(-1).unsqueeze(-1)


def _mixed_eager(x, weight, bias, mean, var, eps) -> torch.Tensor:
    """One pass. On a CPU addcmul is scalar unless channels are innermost, F.batch_norm is not."""
    if is_flat(x):
        return _flat_batch_norm(x, mean, var, weight, bias, eps)
    scale = weight * torch.rsqrt(var + eps)
    return _affine(x, scale, torch.addcmul(bias, mean, scale, value=-1.0))


def is_flat(x: torch.Tensor) -> bool:
    """Whether `_flat_batch_norm` is the fast way."""
    return x.device.type == "cpu" and x.is_contiguous() and x.numel() > 0


def _flat_batch_norm(x, mean, var, weight, bias, eps) -> torch.Tensor:
    """F.batch_norm of contiguous x with rows (B, C), or (C,) for all samples, seen as (1, B * C, H, W)."""
    B, C, H, W = x.shape
    mean, var, weight, bias = (rows.expand(B, C).reshape(-1) for rows in (mean, var, weight, bias))
    out = F.batch_norm(x.view(1, B * C, H, W), mean, var, weight, bias, False, 0.0, eps)
    return unsafe_view(out, x.shape)  # no view, which autograd lets nobody write over


def _affine(x, scale, shift) -> torch.Tensor:
    """x * scale + shift, rows (B, C) or (C,): one pass."""
    if is_flat(x):
        return _flat_batch_norm(x, scale.new_zeros(1), scale.new_ones(1), scale, shift, 0.0)
    return torch.addcmul(_spread(shift), x, _spread(scale), out=torch.empty_like(x))


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of each channel; under a tracer with their gradients."""
    if is_traced():
        return _statistics_plain(x)
    with torch.no_grad():
        x = x if _is_dense(x) else x.contiguous()
        if not is_flat(x):
            return batch_norm_update_stats(x, None, None, 0.0)
        mean = x.mean((0, 2, 3))  # PyTorch's own statistics of contiguous channels are scalar
        deviation = torch.linalg.vector_norm((x - _spread(mean)).flatten(2), dim=2)
        return mean, deviation.square().sum(0) / (x.numel() // x.shape[1])


def _statistics_plain(x) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in operations that anything can trace, with their gradients."""
    mean = x.mean((0, 2, 3))
    return mean, (x - _spread(mean)).square().mean((0, 2, 3))


def _sample_sums(grad, x, mean, rstd) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (B, C) over each sample's pixels of grad, and of grad * xhat; grad has x's format."""
    B, C, H, W = x.shape
    if x.device.type != "cpu" or not x.numel():
        return grad.sum((2, 3)), ((x - _spread(mean)) * grad).sum((2, 3)) * rstd
    mean, rstd = mean.expand(B, C), rstd.expand(B, C)
    if is_flat(x):
        views, statistics = (t.view(1, B * C, H, W) for t in (grad, x)), (t.reshape(-1) for t in (mean, rstd))
        sums, products = _channel_sums(*views, *statistics)
        return sums.view(B, C), products.view(B, C)
    each = [_channel_sums(grad[b : b + 1], x[b : b + 1], mean[b], rstd[b]) for b in range(B)]
    sums, products = (torch.stack(rows) for rows in zip(*each))
    return sums, products


def _channel_sums(grad, x, mean, rstd) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (C,) of grad and of grad * xhat in one pass: what F.batch_norm's backward calls d bias and d weight."""
    rows, wanted = (None, None, None, mean, rstd), (True, 0.0, [False, True, True])
    _, products, sums = native_batch_norm_backward(grad, x, *rows, *wanted)
    return sums, products


class _MixedBatchNorm(torch.autograd.Function):
    """The same with a gradient that keeps x alone and reads it twice, forward's way: per-sample sums, then d x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, is_batch):
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.eps, ctx.is_batch = eps, is_batch
        return _mixed_eager(x, weight, bias, mean, var, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient's own gradient: autograd writes that graph

            def plain(x, weight, bias):
                seen_mean, seen_var = _statistics_plain(x) if ctx.is_batch else (mean, var)
                return _mixed_plain(x, weight, bias, seen_mean, seen_var, ctx.eps)

            return *traced_gradients(plain, (x, weight, bias), grad, ctx.needs_input_grad), *[None] * 4
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rstd = torch.rsqrt(var + ctx.eps)
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad, grad_x = grad.contiguous(memory_format=layout), None
        if need_weight or need_bias or ctx.is_batch:
            sums, products = _sample_sums(grad, x, mean, rstd)
        if need_x and not ctx.is_batch:
            grad_x = grad * _spread(weight * rstd)
        elif need_x:
            count = x.numel() // x.shape[1]
            slope = (weight * products).sum(0) * rstd.square() / -count
            offset = (weight * sums).sum(0) * rstd / -count - mean * slope
            grad_x = _affine(x, slope, offset).addcmul_(grad, _spread(weight * rstd))
        return grad_x, products if need_weight else None, sums if need_bias else None, *[None] * 4
