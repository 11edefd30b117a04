"""Linear layers with what follows them in the product's epilogue."""

from .functional import (
    linear_add,
    linear_add_reference,
    linear_gelu,
    linear_gelu_reference,
)

__all__ = [
    "linear_add",
    "linear_add_reference",
    "linear_gelu",
    "linear_gelu_reference",
]
