"""Activations and their derivatives in Triton, on float32 values."""

import triton
import triton.language as tl


@triton.jit
def _clamp(b_x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """A NaN stays one, so that a wrong task id shows."""
    return tl.where(b_x <= LOW, LOW, tl.where(b_x >= HIGH, HIGH, b_x))


@triton.jit
def activate(b_x, ACT: tl.constexpr):
    if ACT == "relu":
        b_x = tl.where(b_x <= 0.0, 0.0, b_x)
    elif ACT == "relu6":
        b_x = _clamp(b_x, 0.0, 6.0)
    elif ACT == "silu":
        b_x *= tl.sigmoid(b_x)
    elif ACT == "hard_swish":
        b_x *= _clamp(b_x + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACT == "gelu":
        b_x *= normal_cdf(b_x)
    return b_x


@triton.jit
def activation_slope(b_x, ACT: tl.constexpr):
    """The activation's derivative."""
    if ACT == "relu":
        b_x = tl.where(b_x > 0.0, 1.0, 0.0)
    elif ACT == "relu6":
        b_x = tl.where((b_x > 0.0) & (b_x < 6.0), 1.0, 0.0)
    elif ACT == "silu":
        b_gate = tl.sigmoid(b_x)
        b_x = b_gate * (1.0 + b_x * (1.0 - b_gate))
    elif ACT == "hard_swish":
        b_x = tl.where(b_x <= -3.0, 0.0, tl.where(b_x >= 3.0, 1.0, b_x * (1.0 / 3.0) + 0.5))
    elif ACT == "gelu":
        b_x = gelu_slope(b_x)
    return b_x


@triton.jit
def normal_cdf(b_z):
    return 0.5 * (1.0 + tl.erf(b_z * 0.7071067811865476))


@triton.jit
def gelu_slope(b_z):
    """d GELU(z) / d z = cdf(z) + z * density(z)."""
    return normal_cdf(b_z) + b_z * (0.3989422804014327 * tl.exp(-0.5 * b_z * b_z))
