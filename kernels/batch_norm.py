"""BatchNorm2d whose weight and bias belong to the sample, with what timm puts behind it: activation and residual add.

    normed = (x - mean) * rsqrt(var + eps) * weight[t_b] + bias[t_b]     mean, var over channels: given, or the batch's
    out    = act(normed + residual), or act(normed) + residual           ResNet's order, or EfficientNet's

Shapes: x, residual, out (B, C, H, W), contiguous or channels-last; weight, bias (T, C) with any row stride; task_ids
(B,) or None (T is 1 or B); mean, var (C,), or (T, C) for statistics that belong to the task, too.
"""

import torch
import torch.nn.functional as F

ACTS = {
    "none": lambda x, inplace: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hard_swish": F.hardswish,
    "gelu": lambda x, inplace: torch.ops.aten.gelu_(x) if inplace else F.gelu(x),
}


def batch_norm_act_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
    residual_after_act: bool = False,
) -> torch.Tensor:
    """The specification of `batch_norm_act` in plain PyTorch; with one row it is F.batch_norm and act, bit for bit."""
    if weight.shape[0] == 1:
        rows = _shared(x, weight, bias, mean, var)
        normed = F.batch_norm(x, rows[2], rows[3], rows[0], rows[1], False, 0.0, eps)
        return _finish(normed, act, residual, residual_after_act)
    weight, bias = _rows_of_samples(x, task_ids, weight, bias)
    if mean.dim() == 2:
        mean, var = _rows_of_samples(x, task_ids, mean, var)
    normed = _mixed(x.to(weight.dtype), weight, bias, mean.to(weight.dtype), var.to(weight.dtype), eps, False)
    return _finish(normed.to(x.dtype), act, residual, residual_after_act)


def batch_norm_act_train_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
    residual_after_act: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of `batch_norm_act_train` in plain PyTorch; with one row out is F.batch_norm's, bit for bit."""
    count = x.numel() // x.shape[1]
    if weight.shape[0] == 1:
        mean, var = weight.new_zeros(weight.shape[1]), weight.new_zeros(weight.shape[1])
        weight, bias, mean, var = _shared(x, weight, bias, mean, var)
        normed = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)  # which leaves mean and var in its buffers
        mean, var = mean.to(_compute(x)), var.to(_compute(x)) * ((count - 1) / count)
    else:
        weight, bias = _rows_of_samples(x, task_ids, weight, bias)
        wide = x.to(weight.dtype)
        mean, var = _statistics(wide)
        normed = _mixed(wide, weight, bias, mean, var, eps, True).to(x.dtype)
    return _finish(normed, act, residual, residual_after_act), mean.detach(), var.detach()


def _compute(*tensors: torch.Tensor) -> torch.dtype:
    """float32, or float64 where a tensor has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _shared(x, *vectors) -> list[torch.Tensor]:
    """One row each, (C,), in dtypes that F.batch_norm takes: all x's own, or all float32."""
    dtype = x.dtype if all(vector.dtype == x.dtype for vector in vectors) else _compute(x)
    return [vector.reshape(-1).to(dtype) for vector in vectors]


def _rows_of_samples(x, task_ids, *tables) -> list[torch.Tensor]:
    """Row b (B, C) for sample b, float32 or wider."""
    dtype = _compute(x, *tables)
    return [(table if task_ids is None else F.embedding(task_ids, table)).to(dtype) for table in tables]


def _finish(normed, act, residual, residual_after_act) -> torch.Tensor:
    """Activation and residual add, written over `normed` where nobody needs it any more."""
    inplace = _is_eager() and not normed.requires_grad
    if residual is not None and not residual_after_act:
        normed = _add(normed, residual)
    normed = ACTS[act](normed, inplace=inplace and not normed.requires_grad)
    return normed if residual is None or not residual_after_act else _add(normed, residual)


def _add(normed, residual) -> torch.Tensor:
    inplace = _is_eager() and not normed.requires_grad and not residual.requires_grad
    return normed.add_(residual) if inplace else normed + residual


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _mixed(x, weight, bias, mean, var, eps, is_batch) -> torch.Tensor:
    """Row b of weight and bias (B, C) for sample b; mean, var (C,) or (B, C); `is_batch`: they are functions of x."""
    if not _is_eager():
        return _mixed_plain(x, weight, bias, mean, var, eps)
    x = x if _is_dense(x) else x.contiguous()
    arguments = (x, weight, bias, mean.detach(), torch.rsqrt(var.detach() + eps))
    return _MixedBatchNorm.apply(*arguments, eps, is_batch) if torch.is_grad_enabled() else _mixed_eager(*arguments)


