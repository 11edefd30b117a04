"""HyperCLIP around encoders other than a VisionTransformer."""

import pytest
import timm
import torch
from torch import nn

from hyperclip_fast import HyperCLIP, HyperEncoder, HyperViT, TaskBank
from hyperclip_fast.export.formats import export
from hyperclip_fast.export.graphs import mixed_graph
from hyperclip_fast.export.specialized import save_specialized
from tests.helpers import assert_close
from tests.towers import patch_text_tower, tiny_config, tiny_model

NO_SIZES = dict.fromkeys(("patch_size", "width", "depth", "num_heads"))
PETS = ["cat", "dog", "parrot"]


@pytest.fixture(autouse=True)
def _text_tower(monkeypatch):
    patch_text_tower(monkeypatch)


def conv_model(**options):
    return tiny_model(image_tower="tinynet_e", img_size=48, **{**NO_SIZES, **options})


@torch.no_grad()
def test_batch_norm_encoder_from_names_to_predictions(tmp_path):
    model = conv_model()
    assert type(model.image).__name__ == "HyperEfficientNet" and model.image_size == 48
    assert model.image.norm_spec.num_params == 14240
    images = torch.randn(3, 3, 48, 48)
    bank = TaskBank(model)
    bank.add("pets", PETS)
    bank.add("food", ["pizza", "sushi"])
    mixed = model.encode_image(images, model.adapt([PETS, ["pizza", "sushi"]])[[0, 1, 0]])
    plain = model.specialize(PETS)
    assert not isinstance(plain, HyperEncoder) and list(plain.state_dict()) == list(model.image.state_dict())
    expected = nn.functional.normalize(plain(images), dim=-1)
    assert (mixed - expected)[[0, 2]].abs().max() < 1e-5 < (mixed - expected)[1].abs().max()
    assert bank.classify(images, ["pets", "food", "pets"])[0].names[0] in PETS
    model.save_pretrained(tmp_path / "model")
    loaded = HyperCLIP.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    save_specialized(model, PETS, tmp_path / "pets")
    again = timm.create_model(f"local-dir:{tmp_path / 'pets'}", pretrained=True).eval()
    assert torch.equal(again(images), plain(images)) and again.pretrained_cfg["input_size"] == (3, 48, 48)


@torch.no_grad()
def test_specialized_model_without_norms_and_with_the_tasks_statistics():
    model, images = conv_model().double(), torch.randn(8, 3, 48, 48, dtype=torch.float64)
    plain, fused = model.specialize(PETS), model.specialize(PETS, fuse=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert_close(fused(images), plain(images), slack=100)
    adapted = model.specialize(PETS, images=images)
    torch.optim.swa_utils.update_bn([images], plain)
    assert_close(adapted(images), plain.eval()(images), slack=1000)
    with pytest.raises(ValueError, match="no BatchNorm to re-estimate"):
        tiny_model().specialize(PETS, images=torch.randn(2, 3, 32, 32))


def test_options_that_a_tower_does_not_have():
    assert isinstance(HyperCLIP(tiny_config()).image, HyperViT)
    with pytest.raises(ValueError, match="patch_size must be None, as tinynet_e has no such option, got 8"):
        HyperCLIP(tiny_config(image_tower="tinynet_e", width=None, depth=None, num_heads=None))
    frozen = conv_model(freeze_statistics=True, modulate=("blocks.*",)).train()
    assert all(name.startswith("blocks.") for name in frozen.image.norm_spec.names)
    assert frozen.image.training and not frozen.image.bn1.training


def test_training_step_moves_hypernetwork_and_statistics():
    model = conv_model().train()
    before = model.image.bn1.running_mean.clone()
    out = model(torch.randn(4, 3, 48, 48), [PETS, ["pizza", "sushi"]], torch.tensor([0, 1, 1, 0]))
    out["image_features"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.hypernetwork.parameters())
    assert not torch.equal(model.image.bn1.running_mean, before)


@pytest.mark.slow
def test_mixed_onnx_of_a_batch_norm_encoder(tmp_path):
    """`export` itself runs the file at two sizes and compares it with PyTorch."""
    pytest.importorskip("onnxruntime")
    assert export(mixed_graph(conv_model()), tmp_path / "mixed.onnx") < 1e-4
