"""HyperViT's contracts: the stock model bit for bit, and every sample as if its own stock model had run it."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import RmsNorm
from timm.models import VisionTransformer
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from hyperclip_fast import HyperViT, NormParams, NormSpec
from tests.encoders.vit_cases import (
    OPTIONS,
    SMALL,
    assert_same,
    gradients,
    hyper_pair,
    make_images,
    make_stock,
    one_by_one,
    random_rows,
    stock_with_row,
)
from tests.helpers import DEVICE, assert_close, kernel_run

REAL = {  # name: arguments that keep the slow ones short
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {},
    "vit_base_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 98},  # registers, LayerScale, position embedding without prefix
    "vit_base_patch16_siglip_224": {"depth": 3},  # map pooling
    "vit_base_patch16_clip_quickgelu_224": {"depth": 3},  # pre-norm
    "vit_medium_patch16_reg4_gap_256": {"depth": 3},  # average pooling, fc_norm
    "vit_so150m2_patch16_reg1_gap_256": {"depth": 3, "qk_norm": True},
}
MIX = [3, 1, 0, 0, 7, 6, 1, 2]  # repeated, unsorted; 4 and 5 unused
STOCHASTIC = {
    "drop_rate": 0.2,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.2,
    "drop_path_rate": 0.4,
    "patch_drop_rate": 0.25,
}


def backward(model, images, *args, seed=3):
    """Output, gradient of the images, gradients of the parameters, for a random linear loss."""
    images = images.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(images, *args)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)).sum().backward()
    return out.detach(), images.grad, gradients(model)


@pytest.mark.parametrize("name", REAL)
def test_real_model_is_timms_bit_for_bit(name):
    torch.manual_seed(0)
    stock = timm.create_model(name, **REAL[name]).eval()
    images = torch.randn(2, *stock.pretrained_cfg["input_size"][:1], *stock.patch_embed.img_size)
    vit = HyperViT.from_timm(name, **REAL[name]).eval()
    vit.load_state_dict(stock.state_dict())
    with torch.no_grad():
        ref = stock(images)
        assert torch.equal(vit(images), ref)
        assert torch.equal(vit(images, vit.base_params), ref)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_timms_bit_for_bit(option):
    stock, vit = hyper_pair(option)
    images = make_images(option)
    ref, ref_dx, ref_grads = backward(stock, images)
    for args in ((), (vit.base_params,), (vit.base_params[[0] * 8],)):
        out, dx, grads = backward(vit, images, *args)
        assert torch.equal(out, ref)
        assert torch.equal(dx, ref_dx)
        assert_same(grads, ref_grads)


@pytest.mark.parametrize("option", ["token", "registers", "map", "layer_scale", "avg"])
def test_dropout_and_drop_path_draw_the_same_numbers(option):
    stock, vit = hyper_pair(option, **STOCHASTIC)
    images = make_images(option)
    ref, ref_dx, ref_grads = backward(stock.train(), images)
    for args in ((), (vit.base_params,)):
        out, dx, grads = backward(vit.train(), images, *args)
        assert torch.equal(out, ref)
        assert torch.equal(dx, ref_dx)
        assert_same(grads, ref_grads)
    assert not torch.equal(ref, backward(stock, images, seed=4)[0])


@pytest.mark.parametrize("masked", ["mask", "causal"])
def test_attention_masks(masked):
    stock, vit = hyper_pair("token")
    images, rows = make_images(), random_rows(vit.norm_spec)
    tokens = 17
    mask = torch.rand(tokens, tokens) > 0.3
    mask |= torch.eye(tokens, dtype=torch.bool)
    kwargs = {"attn_mask": mask} if masked == "mask" else {"is_causal": True}
    assert torch.equal(vit(images, **kwargs), stock(images, **kwargs))
    assert not torch.equal(vit(images, **kwargs), vit(images))
    for image, task, out in zip(images, MIX, vit(images, rows[MIX], **kwargs)):
        ref = stock_with_row(stock, rows, task)(image[None], **kwargs)[0]
        assert (out - ref).abs().max() <= 1e-5


@pytest.mark.parametrize("option", OPTIONS)
def test_mixed_batch_equals_one_stock_model_for_each_task(option):
    stock, vit = hyper_pair(option)
    images, rows = make_images(option), random_rows(vit.norm_spec)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, ref = vit(images, rows[MIX]), one_by_one(stock, images, rows, MIX)
            assert out.shape == ref.shape and out.dtype == ref.dtype
            assert (out - ref).abs().max() <= 1e-5
            assert (vit(images, vit.base_params) - ref).abs().max() > 1e-2  # the rows matter


@torch.no_grad()
def test_mixed_batch_of_a_real_model():
    stock = timm.create_model("vit_tiny_patch16_224").eval()
    vit = HyperViT.from_timm(stock)
    images, rows = torch.randn(8, 3, 224, 224), random_rows(vit.norm_spec)
    ids = [7, 2, 0, 5, 1, 6, 3, 4]
    assert (vit(images, rows[ids]) - one_by_one(stock, images, rows, ids)).abs().max() <= 1e-5


def test_every_modulated_layer_can_be_chosen_alone():
    stock = make_stock("pre_norm", global_pool="avg", dtype=torch.float64)
    images = make_images(dtype=torch.float64)
    for pattern in ("norm_pre", "blocks.1.norm1", "blocks.*.norm2", "fc_norm"):
        vit = HyperViT.from_timm(stock, modulate=[pattern])
        rows = random_rows(vit.norm_spec, dtype=torch.float64)
        assert (vit(images, rows[MIX]) - one_by_one(stock, images, rows, MIX)).abs().max() <= 1e-12


@pytest.fixture(scope="module")
def grid():
    """6 images x 5 tasks in float64: a HyperViT, images, rows, and what stock models give for every pair."""
    stock, vit = hyper_pair("registers", dtype=torch.float64)
    images = make_images(batch=6, dtype=torch.float64)
    rows = random_rows(vit.norm_spec, 5, dtype=torch.float64)
    with torch.no_grad():
        outputs = torch.stack([stock_with_row(stock, rows, task)(images) for task in range(5)])
    return vit, images, rows, outputs


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.int64, torch.int32]), batch=st.integers(1, 9))
def test_any_mix(grid, data, dtype, batch):
    vit, images, rows, outputs = grid
    draw = st.lists(st.integers(0, 4), min_size=batch, max_size=batch)
    ids, picks = torch.tensor(data.draw(draw), dtype=dtype), data.draw(draw)
    with torch.no_grad():
        out = vit(images[picks], rows[ids])
        assert (out - outputs[ids.long(), picks]).abs().max() <= 1e-12
        gathered = NormParams(rows.spec, rows.table[ids.long()])  # T = B, no ids
        assert (vit(images[picks], gathered) - out).abs().max() <= 1e-12


@torch.no_grad()
def test_one_row_for_the_whole_batch(grid):
    vit, images, rows, outputs = grid
    row = NormParams(rows.spec, rows.table[3:4])
    for params in (row, row[[0] * 6], rows[[3] * 6]):
        assert (vit(images, params) - outputs[3]).abs().max() <= 1e-12


@torch.no_grad()
def test_neighbours_do_not_matter(grid):
    """A sample's output does not depend on the other images, nor on the rows that it does not use."""
    vit, images, rows, outputs = grid
    table = torch.full_like(rows.table, torch.nan)
    table[2] = rows.table[2]
    other = images.clone()
    other[1:] = torch.nan
    out = vit(other, NormParams(rows.spec, table, [2, 0, 1, 3, 4, 0]))
    assert (out[0] - outputs[2, 0]).abs().max() <= 1e-12


