"""HyperViT behind timm's own interface: the same calls, names and numbers as the stock VisionTransformer's."""

import pytest
import timm
import torch
from timm.models import list_models
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Block
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from hyperclip_fast import HyperViT, NormParams
from hyperclip_fast.hyper_vit import HyperFeatures
from tests.encoders.vit_cases import (
    OPTIONS,
    assert_same,
    hyper_pair,
    make_images,
    make_stock,
    random_rows,
    stock_with_row,
)
from tests.helpers import assert_close

UNFUSABLE = {  # what timm builds from VisionTransformer and HyperViT refuses: parallel and post-norm blocks, RmsNorm
    "aimv2_*": r"blocks.0.norm1 \(RmsNorm\)",
    "test_vit4": r"blocks.0.norm1 \(RmsNorm\)",
    "vit_*_18x2_*": "got ParallelThingsBlock",
    "vit_*_rpn_*": "got ResPostBlock",
    "vit_*_xp_*": "got ParallelScalingBlock",
    "vit_pwee_*": "got ParallelScalingBlock",
    "vit_dpwee_*": "got DiffParallelScalingBlock",
}
REFUSED = {name: error for pattern, error in UNFUSABLE.items() for name in list_models(pattern)}


@pytest.mark.parametrize("name", list_models(module="vision_transformer"))
def test_every_name_is_built_or_refused(name):
    with torch.device("meta"):
        stock = timm.create_model(name, depth=2)
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                HyperViT.from_timm(stock)
            return
        vit = HyperViT.from_timm(stock)
    assert vit.state_dict().keys() == stock.state_dict().keys()
    assert all(f"{name}.weight" in stock.state_dict() for name in vit.norm_spec.names)
    last = [layer for layer in ("norm", "fc_norm") if not isinstance(stock.get_submodule(layer), nn.Identity)]
    assert vit.norm_spec.names == (*(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)), *last)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_create_model(name):
    vit = timm.create_model(f"hyper_{name}", num_classes=5, depth=1, img_size=32, drop_path_rate=0.1).eval()
    stock = timm.create_model(name, num_classes=5, depth=1, img_size=32).eval()
    stock.load_state_dict(vit.state_dict())
    assert type(vit) is HyperViT
    assert torch.equal(vit(make_images()), stock(make_images()))


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_pretrained_loading_goes_through_timm(tmp_path, kind):
    """Another image size and class count than the file's: timm resamples the position embedding and drops the head."""
    source = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    path = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(source.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "custom_load": False}, "depth": 1}
    for more in ({}, {"num_classes": 0, "img_size": 96}):
        stock = timm.create_model("vit_tiny_patch16_224", **kwargs, **more)
        for vit in (
            timm.create_model("hyper_vit_tiny_patch16_224", **kwargs, **more),
            HyperViT.from_timm("vit_tiny_patch16_224", **kwargs, **more),
        ):
            assert_same(vit.state_dict(), stock.state_dict())
    assert torch.equal(vit.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("option", ["token", "registers", "layer_scale", "map"])
def test_state_dicts_load_both_ways(option):
    stock, vit = hyper_pair(option)
    other = make_stock(option, seed=7)
    vit.load_state_dict(other.state_dict())
    assert_same(vit.state_dict(), other.state_dict())
    stock.load_state_dict(vit.state_dict())
    assert torch.equal(stock(make_images()), vit(make_images()))
    assert torch.equal(vit.base_params.table[0], vit.norm_spec.row(other.state_dict()))


@pytest.mark.parametrize("option", OPTIONS)
def test_features_and_head(option):
    stock, vit = hyper_pair(option)
    images, rows = make_images(option), random_rows(vit.norm_spec)
    tokens, ref = vit.forward_features(images), stock.forward_features(images)
    assert torch.equal(tokens, ref)
    for pre_logits in (False, True):
        assert torch.equal(vit.forward_head(tokens, pre_logits), stock.forward_head(ref, pre_logits))
    mixed = vit.forward_features(images, rows)
    assert_close(vit.forward_head(mixed, params=rows), vit(images, rows).double())  # which leaves out unread tokens
    for task in (2, 5):
        model = stock_with_row(stock, rows, task)
        ref = model.forward_features(images)
        assert (mixed - ref)[task].abs().max() <= 1e-5
        ref = model.forward_head(ref, pre_logits=True)
        assert (vit.forward_head(mixed, pre_logits=True, params=rows) - ref)[task].abs().max() <= 1e-5


FORMS = [
    {},
    {"indices": 1},
    {"indices": [0, -1], "return_prefix_tokens": True},
    {"indices": [0], "stop_early": True, "norm": True},
    {"indices": [1], "stop_early": True, "intermediates_only": True},
    {"output_fmt": "NLC", "norm": True},
    {"output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True},
    {"output_dict": True, "return_prefix_tokens": True},
    {"output_dict": True, "intermediates_only": True, "norm": True},
    {"is_causal": True},
]


def flat(found):
    """The tensors of any form that forward_intermediates returns, by their place in it."""
    if isinstance(found, torch.Tensor):
        return {"": found}
    items = found.items() if isinstance(found, dict) else enumerate(found)
    return {f"{key}/{place}": tensor for key, part in items for place, tensor in flat(part).items()}


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("option", ["token", "avg", "registers", "no_class_token", "dynamic_pad", "pre_norm"])
def test_forward_intermediates(option, form):
    stock, vit = hyper_pair(option)
    images, rows, form = make_images(option), random_rows(vit.norm_spec), FORMS[form]
    assert_same(flat(vit.forward_intermediates(images, **form)), flat(stock.forward_intermediates(images, **form)))
    mixed = flat(vit.forward_intermediates(images, params=rows, **form))
    for task in (0, 6):
        ref = flat(stock_with_row(stock, rows, task).forward_intermediates(images, **form))
        assert mixed.keys() == ref.keys()
        for place, tensor in ref.items():
            assert (mixed[place] - tensor)[task].abs().max() <= 1e-5


def test_forward_intermediates_refuses_another_format():
    with pytest.raises(ValueError, match="output_fmt must be"):
        HyperViT.from_timm(make_stock()).forward_intermediates(make_images(), output_fmt="NHWC")


@pytest.mark.parametrize("kwargs", [{}, {"n": [0, 1], "reshape": True}, {"n": 2, "norm": True}])
def test_get_intermediate_layers(kwargs):
    stock, vit = hyper_pair("registers")
    images, rows = make_images("registers"), random_rows(vit.norm_spec)
    for prefix in (False, True):
        ref = stock.get_intermediate_layers(images, return_prefix_tokens=prefix, **kwargs)
        out = vit.get_intermediate_layers(images, return_prefix_tokens=prefix, **kwargs)
        assert_same(flat(out), flat(ref))
    mixed = vit.get_intermediate_layers(images, params=rows, **kwargs)
    ref = stock_with_row(stock, rows, 3).get_intermediate_layers(images, **kwargs)
    for ours, theirs in zip(mixed, ref, strict=True):
        assert (ours - theirs)[3].abs().max() <= 1e-5


@pytest.mark.parametrize("kwargs", [{}, {"out_indices": (0, 1)}])
def test_features_only(kwargs):
    """The rows of the whole encoder serve the features_only model, although timm cut its blocks and norm off."""
    kwargs = {"features_only": True, "depth": 3, "img_size": 32, **kwargs}
    stock = timm.create_model("vit_tiny_patch16_224", **kwargs).eval()
    features = timm.create_model("hyper_vit_tiny_patch16_224", **kwargs).eval()
    whole = HyperViT.from_timm("vit_tiny_patch16_224", depth=3, img_size=32).eval()
    stock.load_state_dict(whole.state_dict(prefix="model."), strict=False)
    features.load_state_dict(stock.state_dict())
    assert type(features) is HyperFeatures
    assert features.feature_info.channels() == stock.feature_info.channels()
    images, rows = make_images(), random_rows(whole.norm_spec)
    assert_same(flat(features(images)), flat(stock(images)))
    for params in (rows, random_rows(features.model.norm_spec)):
        for task in (1, 4):
            row = {f"model.{key}": value for key, value in params.state_dict(task).items()}
            assert stock.state_dict().keys() & row.keys()
            stock.load_state_dict(row, strict=False)
            for ours, ref in zip(features(images, params), stock(images), strict=True):
                assert (ours - ref)[task].abs().max() <= 1e-5
    narrower = HyperViT.from_timm("vit_tiny_patch16_224", depth=3, img_size=32, embed_dim=96).norm_spec
    with pytest.raises(ValueError, match="params must follow this encoder's spec"):
        features(images, random_rows(narrower))


def test_feature_getter_around_a_hyper_vit():
    stock, vit = hyper_pair("registers")
    images, rows = make_images("registers"), random_rows(vit.norm_spec)
    kwargs = {"out_indices": [0, 1], "norm": True, "output_fmt": "NLC"}
    features, plain = HyperFeatures(vit, **kwargs), stock_with_row(stock, rows, 2)
    for ours, ref in zip(features(images, rows), FeatureGetterNet(plain, **kwargs)(images), strict=True):
        assert (ours - ref)[2].abs().max() <= 1e-5


@pytest.mark.parametrize("prune_norm", [False, True])
def test_prune_intermediate_layers(prune_norm):
    stock, vit = hyper_pair("token")
    images, rows = make_images(), random_rows(vit.norm_spec)
    full = vit.forward_intermediates(images, [0], params=rows, intermediates_only=True)[0]
    assert vit.prune_intermediate_layers([0], prune_norm) == stock.prune_intermediate_layers([0], prune_norm)
    assert vit.state_dict().keys() == stock.state_dict().keys()
    assert vit.norm_spec.names == ("blocks.0.norm1", "blocks.0.norm2", *(() if prune_norm else ("norm",)))
    assert torch.equal(vit(images), stock(images))
    assert torch.equal(vit.forward_intermediates(images, [0], params=rows, intermediates_only=True)[0], full)
    assert torch.equal(vit(images, vit.base_params), stock(images))


@pytest.mark.parametrize(
    ("option", "classes", "pool"),
    [
        ("token", 3, None),
        ("token", 0, "avg"),
        ("avg", 4, "token"),
        ("registers", 5, ""),
        ("map", 4, "avg"),
        ("token", 2, "max"),
    ],
)
def test_reset_classifier(option, classes, pool):
    stock, vit = hyper_pair(option)
    spec, rows = vit.norm_spec, random_rows(vit.norm_spec)
    for model in (stock, vit):
        torch.manual_seed(0)
        model.reset_classifier(classes, pool)
    images = make_images(option)
    assert vit.num_classes == classes and vit.norm_spec == spec
    assert vit.get_classifier() is vit.head
    assert torch.equal(vit(images), stock(images))
    assert (vit(images, rows) - stock_with_row(stock, rows, 2)(images))[2].abs().max() <= 1e-5


@pytest.mark.parametrize("option", ["token", "registers_no_embed_class"])
def test_set_input_size(option):
    stock, vit = hyper_pair(option)
    rows, images = random_rows(vit.norm_spec), torch.randn(8, 3, 48, 32)
    for model in (stock, vit):
        model.set_input_size(img_size=(48, 32))
    assert torch.equal(vit(images), stock(images))
    assert (vit(images, rows) - stock_with_row(stock, rows, 1)(images))[1].abs().max() <= 1e-5


def test_grad_checkpointing_switch():
    vit = hyper_pair()[1]
    for enable in (True, False):
        vit.set_grad_checkpointing(enable)
        assert vit.grad_checkpointing is enable


def group_names(model, groups):
    """Groups of parameters as lists of names with their settings."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "names": [names[id(p)] for p in group["params"]],
        }
        for group in groups
    ]


@pytest.mark.parametrize("option", ["token", "registers", "layer_scale", "map"])
def test_optimiser_groups(option):
    stock, vit = hyper_pair(option)
    assert vit.no_weight_decay() == stock.no_weight_decay()
    assert vit.group_matcher(coarse=True) == stock.group_matcher(coarse=True)
    for make in (
        lambda model: param_groups_weight_decay(model, 0.05, model.no_weight_decay()),
        lambda model: param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7),
        lambda model: create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.6).param_groups,
    ):
        assert group_names(vit, make(vit)) == group_names(stock, make(stock))


def test_a_block_keeps_timms_modules():
    stock, vit = hyper_pair("layer_scale", drop_path_rate=0.1)
    assert all(isinstance(block, Block) for block in vit.blocks)
    assert [name for name, _ in vit.named_modules()] == [name for name, _ in stock.named_modules()]
    total, delta = vit.blocks[0](torch.ones(1, 4, 48))
    assert delta is None and torch.equal(total, stock.blocks[0](torch.ones(1, 4, 48)))
    part = vit.blocks[1](torch.ones(1, 4, 48), torch.ones(1, 4, 48))[0]
    assert torch.equal(part, stock.blocks[1](2 * torch.ones(1, 4, 48)))


def test_a_stock_model_takes_a_row():
    """`params.state_dict(t)` is what the README calls the task's own model."""
    stock, vit = hyper_pair("avg")
    rows = random_rows(vit.norm_spec)
    images = make_images()
    ref = vit(images, NormParams(rows.spec, rows.table[5:6]))
    assert torch.equal(stock_with_row(stock, rows, 5)(images), ref)
