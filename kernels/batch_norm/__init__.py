"""BatchNorm2d with each sample's own weight and bias, its activation and the residual add in one pass."""

from .functional import (
    batch_norm_act,
    batch_norm_act_reference,
    batch_norm_act_train,
    batch_norm_act_train_reference,
)

__all__ = [
    "batch_norm_act",
    "batch_norm_act_reference",
    "batch_norm_act_train",
    "batch_norm_act_train_reference",
]