@pytest.mark.parametrize("option", ["token", "avg", "map", "layer_scale", "qk_norm", "pre_norm", "registers", "glu"])
def test_gradients_are_those_of_the_stock_models(option):
    stock, vit = hyper_pair(option, dtype=torch.float64)
    images = make_images(option, dtype=torch.float64)
    rows = random_rows(vit.norm_spec, dtype=torch.float64)
    rows.table.requires_grad_()
    _, dx, grads = backward(vit, images, rows[MIX])

    probe = torch.randn(vit(images).shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    table, sums, ref_dx = torch.zeros_like(rows.table), {}, []
    for image, task, line in zip(images, MIX, probe):
        model, image = stock_with_row(stock, rows, task), image[None].clone().requires_grad_()
        (model(image)[0] * line).sum().backward()
        ref_dx.append(image.grad)
        found = gradients(model)
        table[task] += rows.spec.row(found)
        for name, grad in found.items():
            sums[name] = sums.get(name, 0) + grad

    scale = table.abs().max()
    assert (rows.table.grad - table).abs().max() <= 1e-12 * scale
    assert torch.equal(rows.table.grad[[4, 5]], torch.zeros_like(table[[4, 5]]))
    assert (dx - torch.cat(ref_dx)).abs().max() <= 1e-12 * scale
    replaced = {f"{name}.{kind}" for name in rows.spec.names for kind in ("weight", "bias")}
    assert grads.keys() == sums.keys() - replaced
    for name, grad in grads.items():
        assert (grad - sums[name]).abs().max() <= 1e-11 * scale, name


@pytest.mark.parametrize("option", ["avg", "layer_scale"])
def test_triton_path_agrees_with_the_stock_models(option, triton_backend):
    """The kernels inside the encoder, own weights and rows, forward and backward; the reference is float64."""
    stock, vit = hyper_pair(option, img_size=16)
    vit = vit.to(DEVICE)
    images, ids = torch.randn(3, 3, 16, 16), [2, 0, 2]
    rows = random_rows(vit.norm_spec, 4)
    table = rows.table.to(DEVICE).requires_grad_()
    with kernel_run():
        plain, ours = vit(images.to(DEVICE)), vit(images.to(DEVICE), NormParams(rows.spec, table, ids))
        ours.sum().backward()
    assert_close(plain.cpu(), stock.double()(images.double()), "own weights")

    exact, ref = rows.to(dtype=torch.float64), torch.zeros_like(rows.table, dtype=torch.float64)
    for image, task, out in zip(images.double(), ids, ours.detach().cpu()):
        model = stock_with_row(stock, exact, task)
        expected = model(image[None])
        expected.sum().backward()
        ref[task] += rows.spec.row(gradients(model))
        assert_close(out[None], expected, "mixed batch")
    assert_close(table.grad.cpu(), ref, "gradient of the table")
    assert not table.grad[[1, 3]].any()


def test_triton_path_takes_rows_of_another_dtype(triton_backend):
    _, vit = hyper_pair("avg", img_size=16)
    rows = random_rows(vit.norm_spec, 2).to(dtype=torch.float16)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), kernel_run():
        vit = vit.to(DEVICE)
        half, whole = (
            vit(images.to(DEVICE), NormParams(rows.spec, rows.table.to(DEVICE, dtype), [1, 0]))
            for dtype in (torch.float16, torch.float32)
        )
    assert torch.equal(half, whole)


