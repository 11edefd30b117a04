"""Image towers of open_clip as timm models: the same function under timm's names.

    TimmModel            its trunk, with the projection as the trunk's classifier
    VisionTransformer    vit_base_patch16_clip_224 in other sizes; timm converts the names
    ModifiedResNet       resnet50_clip and its kind; timm converts the names

What has no counterpart is refused with the reason.
"""

from functools import partial
from typing import Any

import timm
import torch
from timm.models import byobnet, vision_transformer
from torch import Tensor, nn

from hyperclip_fast.pretrained.parts import ImageTower

RESNETS = {  # by blocks of each stage and width
    (3, 4, 6, 3, 64): "resnet50_clip",
    (3, 4, 23, 3, 64): "resnet101_clip",
    (4, 6, 10, 6, 80): "resnet50x4_clip",
    (6, 8, 18, 8, 96): "resnet50x16_clip",
    (3, 15, 36, 10, 128): "resnet50x64_clip",
}
VIT = {False: "vit_base_patch16_clip_224", True: "vit_base_patch16_clip_quickgelu_224"}  # whether GELU is the quick one


def image_tower(visual: Any) -> ImageTower:
    """An open_clip model's `visual` as a timm model.

    Raises:
        ValueError: for what timm has no counterpart for, with the reason.
    """
    makers = {"TimmModel": _timm, "VisionTransformer": _vit, "ModifiedResNet": _resnet}
    kind = type(visual).__name__
    if kind not in makers:
        raise _refused(f"an image tower of class {kind}")
    fields, state = makers[kind](visual)
    return ImageTower(fields, state, partial(_features, visual))


def _refused(what: str) -> ValueError:
    return ValueError(f"model must have an image tower that timm has, too, got {what}")


def _features(visual: nn.Module, images: Tensor) -> Tensor:
    """What `encode_image` gives; an output may come with the tokens."""
    output = visual.eval()(images)
    return output[0] if isinstance(output, tuple) else output


def _timm(visual: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    trunk, head = visual.trunk, dict(visual.head.named_children())
    name, classifier = (trunk.pretrained_cfg[key] for key in ("architecture", "classifier"))
    if "pool" in head:
        raise _refused(f"{name} under open_clip's own {type(head['pool']).__name__}")
    state, kwargs = dict(trunk.state_dict()), dict[str, Any]()
    fields: dict[str, Any] = {"image_tower": name, "embed_dim": trunk.num_classes or trunk.num_features}
    if "mlp" in head:
        if type(getattr(trunk, "head", None)).__name__ != "NormMlpClassifierHead":
            raise _refused(f"{name} under an MLP, which its own head cannot hold")
        kwargs["head_hidden_size"] = head["mlp"].fc1.out_features
        state |= _linear("head.pre_logits.fc", head["mlp"].fc1) | _linear(classifier, head["mlp"].fc2)
        fields["embed_dim"] = head["mlp"].fc2.out_features
    elif "proj" in head:
        state |= _linear(classifier, head["proj"])
        fields["embed_dim"] = head["proj"].out_features
    elif not trunk.num_classes:
        fields["image_head"] = "identity"
    with torch.device("meta"):
        usual = timm.create_model(name)
    pool = getattr(trunk, "global_pool", None)
    if isinstance(pool, str) and pool != usual.global_pool:
        fields["global_pool"] = pool
        if hasattr(trunk, "fc_norm"):  # which timm would add for another pooling
            kwargs["fc_norm"] = not isinstance(trunk.fc_norm, nn.Identity)
    return {**fields, "image_kwargs": kwargs}, state


def _linear(name: str, layer: nn.Linear) -> dict[str, Tensor]:
    """A layer's weights under another name, with a bias of 0 where it has none."""
    bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    return {f"{name}.weight": layer.weight.detach(), f"{name}.bias": bias}


def _vit(visual: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if visual.attn_pool is not None:
        raise _refused("a VisionTransformer with attentional pooling")
    block = visual.transformer.resblocks[0]
    if type(block).__name__ != "ResidualAttentionBlock":
        raise _refused(f"a VisionTransformer of {type(block).__name__}s")
    if block.ln_1.eps != 1e-5 or visual.grid_size[0] != visual.grid_size[1]:
        raise _refused(f"a VisionTransformer with eps {block.ln_1.eps} and a grid of {visual.grid_size}")
    width, hidden = block.mlp.c_fc.weight.shape[1], block.mlp.c_fc.weight.shape[0]
    activation, kwargs = block.mlp.gelu, dict[str, Any]()
    is_quick = type(activation).__name__ == "QuickGELU"
    if getattr(activation, "approximate", "none") == "tanh":
        kwargs["act_layer"] = "gelu_tanh"
    if hidden != 4 * width:
        kwargs["mlp_ratio"] = hidden / width
    if hasattr(block.ls_1, "gamma"):
        kwargs["init_values"] = 1e-5
    if isinstance(visual.ln_pre, nn.Identity):
        kwargs["pre_norm"] = False
    fields: dict[str, Any] = {
        "image_tower": VIT[is_quick],
        "img_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "width": width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "embed_dim": visual.output_dim,
    }
    if visual.pool_type == "avg":
        fields["global_pool"] = "avg"
        kwargs["fc_norm"] = visual.final_ln_after_pool
    elif visual.pool_type != "tok":
        raise _refused(f"a VisionTransformer with pooling {visual.pool_type!r}")
    return {**fields, "image_kwargs": kwargs}, _vit_state(visual, fields, kwargs)


def _vit_state(visual: Any, fields: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights by timm's names: timm converts OpenAI's, and knows neither layer scale nor a tower without ln_pre."""
    sizes = {key: fields[key] for key in ("img_size", "patch_size", "depth", "num_heads")}
    with torch.device("meta"):
        model: Any = timm.create_model(fields["image_tower"], embed_dim=fields["width"], **sizes, **kwargs)
    named = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    state = vision_transformer.checkpoint_filter_fn(named, model)
    state = {name.replace(".ls_", ".ls"): value for name, value in state.items()}
    if not kwargs.get("pre_norm", True):
        state["patch_embed.proj.bias"] = visual.conv1.weight.new_zeros(visual.conv1.out_channels)
    if kwargs.get("fc_norm"):
        state = {f"fc_{name}" if name.startswith("norm.") else name: value for name, value in state.items()}
    return state


def _resnet(visual: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    blocks = [len(getattr(visual, f"layer{i}")) for i in range(1, 5)]
    shape = (*blocks, visual.conv3.out_channels)
    if shape not in RESNETS:
        raise _refused(f"a ModifiedResNet of {blocks} blocks and width {shape[-1]}")
    name = RESNETS[shape]
    fields = {"image_tower": name, "embed_dim": visual.output_dim, "image_kwargs": {}}
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=visual.output_dim)
    if model.pretrained_cfg["input_size"][-1] != visual.image_size:
        raise _refused(f"{name} for images of {visual.image_size} pixels")
    named = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    return fields, byobnet.checkpoint_filter_fn(named, model)
