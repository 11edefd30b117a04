"""Layer norm with each sample's own rows in the prologue of the product that reads it."""

from .functional import (
    norm_linear,
    norm_linear_gelu,
    norm_linear_gelu_reference,
    norm_linear_reference,
)

__all__ = [
    "norm_linear",
    "norm_linear_gelu",
    "norm_linear_gelu_reference",
    "norm_linear_reference",
]
