"""The operator behind `norm_linear` and `norm_linear_gelu`: checks and torch.compile; it has no gradient.

Eager calls go straight to the launch; what traces (torch.compile, export, fake tensors) sees the operator
`hyperclip_fast::norm_linear`.
"""

import torch

from ..common.launch import Rows
from ..common.operator import contiguous, dense_columns, is_plain
from ..layer_norm.operator import check_fused as check_norm_fused
from ..linear.operator import check_fused
from .launch import launch_norm_linear


def _forward(x, norm_weight, norm_bias, task_ids, eps, weight, bias, gelu):
    rows = Rows(dense_columns(norm_weight), dense_columns(norm_bias), contiguous(task_ids))
    with torch.cuda.device_of(x):
        return launch_norm_linear(x.contiguous(), rows, eps, weight.contiguous(), contiguous(bias), gelu)


torch.library.define(
    "hyperclip_fast::norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? task_ids, float eps, Tensor weight, Tensor? bias, "
    "bool gelu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("hyperclip_fast::norm_linear", "default")(_forward)


@torch.library.register_fake("hyperclip_fast::norm_linear")
def _forward_fake(x, norm_weight, norm_bias, task_ids, eps, weight, bias, gelu):
    return weight.new_empty(*x.shape[:2], weight.shape[0])


def fused_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    task_ids: torch.Tensor | None,
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
    check_norm_fused(x, None, norm_weight, norm_bias, task_ids, out_dtype, prefix="norm_")
    check_fused(x, weight=weight, bias=bias)
    if norm_weight.shape[0] == 1:
        task_ids = None
    forward = _forward if is_plain(x) else torch.ops.hyperclip_fast.norm_linear
    return forward(x, norm_weight, norm_bias, task_ids, eps, weight.to(out_dtype), bias, gelu)
