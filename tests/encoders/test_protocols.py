"""What PyTorch promises of any module, of whole models with rows: hooks, functional calls, meta, higher orders."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperclip_fast import HyperEncoder, HyperViT, NormParams
from hyperclip_fast.encoders import create_encoder
from hyperclip_fast.utils.files import save_safetensors
from hyperclip_fast.utils.private_api import TorchDispatchMode
from tests.encoders.vit_cases import hyper_pair, random_rows

BATCH = 2


def images(side: int = 32) -> torch.Tensor:
    return torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))


class Count(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        return function(*args, **(kwargs or {}))


def first_and_second_order(encoder: nn.Module, side: int) -> int:
    """Operators of a gradient of the table that has gradients, and of the gradient of its square."""
    table = random_rows(encoder.norm_spec, BATCH).table.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), Count() as count:  # the others have one order
        out = encoder(images(side), NormParams(encoder.norm_spec, table))
        (grad,) = torch.autograd.grad(out.square().sum(), table, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), table)
    assert second.isfinite().all() and second.abs().sum() > 0
    return count.operators


def test_a_second_order_costs_as_much_for_each_block():
    """Each further block once cost four times all before it."""
    costs = [first_and_second_order(hyper_pair(depth=depth)[1], 32) for depth in (2, 4, 6)]
    assert costs[2] - costs[1] <= 1.2 * (costs[1] - costs[0]), costs


def test_a_second_order_of_batch_norms():
    model = HyperEncoder.from_timm("resnet10t", num_classes=0).eval()
    assert first_and_second_order(model, 64) < 3_000  # 109,714 where it walked what had made the rows


@pytest.mark.parametrize("is_grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("name", ["blocks.0.norm1", "blocks.1.norm2", "norm"])
def test_hooks_of_a_norm_run_with_rows_too(name, is_grad):
    _, vit = hyper_pair()
    params, seen = random_rows(vit.norm_spec, BATCH), []
    with torch.set_grad_enabled(is_grad):
        plain = vit(images(), params)
        norm = vit.get_submodule(name)
        handle = norm.register_forward_hook(lambda module, args, out: seen.append((type(args[0]), out)) or 0 * out)
        zeroed = vit(images(), params)
        handle.remove()
        norm.register_forward_pre_hook(lambda module, args: (args[0],))
        torch.testing.assert_close(vit(images(), params), plain)
    assert len(seen) == 1 and not torch.allclose(zeroed, plain)


def test_a_norm_without_rows_is_called_where_somebody_listens(triton_backend):
    """On Triton's path, too, whose kernel would take its weights."""
    _, vit = hyper_pair()
    calls, norm = [], vit.blocks[0].norm1
    forward = norm.forward
    norm.forward = lambda x: calls.append("forward") or forward(x)
    vit.blocks[1].norm1.register_full_backward_hook(lambda *_: calls.append("backward"))
    vit(images()).sum().backward()
    assert calls == ["forward", "backward"]


def test_a_norm_whose_forward_was_replaced_takes_no_rows():
    _, vit = hyper_pair()
    vit.blocks[0].norm1.forward = lambda x: x
    with pytest.raises(ValueError, match="params cannot pass a norm"):
        vit(images(), random_rows(vit.norm_spec, BATCH))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_functional_call_with_plain_tensors(name):
    encoder = create_encoder(name, num_classes=0).eval()
    params, side = random_rows(encoder.norm_spec, BATCH), encoder.pretrained_cfg["input_size"][-1]
    tensors = {key: 2 * tensor.detach() for key, tensor in encoder.named_parameters()}
    ours = torch.func.functional_call(encoder, tensors, (images(side), params))
    with torch.no_grad():
        for key, tensor in encoder.named_parameters():
            tensor.copy_(tensors[key])
        torch.testing.assert_close(ours, encoder(images(side), params))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_the_meta_device_tells_shapes(name):
    encoder = create_encoder(name, num_classes=0).to("meta").eval()
    side = encoder.pretrained_cfg["input_size"][-1]
    table = torch.empty(3, encoder.norm_spec.num_params, device="meta")
    params = NormParams(encoder.norm_spec, table, torch.zeros(BATCH, dtype=torch.int64, device="meta"))
    batch = images(side).to("meta")
    assert encoder(batch, params).shape == encoder(batch).shape == (BATCH, encoder.head_hidden_size)


def test_channels_last_weights_are_saved(tmp_path):
    model = HyperEncoder.from_timm("mobilenetv3_small_050").to(memory_format=torch.channels_last)
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    twin = HyperEncoder.from_timm("mobilenetv3_small_050")
    timm.models.load_checkpoint(twin, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))


def test_a_vit_of_other_norms_becomes_a_hyper_encoder():
    """RMSNorm has no bias, which HyperViT's rows need."""
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    assert isinstance(create_encoder("vit_tiny_patch16_224", **options), HyperViT)
    encoder = create_encoder("vit_tiny_patch16_224", norm_layer="rmsnorm", **options)
    assert isinstance(encoder, HyperEncoder)
    assert encoder(images(), encoder.base_params).shape == (BATCH, 48)


@pytest.mark.parametrize("wrap, inner", [(torch.compile, "_orig_mod"), (nn.DataParallel, "module")])
def test_a_wrapped_model_is_named(wrap, inner):
    with pytest.raises(ValueError, match=f"got a .* around it: pass its {inner}"):
        HyperEncoder.from_timm(wrap(timm.create_model("resnet10t")))


def test_fx_follows_timms_own_model():
    from torchvision.models.feature_extraction import create_feature_extractor

    stock, vit = hyper_pair()
    found, expected = (create_feature_extractor(model, ["blocks.0.add_1", "norm"])(images()) for model in (vit, stock))
    assert found.keys() == expected.keys() == {"blocks.0.add_1", "norm"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])


class TwoInputs(nn.Module):
    """torch.jit traces tensors only."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch, table):
        return self.encoder(batch, NormParams(self.encoder.norm_spec, table))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("is_grad", [False, True], ids=["inference", "grad"])
def test_jit_traces_rows(is_grad):
    _, vit = hyper_pair()
    model, table = TwoInputs(vit).eval(), random_rows(vit.norm_spec, BATCH).table
    with torch.set_grad_enabled(is_grad):
        traced = torch.jit.trace(model, (images(), table))
        torch.testing.assert_close(traced(2 * images(), 0.5 * table), model(2 * images(), 0.5 * table))
