"""Stock timm models by name, and what their classes take."""

import copy
import difflib
import inspect
from functools import cache
from typing import Any

import timm
import torch
from torch import nn


def create_timm_model(model: str | nn.Module, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """A new model of a name, or a copy of a model."""
    if isinstance(model, str):
        return timm.create_model(known_name(model), pretrained=pretrained, **kwargs)
    inner = next((name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)), None)
    if inner is not None:
        raise ValueError(f"model must be a timm model itself, got a {type(model).__name__} around it: pass its {inner}")
    if pretrained or kwargs:
        raise ValueError(f"pretrained and timm arguments go with a model's name, got a {type(model).__name__}")
    return copy.deepcopy(model)


@cache
def model_options(name: str) -> frozenset[str]:
    """Arguments that the class behind a timm model's name takes, such as img_size; asked of a model without memory."""
    with torch.device("meta"):
        model = timm.create_model(known_name(name))
    return frozenset(inspect.signature(type(model).__init__).parameters)


def known_name(name: str) -> str:
    """timm's name of a model, without our prefix; names with a source, such as "hf-hub:...", are timm's to check."""
    name = name.removeprefix("hyper_")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models("*vit*", module="vision_transformer"))
        known = ", ".join(close) or "vit_tiny_patch16_224"
        raise ValueError(f"model must be a name that timm knows, such as {known}, got {name!r}")
    return name
