"""Linear layers with what follows them: GELU; or LayerScale, DropPath and residual add.

    linear_gelu: out = GELU(x weight^T + bias)                                     exact GELU (erf), as timm's
    linear_add:  out = residual + keep[b] * scale[d] * (x weight^T + bias)         the new residual stream

Shapes: x (B, N, K); weight (F, K) and bias (F,) as in nn.Linear; for linear_add F is D: residual, out (B, N, D), scale
(D,), keep (B,).
"""

import torch
import torch.nn.functional as F

from ..common.checks import check_shape
from ..dispatch import has_triton, prefers_triton

if has_triton():
    from .operator import fused_linear_add, fused_linear_gelu


def linear_gelu_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The specification of `linear_gelu`: timm's fc1 and act, bit for bit."""
    return F.gelu(linear(x, weight, bias))


def linear_add_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `linear_add`: timm's fc2, LayerScale, DropPath and residual add, bit for bit."""
    y = linear(x, weight, bias)
    if scale is not None:
        y = y * scale
    if keep is not None:
        y = y * keep.to(y.dtype).view(-1, 1, 1)
    return (residual + y).to(residual.dtype)


def linear(x, weight, bias):
    """F.linear in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def check_arguments(x, weight, bias) -> None:
    """Raise ValueError for shapes that no linear layer takes."""
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be (B, N, K) with K at least 1, got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"weight must be (F, K) with F at least 1 and K = {x.shape[2]}, got shape {tuple(weight.shape)}"
        )
    check_shape("bias", bias, (weight.shape[0],))


def run_linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, fused: bool | None = None
) -> torch.Tensor:
    """`linear_gelu`; `fused`: what `prefers_triton` said, for a caller that has asked it."""
    check_arguments(x, weight, bias)
    if prefers_triton("linear_gelu", x, min(weight.shape)) if fused is None else fused:
        return fused_linear_gelu(x, weight.to(x.dtype), bias)
    return linear_gelu_reference(x, weight, bias)


def run_linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    keep: torch.Tensor | None,
    fused: bool | None = None,
) -> torch.Tensor:
    """`linear_add`; `fused`: what `prefers_triton` said, for a caller that has asked it."""
    check_arguments(x, weight, bias)
    check_shape("residual", residual, (*x.shape[:2], weight.shape[0]))
    check_shape("scale", scale, (weight.shape[0],))
    check_shape("keep", keep, (x.shape[0],))
    if keep is not None and (keep.dtype != torch.float32 or keep.requires_grad):
        kind = f"{keep.dtype} with requires_grad={keep.requires_grad}"
        raise ValueError(f"keep must be torch.float32 without a gradient, got {kind}")
    if prefers_triton("linear_add", x, min(weight.shape)) if fused is None else fused:
        return fused_linear_add(x, weight.to(x.dtype), bias, residual, scale, keep)
    return linear_add_reference(x, weight, bias, residual, scale, keep)


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer and the exact GELU in one pass: the pre-activation never leaves the product, or once for backward.

    Args:
        x: (B, N, K), float32, bfloat16 or float16.
        weight: (F, K), cast to x's dtype where it has another, as under autocast.
        bias: (F,) or None, likewise; added in float32.

    Returns:
        (B, N, F) of x's dtype.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    return run_linear_gelu(x, weight, bias)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer, its scaling, and the residual add in one pass, which writes the new stream.

    Args:
        x: (B, N, K), float32, bfloat16 or float16.
        weight: (D, K), cast to x's dtype where it has another, as under autocast.
        bias: (D,) or None, likewise; added in float32.
        residual: (B, N, D), the stream; its dtype may differ from x's.
        scale: (D,), LayerScale's gamma, or None.
        keep: (B,) float32, DropPath's factor for each sample: 0 or 1 / (1 - p); None keeps all. It has no gradient.

    Returns:
        residual + keep * scale * (x weight^T + bias), (B, N, D) of residual's dtype.

    Raises:
        ValueError: for shapes and dtypes other than these.
    """
    return run_linear_add(x, weight, bias, residual, scale, keep)
