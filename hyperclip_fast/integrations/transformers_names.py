"""The norms of transformers' vision encoders under timm's names, so that their weights become rows.

    vit.encoder.layer.3.layernorm_before, layers.3.layernorm_before, encoder.layers.3.layer_norm1  ->  blocks.3.norm1
    vit.encoder.layer.3.layernorm_after,  layers.3.layernorm_after,  encoder.layers.3.layer_norm2  ->  blocks.3.norm2
    vit.layernorm, post_layernorm                                                                  ->  norm

ViT, DeiT, DINOv2, CLIP's and SigLIP's vision models, in files of transformers 4 and 5.
"""

import re
from collections.abc import Mapping

from torch import Tensor

BLOCK = re.compile(r"(?:.*\.)?layers?\.(\d+)\.(layernorm_before|layer_norm1|norm1|layernorm_after|layer_norm2|norm2)")
FINAL = re.compile(r"(?:(?:\w*vit|deit|dinov2\w*|vision_model)\.)*(?:post_)?layernorm")
FIRST = ("layernorm_before", "layer_norm1", "norm1")


def timm_name(layer: str) -> str:
    """timm's name of a layer; another layer's as it is."""
    if match := BLOCK.fullmatch(layer):
        return f"blocks.{match[1]}.{'norm1' if match[2] in FIRST else 'norm2'}"
    return "norm" if FINAL.fullmatch(layer) else layer


def timm_norms(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms of a transformers vision encoder's state dict, and nothing else, under timm's names.

    Raises:
        ValueError: if there is none.
    """
    norms = {}
    for key, tensor in state_dict.items():
        layer, _, kind = key.rpartition(".")
        if timm_name(layer) != layer:
            norms[f"{timm_name(layer)}.{kind}"] = tensor
    if not norms:
        raise ValueError(f"state_dict must be a transformers vision encoder's, got {list(state_dict)[:3]}")
    return norms
