"""timm knows hyper_<name>, for every timm model that HyperViT or HyperEncoder takes: timm's scripts need one import.

    hyper_vit_tiny_patch16_224       a HyperViT, as of all plain VisionTransformers
    hyper_efficientnet_b0.ra_in1k    a HyperEncoder, as of all others; tags name timm's own weights

Importing this module registers them. It imports no encoder before somebody creates one.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

from timm.models import DefaultCfg, list_models, model_entrypoint, register_model
from torch import nn

PREFIX = "hyper_"
# Networks without a norm that rows modulate: none at all, or EvoNorm, FilterResponseNorm or Affine.
NO_NORMS = ["*nfnet*", "nf_*", "vgg1?", "resmlp_*", "*_frn"]
NO_NORMS += [f"{family}_*_evos" for family in ("ese", "regnetz", "resnetv2", "test")]
default_cfgs: dict[str, DefaultCfg] = {}  # register_model looks here for pretrained weights


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """timm's own entry point of a model, weights included, then the change of class."""
    stock = model_entrypoint(name)

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        to_encoder = importlib.import_module("hyperclip_fast.encoders").to_encoder
        return to_encoder(stock(pretrained=pretrained, **kwargs))

    create.__name__ = create.__qualname__ = f"{PREFIX}{name}"
    create.__doc__ = f"An encoder with the architecture and pretrained weights of timm's {name}."
    return create


def _cfgs(name: str) -> DefaultCfg | None:
    """timm's pretrained weights of a model, by tag; None where it knows no such."""
    stock = getattr(sys.modules[model_entrypoint(name).__module__], "default_cfgs", {}).get(name)
    if not isinstance(stock, DefaultCfg):
        return None
    cfgs = {}
    for tag, cfg in stock.cfgs.items():
        if cfg.hf_hub_id == "timm/":  # timm would complete it with our name
            cfg = copy.copy(cfg)
            cfg.hf_hub_id = f"timm/{name}.{tag}" if tag else f"timm/{name}"
        cfgs[tag] = cfg
    return DefaultCfg(stock.tags, cfgs, stock.is_pretrained)


def _register(name: str) -> None:
    entrypoint, cfgs = _entrypoint(name), _cfgs(name)
    globals()[entrypoint.__name__] = entrypoint
    if cfgs is not None:
        default_cfgs[entrypoint.__name__] = cfgs
    register_model(entrypoint)


for _name in list_models(exclude_filters=[f"{PREFIX}*", *NO_NORMS]):
    _register(_name)
