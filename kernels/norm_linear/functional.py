"""Layer norm with each sample's own rows as the prologue of a product: QKV, and fc1 with its GELU.

    h = layer_norm(x, norm_weight, norm_bias, task_ids, eps)
    norm_linear:      out = h weight^T + bias
    norm_linear_gelu: out = GELU(h weight^T + bias)                                exact GELU (erf), as timm's

Shapes: x (B, N, D), the stream with nothing left to add; norm_weight, norm_bias (T, D); task_ids (B,) or None; weight
(F, D), bias (F,) as in nn.Linear; out (B, N, F).

In units of B * N * D elements the fusion saves 2: h is neither written nor read. It is for inference. Backward needs h,
and to compute it again moves the same 2 (3 where the stream is float32 and h is not), so where a gradient is needed
nothing is saved but memory, and the norm and the product run one after the other.
"""

import torch

from ..common.autograd import needs_grad
from ..common.rows import Rows
from ..dispatch import has_triton, is_preferred, use_triton
from ..layer_norm.functional import check_arguments as check_norm_arguments
from ..layer_norm.functional import layer_norm, layer_norm_reference
from ..linear.functional import check_arguments, linear, linear_gelu, linear_gelu_reference
from ..tables import choose_norm_tiles

if has_triton():
    from .operator import fused_norm_linear


def norm_linear_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The specification of `norm_linear` in plain PyTorch: the norm rounded to `out_dtype`, then the product."""
    h = layer_norm_reference(x, norm_weight, norm_bias, task_ids, eps, out_dtype)
    return linear(h, weight, bias)


def norm_linear_gelu_reference(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The specification of `norm_linear_gelu` in plain PyTorch."""
    h = layer_norm_reference(x, norm_weight, norm_bias, task_ids, eps, out_dtype)
    return linear_gelu_reference(h, weight, bias)


def run_norm_linear(
    x: torch.Tensor,
    rows: Rows,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    gelu: bool,
    fused: bool | None = None,
) -> torch.Tensor:
    """`norm_linear_gelu`, or `norm_linear`, for a caller that may know who computes it.

    Args:
        x: (B, N, D), as all others of `norm_linear`.
        rows: norm_weight and norm_bias (T, D), and task_ids (B,) or None.
        eps: added to the variance.
        weight: (F, D).
        bias: (F,) or None.
        out_dtype: dtype of the normalised x, of the product and of the output, x's by default.
        gelu: whether the GELU follows.
        fused: whether one kernel computes it: `use_triton` and `fits_one_kernel` said so, and no gradient is needed;
            None: ask.
    """
    check_norm_arguments(x, None, rows, prefix="norm_")
    check_arguments(x, weight, bias)
    out_dtype = out_dtype or x.dtype
    if fused is None:
        fused = not needs_grad(x, rows.weight, rows.bias, weight, bias)
        fused = fused and use_triton(x) and fits_one_kernel(x, out_dtype, gelu)
    if fused:
        return fused_norm_linear(x, rows, eps, weight, bias, out_dtype, gelu)
    h = layer_norm(x, *rows, eps, out_dtype)
    return linear_gelu(h, weight, bias) if gelu else linear(h, weight, bias)


def fits_one_kernel(x: torch.Tensor, dtype: torch.dtype, gelu: bool) -> bool:
    """Whether one Triton kernel is to compute norm and product of x in `dtype`, where no gradient is needed."""
    width = x.shape[-1]
    return (
        is_preferred("norm_linear_gelu" if gelu else "norm_linear", x, width, dtype)
        and dtype.itemsize == 2
        and choose_norm_tiles(x.device, width) is not None
    )


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Layer norm with each sample's own rows, and the linear layer that reads it, in one pass.

    Args:
        x: (B, N, D), float32, bfloat16 or float16.
        norm_weight: (T, D), x's dtype or float32; see `layer_norm`.
        norm_bias: (T, D), norm_weight's dtype.
        task_ids: (B,) int64 or int32, row of each sample; None where T is 1 or B.
        eps: added to the variance.
        weight: (F, D), cast to `out_dtype` where it has another, as under autocast.
        bias: (F,) or None, likewise; added in float32.
        out_dtype: dtype of the normalised x, of the product and of the output, x's by default.

    Returns:
        (B, N, F) of `out_dtype`.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    return run_norm_linear(x, Rows(norm_weight, norm_bias, task_ids), eps, weight, bias, out_dtype, gelu=False)


def norm_linear_gelu(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    task_ids: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`norm_linear` and the exact GELU of its result, in one pass. Where it is not chosen, `linear_gelu` may be.

    Args:
        x: (B, N, D); all arguments as `norm_linear`'s.
        norm_weight: (T, D).
        norm_bias: (T, D).
        task_ids: (B,) or None.
        eps: added to the variance.
        weight: (F, D).
        bias: (F,) or None.
        out_dtype: dtype of the normalised x, of the product and of the output, x's by default.

    Returns:
        (B, N, F) of `out_dtype`.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    return run_norm_linear(x, Rows(norm_weight, norm_bias, task_ids), eps, weight, bias, out_dtype, gelu=True)
