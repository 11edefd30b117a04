"""Residual add, LayerNorm and each sample's own weight and bias in one pass."""

from .functional import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "layer_norm",
    "layer_norm_reference",
]
