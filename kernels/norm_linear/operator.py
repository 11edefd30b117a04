"""The operator behind `norm_linear` and `norm_linear_gelu`: checks and torch.compile; it has no gradient.

Eager calls go straight to the launch; what traces (torch.compile, export, fake tensors) sees the operator
`hyperclip_fast::norm_linear`.
"""

import torch

from ..common.operator import contiguous, register
from ..common.rows import Rows, dense_rows
from ..layer_norm.operator import check_fused as check_norm_fused
from ..linear.operator import check_fused
from .launch import launch_norm_linear


def _forward(x, norm_weight, norm_bias, task_ids, eps, weight, bias, gelu):
    rows = dense_rows(norm_weight, norm_bias, task_ids)
    return launch_norm_linear(x.contiguous(), rows, eps, weight.contiguous(), contiguous(bias), gelu)


def _forward_fake(x, norm_weight, norm_bias, task_ids, eps, weight, bias, gelu):
    return weight.new_empty(*x.shape[:2], weight.shape[0])


_norm_linear = register(
    "norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? task_ids, float eps, Tensor weight, Tensor? bias, "
    "bool gelu) -> Tensor",
    _forward,
    _forward_fake,
)


def fused_norm_linear(
    x: torch.Tensor,
    rows: Rows,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    gelu: bool,
) -> torch.Tensor:
    """`norm_linear`, or `norm_linear_gelu`, by the Triton kernel; the caller has checked the shapes and the width.

    A task id outside [0, T) makes its sample's output NaN, as `layer_norm` does.

    Raises:
        ValueError: for dtypes and devices that the kernel does not take.
    """
    check_norm_fused(x, None, rows, out_dtype, prefix="norm_")
    check_fused(x, weight=weight, bias=bias)
    norm_weight, norm_bias, task_ids = rows
    if norm_weight.shape[0] == 1:
        task_ids = None
    return _norm_linear(x, norm_weight, norm_bias, task_ids, eps, weight.to(out_dtype), bias, gelu)
