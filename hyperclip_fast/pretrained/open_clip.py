"""An open_clip model taken apart: image tower, text tower, temperature, bias and preprocessing."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.pretrained.open_clip_images import image_tower
from hyperclip_fast.pretrained.parts import Parts
from hyperclip_fast.text.open_clip_tower import NO_IMAGES, OpenCLIPTextTower, create_open_clip, model_config
from hyperclip_fast.utils.extras import require


def open_clip_parts(model: str | nn.Module, pretrained: str | None = None, name: str | None = None) -> Parts:
    """What a HyperCLIP takes over of an open_clip model.

    Args:
        model: one of `open_clip.list_models()`, or hf-hub:<hub id>, or local-dir:<folder>; or such a model.
        pretrained: tag, or a checkpoint file; None: random weights.
        name: of the model, where it is one, in `open_clip.list_models()`; None: found by its text tower.

    Raises:
        ValueError: for an unknown model or tag, or an image tower that timm does not have.
    """
    if isinstance(model, str):
        source, clip = model, create_open_clip(model, pretrained)
        text = clip.text
    else:
        if pretrained is not None:
            raise ValueError(f"pretrained goes with a model's name, got {pretrained!r} with a {type(model).__name__}")
        source, clip = name or _name_of(model), model
        text = _own_text(clip, source)
    image = image_tower(clip.visual)
    tower = OpenCLIPTextTower(source, text=text.float().requires_grad_(False)).eval()
    preprocessing = Preprocessing.from_open_clip(_preprocess_config(clip.visual))
    fields = {
        "text_tower": f"open_clip:{source}" + (f"/{pretrained}" if pretrained else ""),
        "text_dim": tower.dim,
        "text_head": "identity",
        "img_size": preprocessing.size,
        **preprocessing.config_fields(),
    }
    bias = getattr(clip, "logit_bias", None)
    is_tag = bool(pretrained) and not Path(str(pretrained)).is_file()
    is_named = isinstance(model, str) and (model.startswith("hf-hub:") or is_tag)
    return Parts(image, fields, tower, is_named, {}, clip.logit_scale.item(), 0.0 if bias is None else bias.item())


def _preprocess_config(visual: Any) -> dict[str, Any]:
    """What open_clip's factory sets; a model that was made without it has the class's defaults."""
    given = getattr(visual, "preprocess_cfg", None)
    transform = require("open_clip.transform", "clip")
    return given or transform.merge_preprocess_dict(transform.PreprocessCfg(), {"size": visual.image_size})


def _own_text(clip: Any, name: str) -> Any:
    """The text tower of a model as a module of its own; a copy."""
    if isinstance(getattr(clip, "text", None), nn.Module):
        return copy.deepcopy(clip.text)
    config = model_config(name)
    kept = {key: config[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in config}
    text = require("open_clip", "clip").CustomTextCLIP(vision_cfg=NO_IMAGES, **kept).text
    ours, state = text.state_dict(), clip.state_dict()
    text.load_state_dict({key: state[key] for key in ours})
    return text


def _name_of(clip: Any) -> str:
    """The open_clip model with this text tower, and this image tower where there is such a one.

    Raises:
        ValueError: where none has it, or several do that differ in their tokenizers.
    """
    open_clip, text = require("open_clip", "clip"), getattr(clip, "text", clip)
    shape, configs = _text_shape(text), {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    fitting = [name for name, config in configs.items() if shape is not None and _text_shape_of(config) == shape]
    same_image = [name for name in fitting if _image_fits(clip.visual, configs[name]["vision_cfg"])]
    found = same_image or fitting
    if len({repr(_text_config(configs[name])) for name in found}) != 1:
        got = f"one that fits {found}" if found else "one that fits none of them"
        raise ValueError(f"name must say which of open_clip.list_models() the model is, got {got}")
    return found[0]


def _image_fits(visual: Any, config: dict[str, Any]) -> bool:
    """Whether an image tower may be of a configuration."""
    if hasattr(visual, "trunk"):
        return config.get("timm_model_name") == visual.trunk.pretrained_cfg["architecture"]
    if hasattr(visual, "layer1"):
        return config.get("layers") == [len(getattr(visual, f"layer{i}")) for i in range(1, 5)]
    sizes = (len(visual.transformer.resblocks), visual.conv1.out_channels, visual.patch_size[0], visual.image_size[0])
    return sizes == tuple(config.get(key) for key in ("layers", "width", "patch_size", "image_size"))


def _text_shape(text: Any) -> tuple[Any, ...] | None:
    """What tells one text transformer from another; None for an encoder of transformers."""
    if not hasattr(text, "token_embedding"):
        return None
    block, (vocabulary, width) = text.transformer.resblocks[0], text.token_embedding.weight.shape
    projection = text.text_projection
    is_matrix = isinstance(projection, torch.Tensor)
    out = width if projection is None else projection.shape[1] if is_matrix else projection.out_features
    pool = getattr(text, "pool_type", None) or text.text_pool_type
    is_quick, is_causal = type(block.mlp.gelu).__name__ == "QuickGELU", getattr(text, "attn_mask", None) is not None
    layers, heads = len(text.transformer.resblocks), block.attn.num_heads
    return vocabulary, width, layers, heads, text.context_length, out, is_quick, pool, is_causal


def _text_shape_of(config: dict[str, Any]) -> tuple[Any, ...] | None:
    """The same of a configuration."""
    if "hf_model_name" in config["text_cfg"]:
        return None
    text = _text_config(config)
    sizes = (text.vocab_size, text.width, text.layers, text.heads, text.context_length, config["embed_dim"])
    return *sizes, config.get("quick_gelu", False), text.pool_type, not text.no_causal_mask


def _text_config(config: dict[str, Any]) -> Any:
    """open_clip's CLIPTextCfg, with its defaults."""
    return require("open_clip.model", "clip").CLIPTextCfg(**config["text_cfg"])