def test_two_runs_are_bit_equal():
    _, vit = hyper_pair("token")
    images, rows = make_images(), random_rows(vit.norm_spec, 3)
    rows.table.requires_grad_()
    runs = []
    for _ in range(2):
        rows.table.grad = None
        out, dx, grads = backward(vit, images, rows[[0, 1, 2, 0, 0, 1, 0, 2]])
        runs.append({"out": out, "dx": dx, "table": rows.table.grad, **grads})
    assert_same(*runs)


@pytest.mark.parametrize("params", [False, True])
def test_empty_batch(params):
    _, vit = hyper_pair("token")
    rows = random_rows(vit.norm_spec)[torch.empty(0, dtype=torch.int64)] if params else None
    assert vit(make_images(batch=0), rows).shape == (0, 7)


def test_a_subclass_stays_itself():
    class Mine(HyperViT):
        def forward_head(self, x, pre_logits=False, params=None):
            return x[:, 0]

    vit = Mine(**SMALL)
    assert type(vit) is Mine and type(HyperViT.from_timm(vit)) is Mine
    assert vit.forward_head(torch.ones(2, 3, 4)).shape == (2, 4)


def test_from_timm_leaves_the_model_alone():
    stock = make_stock()
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    vit = HyperViT.from_timm(stock)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert type(stock) is VisionTransformer
    assert_same(stock.state_dict(), before)


