"""CLIP and SigLIP of transformers taken apart: the vision model under timm's names, and the text half as a tower.

CLIPModel            vit_base_patch16_clip_224 in other sizes
SiglipModel          vit_base_patch16_siglip_224 in other sizes, with its attention pooling
Siglip2Model         the same, at the grid that its position embeddings have
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.pretrained.parts import ImageTower, Parts
from hyperclip_fast.text.hf_tower import HFTextTower, load_hf_model, pooled
from hyperclip_fast.utils.extras import require

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs and timm's
KINDS = ("clip", "siglip", "siglip2")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def transformers_parts(source: str | Path) -> Parts:
    """What a HyperCLIP takes over of a CLIP or SigLIP of transformers.

    Args:
        source: hub id, or a folder with the model, its tokenizer and its image processor.

    Raises:
        ValueError: for another model, or what is no model.
    """
    model = load_hf_model(source)
    kind = model.config.model_type
    if kind not in KINDS:
        raise ValueError(f"source must be a model of type {', '.join(KINDS)}, got {kind}")
    vision = model.config.vision_config
    size = _image_size(vision)
    projection = getattr(model, "visual_projection", None)  # held here, as the vision model: the text tower lets go
    features = partial(_features, kind, model.vision_model, projection, vision.patch_size)
    image = ImageTower(_fields(model, kind, size), _state(model, kind), features)
    processor = require("transformers", "clip").AutoImageProcessor.from_pretrained(source).to_dict()
    text = HFTextTower(source, model=model).eval()
    fields = {
        "text_tower": f"hf:{source}",
        "text_dim": text.dim,
        "text_head": "identity",
        **_preprocessing(processor, size).config_fields(),
    }
    scale, bias = model.logit_scale.item(), getattr(model, "logit_bias", None)
    is_named = not Path(source).is_dir()  # a folder's name leads there from one place alone
    return Parts(image, fields, text, is_named, {}, scale, 0.0 if bias is None else bias.item())


def _image_size(vision: Any) -> int:
    """S: NaFlex models have a grid of position embeddings in its place."""
    return getattr(vision, "image_size", None) or round(vision.num_patches**0.5) * vision.patch_size


def _fields(model: Any, kind: str, size: int) -> dict[str, Any]:
    vision, is_clip = model.config.vision_config, kind == "clip"
    kwargs: dict[str, Any] = {}
    if vision.intermediate_size != 4 * vision.hidden_size:
        kwargs["mlp_ratio"] = vision.intermediate_size / vision.hidden_size
    if vision.hidden_act not in ACTIVATIONS or vision.layer_norm_eps != (1e-5 if is_clip else 1e-6):
        got = f"{vision.hidden_act} and eps {vision.layer_norm_eps}"
        raise ValueError(f"source must have an activation among {tuple(ACTIVATIONS)} and {kind}'s eps, got {got}")
    kwargs["act_layer"] = ACTIVATIONS[vision.hidden_act]
    return {
        "image_tower": "vit_base_patch16_clip_224" if is_clip else "vit_base_patch16_siglip_224",
        "img_size": size,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "embed_dim": model.config.projection_dim if is_clip else vision.hidden_size,
        "image_head": "linear" if is_clip else "identity",
        "image_kwargs": kwargs,
    }


def _state(model: Any, kind: str) -> dict[str, Tensor]:
    """Weights of the vision model by timm's names."""
    theirs = model.vision_model.state_dict()
    grid = theirs["embeddings.position_embedding.weight"][None]
    patches, size = theirs["embeddings.patch_embedding.weight"], model.config.vision_config.patch_size
    if patches.dim() == 2:  # of patches whose channels come last
        patches = patches.unflatten(1, (size, size, 3)).permute(0, 3, 1, 2)
    state = {"patch_embed.proj.weight": patches, "pos_embed": grid}
    if kind == "clip":
        state["cls_token"] = theirs["embeddings.class_embedding"][None, None]
        state["head.weight"] = model.visual_projection.weight.detach()
        state["head.bias"] = state["head.weight"].new_zeros(len(state["head.weight"]))
        state |= _renamed(theirs, "pre_layrnorm", "norm_pre")
    else:
        state["patch_embed.proj.bias"] = theirs["embeddings.patch_embedding.bias"]
        state |= _attention_pool(theirs)
    state |= _renamed(theirs, "post_layernorm", "norm")
    for i in range(model.config.vision_config.num_hidden_layers):
        state |= _block(theirs, f"encoder.layers.{i}", f"blocks.{i}")
    return state


def _block(theirs: dict[str, Tensor], name: str, ours: str) -> dict[str, Tensor]:
    state = {}
    for end in ("weight", "bias"):
        parts = [theirs[f"{name}.self_attn.{part}_proj.{end}"] for part in "qkv"]
        state[f"{ours}.attn.qkv.{end}"] = torch.cat(parts)
    pairs = {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"}
    for their_part, part in {**pairs, "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():
        state |= _renamed(theirs, f"{name}.{their_part}", f"{ours}.{part}")
    return state


def _attention_pool(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {"attn_pool.latent": theirs["head.probe"]}
    for end in ("weight", "bias"):
        query, *rest = theirs[f"head.attention.in_proj_{end}"].chunk(3)
        state[f"attn_pool.q.{end}"], state[f"attn_pool.kv.{end}"] = query, torch.cat(rest)
    pairs = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for their_part, part in pairs.items():
        state |= _renamed(theirs, f"head.{their_part}", f"attn_pool.{part}")
    return state


def _renamed(theirs: dict[str, Tensor], name: str, ours: str) -> dict[str, Tensor]:
    return {f"{ours}.{end}": theirs[f"{name}.{end}"] for end in ("weight", "bias")}


def _preprocessing(processor: dict[str, Any], size: int) -> Preprocessing:
    """What the image processor does; sizes are the model's."""
    resample = int(processor["resample"])
    if resample not in INTERPOLATIONS:
        raise ValueError(f"source must have an image processor that resizes by {INTERPOLATIONS}, got {resample}")
    wanted, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    shortest = wanted.get("shortest_edge")
    is_cropped = bool(processor.get("do_center_crop")) and shortest is not None
    if shortest is not None and not is_cropped:
        raise ValueError("source must have an image processor that crops the centre, got one with do_center_crop off")
    return Preprocessing(
        size,
        tuple(processor["image_mean"]),
        tuple(processor["image_std"]),
        INTERPOLATIONS[resample],
        crop.get("height", size) / shortest if is_cropped else 1.0,
        "center" if is_cropped else "squash",
    )


@torch.no_grad()
def _features(kind: str, vision: Any, projection: Any, size: int, images: Tensor) -> Tensor:
    """What `get_image_features` gives."""
    if kind != "siglip2":
        features = pooled(vision.eval()(pixel_values=images))
        return features if projection is None else projection(features)
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)
    mask, grid = torch.ones(patches.shape[:2], dtype=torch.long), images.shape[-1] // size
    shapes = torch.full((len(images), 2), grid)
    return pooled(vision.eval()(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes))