def _mixed_plain(x, weight, bias, mean, var, eps) -> torch.Tensor:
    """The same in operations that anything can trace; a gradient flows through mean and var, if they have one."""
    scale = weight * torch.rsqrt(var + eps)
    return torch.addcmul(_spread(bias - mean * scale), x, _spread(scale))


def _spread(rows: torch.Tensor) -> torch.Tensor:
    return rows.unsqueeze(-1).unsqueeze(-1)


def _mixed_eager(x, weight, bias, mean, rstd) -> torch.Tensor:
    scale = weight * rstd
    return _affine(x, scale, bias - mean * scale)


def _affine(x, scale, shift, out=None) -> torch.Tensor:
    """x * scale + shift, rows (B, C) or (C,): one pass. On a CPU addcmul is scalar unless channels are innermost."""
    B, C, H, W = x.shape
    if x.device.type != "cpu" or not x.is_contiguous():
        return torch.addcmul(_spread(shift.expand(B, C)), x, _spread(scale.expand(B, C)), out=_like(x, out))
    rows = (rows.expand(B, C).reshape(-1) for rows in (scale, shift))
    out = F.batch_norm(x.view(1, B * C, H, W), *_identity(B * C, x), *rows, False, 0.0, 0.0)
    return torch.ops.aten._unsafe_view(out, x.shape)  # no view, which autograd would not let others write over


def _like(x, out):
    return torch.empty_like(x) if out is None else out