REFUSED_BUILDS = {
    "parallel": ({"block_fn": ParallelScalingBlock}, "block_fn must be .* got ParallelScalingBlock"),
    "post_norm": ({"block_fn": ResPostBlock}, "block_fn must be .* got ResPostBlock"),
    "rms_norm": ({"norm_layer": RmsNorm}, r"blocks.0.norm1 \(RmsNorm\)"),
}


@pytest.mark.parametrize("case", REFUSED_BUILDS)
def test_refuses_architectures_it_cannot_modulate(case):
    kwargs, message = REFUSED_BUILDS[case]
    with pytest.raises(ValueError, match=message):
        HyperViT.from_timm(VisionTransformer(**SMALL, **kwargs))
    with pytest.raises(ValueError, match=message):
        HyperViT(**SMALL, **kwargs)


def test_refuses_other_models():
    with pytest.raises(ValueError, match=r"such as vit_tiny_patch16_224.*got 'vit_tiny_patch16_244'"):
        HyperViT.from_timm("vit_tiny_patch16_244")
    with pytest.raises(ValueError, match="must be a timm VisionTransformer, got ResNet"):
        HyperViT.from_timm("resnet10t")
    with pytest.raises(ValueError, match="must be a timm VisionTransformer, got Linear"):
        HyperViT.from_timm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="go with a model's name, got a VisionTransformer"):
        HyperViT.from_timm(make_stock(), num_classes=3)


@pytest.mark.parametrize(
    ("option", "pattern", "message"),
    [
        ("qk_norm", "blocks.*.attn.q_norm", "blocks.0.attn.q_norm"),
        ("map", "attn_pool.norm", "attn_pool.norm"),
        ("embed_norm", "patch_embed.norm", "patch_embed.norm"),
        ("token", "blocks.*.mlp.fc1", r"blocks.0.mlp.fc1 \(Linear\)"),
        ("token", "no_such_layer", "must match a norm layer of VisionTransformer|must match a norm layer of HyperViT"),
        ("no_final_norm", "norm", "must match a norm layer"),
    ],
)
def test_refuses_layers_it_cannot_modulate(option, pattern, message):
    with pytest.raises(ValueError, match=message):
        HyperViT.from_timm(make_stock(option), modulate=[pattern])


def test_refuses_params_of_another_kind():
    _, vit = hyper_pair()
    images, rows = make_images(batch=4), random_rows(vit.norm_spec, 4)
    deeper = random_rows(HyperViT(**{**SMALL, "depth": 3}).norm_spec, 4)
    renamed = NormSpec([f"x.{name}" for name in rows.spec.names], rows.spec.widths)
    for other in (deeper, NormParams(renamed, rows.table)):
        for call in (vit, vit.forward_features, vit.forward_intermediates, vit.get_intermediate_layers):
            with pytest.raises(ValueError, match=r"params must follow this encoder's spec, 5 layers and P = 480, got"):
                call(images, params=other)
    with pytest.raises(ValueError, match="params must be NormParams, got Tensor"):
        vit(images, rows.table)


@pytest.mark.parametrize("ids", [[0], [0, 1, 2], [0, 1, 2, 3, 0]])
def test_refuses_params_of_another_batch(ids):
    _, vit = hyper_pair()
    rows = random_rows(vit.norm_spec, 4)
    with pytest.raises(ValueError, match=f"params must be for a batch of 4 images, got rows for {len(ids)}"):
        vit(make_images(batch=4), rows[ids])
    if len(ids) != 1:  # one row serves any batch
        with pytest.raises(ValueError, match=f"params must be for a batch of 4 images, got rows for {len(ids)}"):
            vit(make_images(batch=4), NormParams(rows.spec, rows.table[ids]))
