"""The right encoder for a timm model: HyperViT for a plain ViT, HyperEncoder for any other."""

from collections.abc import Iterable
from typing import Any

from timm.models import VisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

from hyperclip_fast.block_parts import MODULATED_NORMS
from hyperclip_fast.hyper_encoder import HyperEncoder, to_hyper_encoder
from hyperclip_fast.hyper_vit import HyperViT, to_hyper_vit
from hyperclip_fast.norm_params import DEFAULT_MODULATE
from hyperclip_fast.utils.private_api import FeatureGetterNet
from hyperclip_fast.utils.timm_models import create_timm_model


def create_encoder(
    model: str | nn.Module, pretrained: bool = False, modulate: Iterable[str] | None = None, **kwargs: Any
) -> HyperViT | HyperEncoder:
    """A HyperViT for timm's plain VisionTransformers, a HyperEncoder for any other timm model.

    Args:
        model: a timm model name or a model, which is copied.
        pretrained: load timm's pretrained weights (for a name).
        modulate: fnmatch patterns of the generated norms; None: the default of what is created.
        **kwargs: passed to timm.create_model.

    Raises:
        ValueError: as their `from_timm`.
    """
    return to_encoder(create_timm_model(model, pretrained, kwargs), modulate)


def to_encoder(model: nn.Module, modulate: Iterable[str] | None = None) -> Any:
    """As `create_encoder`, in place: modules, names and weights stay; timm's wrappers for `features_only`, too."""
    vit = model.model if isinstance(model, FeatureGetterNet) else model
    if type(vit) is VisionTransformer and all(map(_is_plain, vit.blocks)):
        return to_hyper_vit(model, DEFAULT_MODULATE if modulate is None else modulate)
    return to_hyper_encoder(model, modulate)


def _is_plain(block: Any) -> bool:
    """Whether HyperViT takes a block: a pre-norm Block of layer norms with weight and bias."""
    if type(block) is not Block:
        return False
    norms = (block.norm1, block.norm2)
    return all(type(norm) in MODULATED_NORMS and norm.weight is not None and norm.bias is not None for norm in norms)