def _identity(channels: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Statistics that change nothing."""
    return like.new_zeros(channels), like.new_ones(channels)


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of each channel; under a tracer with their gradients."""
    if not _is_eager():
        mean = x.mean((0, 2, 3))
        return mean, (x - _spread(mean)).square().mean((0, 2, 3))
    with torch.no_grad():
        x = x if _is_dense(x) else x.contiguous()
        if x.device.type != "cpu" or not x.is_contiguous():
            return torch.batch_norm_update_stats(x, None, None, 0.0)
        mean = x.mean((0, 2, 3))  # PyTorch's own statistics of contiguous channels are scalar
        deviation = torch.linalg.vector_norm((x - _spread(mean)).flatten(2), dim=2)
        return mean, deviation.square().sum(0) / (x.numel() // x.shape[1])


def _sample_sums(grad, x, mean, rstd, scratch=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (B, C) over each sample's pixels of grad, and of grad * xhat; `scratch` (B, C, H, W) is written over."""
    B, C, H, W = x.shape
    mean, rstd = mean.expand(B, C), rstd.expand(B, C)
    if x.device.type != "cpu" or not x.is_contiguous():
        products = torch.sub(x, _spread(mean), out=_like(x, scratch)).mul_(grad)
        return grad.sum((2, 3)), products.sum((2, 3)) * rstd
    views, statistics = (t.view(1, B * C, H, W) for t in (grad, x)), (t.reshape(-1) for t in (mean, rstd))
    wanted = (True, 0.0, [False, True, True])
    _, products, sums = torch.ops.aten.native_batch_norm_backward(*views, None, None, None, *statistics, *wanted)
    return sums.view(B, C), products.view(B, C)


class _MixedBatchNorm(torch.autograd.Function):
    """The same with a gradient that keeps x alone and reads it twice, forward's way: per-sample sums, then d x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, rstd, eps, is_batch):
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.is_batch = eps, is_batch
        return _mixed_eager(x, weight, bias, mean, rstd)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient's own gradient: autograd writes that graph
            return *_grad_of_plain(ctx, x, weight, bias, mean, rstd, grad), *[None] * 4
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad, scratch, grad_x = grad.contiguous(memory_format=layout), None, None
        if need_weight or need_bias or ctx.is_batch:
            scratch = None if x.is_contiguous() or not need_x else torch.empty_like(x)
            sums, products = _sample_sums(grad, x, mean, rstd, scratch)
        if need_x and not ctx.is_batch:
            grad_x = torch.mul(grad, _spread(weight * rstd), out=scratch)
        elif need_x:
            count = x.numel() // x.shape[1]
            slope = (weight * products).sum(0) * rstd.square() / -count
            offset = (weight * sums).sum(0) * rstd / -count - mean * slope
            grad_x = _affine(x, slope, offset, scratch).addcmul_(grad, _spread(weight * rstd))
        return grad_x, products if need_weight else None, sums if need_bias else None, *[None] * 4


def _grad_of_plain(ctx, x, weight, bias, mean, rstd, grad) -> list[torch.Tensor | None]:
    needed = [t for t, need in zip((x, weight, bias), ctx.needs_input_grad) if need]
    if ctx.is_batch:
        mean = x.mean((0, 2, 3))
        var = (x - _spread(mean)).square().mean((0, 2, 3))
    else:
        var = rstd.square().reciprocal() - ctx.eps
    grads = iter(
        torch.autograd.grad(_mixed_plain(x, weight, bias, mean, var, ctx.eps), needed, grad, create_graph=True)
    )
    return [next(grads) if need else None for need in ctx.needs_input_grad[:3]]


def _check(x, weight, bias, task_ids, act, residual) -> None:
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be (B, C, H, W) with C at least 1, got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be (T, C) with C = {x.shape[1]}, got shape {tuple(weight.shape)}")
    if bias.shape != weight.shape or bias.dtype != weight.dtype:
        raise ValueError(
            f"bias must have weight's shape and dtype {tuple(weight.shape)}, {weight.dtype}, "
            f"got {tuple(bias.shape)}, {bias.dtype}"
        )
    if task_ids is None:
        if weight.shape[0] != 1 and weight.shape[0] != x.shape[0]:
            raise ValueError(f"task_ids must be given unless T is 1 or B: T = {weight.shape[0]}, B = {x.shape[0]}")
    elif task_ids.dim() != 1 or task_ids.shape[0] != x.shape[0]:
        raise ValueError(f"task_ids must be (B,) with B = {x.shape[0]}, got shape {tuple(task_ids.shape)}")
    elif task_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"task_ids must be int64 or int32, got {task_ids.dtype}")
    if act not in ACTS:
        raise ValueError(f"act must be one of {tuple(ACTS)}, got {act!r}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must have x's shape and dtype {tuple(x.shape)}, {x.dtype}, "
            f"got {tuple(residual.shape)}, {residual.dtype}"
        )


def _check_statistics(mean, var, weight) -> None:
    T, C = weight.shape
    if mean.shape not in ((C,), (T, C)):
        raise ValueError(f"mean must be (C,) or (T, C) with C = {C}, T = {T}, got shape {tuple(mean.shape)}")
    if var.shape != mean.shape:
        raise ValueError(f"var must have mean's shape {tuple(mean.shape)}, got {tuple(var.shape)}")
    if mean.requires_grad or var.requires_grad:
        raise ValueError("mean and var must not require a gradient: they are given, got requires_grad=True")


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
    residual_after_act: bool = False,
) -> torch.Tensor:
    """Batch normalisation by given statistics with each sample's own weight and bias, activation and residual add.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16, contiguous or channels-last: out has its format.
        weight: (T, C), x's dtype or float32; rows may be strided, columns may not.
        bias: (T, C), weight's dtype.
        task_ids: (B,) int64 or int32, row of each sample; None where T is 1 (shared row) or B (row b for sample b).
        mean: (C,), or (T, C) for each task's own; without a gradient.
        var: the variance, mean's shape.
        eps: added to the variance.
        act: "none", "relu", "relu6", "silu", "hard_swish" or "gelu" (exact).
        residual: (B, C, H, W), x's dtype, or None.
        residual_after_act: out is act(normed) + residual (EfficientNet), not act(normed + residual) (ResNet).

    Returns:
        (B, C, H, W) of x's dtype.

    Raises:
        ValueError: for shapes, dtypes and words other than these.
    """
    _check(x, weight, bias, task_ids, act, residual)
    _check_statistics(mean, var, weight)
    return batch_norm_act_reference(x, weight, bias, task_ids, mean, var, eps, act, residual, residual_after_act)


def batch_norm_act_train(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
    residual_after_act: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`batch_norm_act` by the statistics of the whole batch, through which gradients flow as in F.batch_norm.

    Args:
        x: (B, C, H, W) with more than one value in a channel; see `batch_norm_act`, as for all others.
        weight: (T, C).
        bias: (T, C).
        task_ids: (B,) or None.
        eps: added to the variance.
        act: the activation's name.
        residual: (B, C, H, W) or None.
        residual_after_act: whether it is added behind the activation.

    Returns:
        out (B, C, H, W) of x's dtype; mean (C,) and biased variance (C,) in float32, without a gradient: running
        statistics are the caller's.

    Raises:
        ValueError: for shapes, dtypes and words other than these.
    """
    _check(x, weight, bias, task_ids, act, residual)
    if x.numel() <= x.shape[1]:
        raise ValueError(f"x must have more than one value in a channel for training, got shape {tuple(x.shape)}")
    return batch_norm_act_train_reference(x, weight, bias, task_ids, eps, act, residual, residual_after_act)
