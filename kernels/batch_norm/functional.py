"""BatchNorm2d whose weight and bias belong to the sample, with what timm puts behind it: activation and residual add.

    normed = (x - mean) * rsqrt(var + eps) * weight[t_b] + bias[t_b]     mean, var over channels: given, or the batch's
    out    = act(normed + residual), or act(normed) + residual           ResNet's order, or EfficientNet's

Shapes: x, residual, out (B, C, H, W), contiguous or channels-last; weight, bias (T, C) with any row stride; task_ids
(B,) or None (T is 1 or B); mean, var (C,), or (T, C) for statistics that belong to the task, too.
"""

import torch
import torch.nn.functional as F

from ..common.checks import check_rows
from ..common.private_api import gelu_
from ..common.rows import Rows
from ..dispatch import has_triton, is_traced, use_triton
from .mixed import mixed, statistics

if has_triton():
    from .operator import fused_batch_norm_act

ACTS = {
    "none": lambda x, inplace: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hard_swish": F.hardswish,
    "gelu": lambda x, inplace: gelu_(x) if inplace else F.gelu(x),
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
    normed = mixed(x.to(weight.dtype), weight, bias, mean.to(weight.dtype), var.to(weight.dtype), eps, False)
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
        weight, bias = _shared(x, weight, bias)
        mean, var = weight.new_zeros(weight.shape[0]), weight.new_zeros(weight.shape[0])
        normed = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)  # which leaves mean and var in its buffers
        var = var * ((count - 1) / count)
        if mean.dtype != _compute(x):  # the buffers have the rows' dtype, in which a variance may be infinite
            mean, var = statistics(x.to(_compute(x)))
    else:
        weight, bias = _rows_of_samples(x, task_ids, weight, bias)
        wide = x.to(weight.dtype)
        mean, var = statistics(wide)
        normed = mixed(wide, weight, bias, mean, var, eps, True).to(x.dtype)
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
    inplace = not is_traced() and not normed.requires_grad
    if residual is not None and not residual_after_act:
        normed = _add(normed, residual)
    normed = ACTS[act](normed, inplace=inplace and not normed.requires_grad)
    return normed if residual is None or not residual_after_act else _add(normed, residual)


def _add(normed, residual) -> torch.Tensor:
    inplace = not is_traced() and not normed.requires_grad and not residual.requires_grad
    return normed.add_(residual) if inplace else normed + residual


def _check(x, weight, bias, task_ids, act, residual) -> None:
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be (B, C, H, W) with C at least 1, got shape {tuple(x.shape)}")
    check_rows(Rows(weight, bias, task_ids), x.shape[0], x.shape[1], "C")
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
    if use_triton(x):
        return fused_batch_norm_act(x, weight, bias, task_ids, mean, var, eps, act, residual, residual_after_act)[0]
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
    if use_triton(x):
        return fused_batch_norm_act(x, weight, bias, task_ids, None, None, eps, act, residual, residual_after_act)
    return batch_norm_act_train_reference(x, weight, bias, task_ids, eps, act, residual, residual_after_act)
