"""HyperCLIP.from_timm: the image tower's weights, and new projections."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from hyperclip_fast.hyperclip import HyperCLIP
from tests.towers import patch_text_tower

NAME = "resnet10t.c3_in1k"


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_features_are_the_timm_models(tmp_path, suffix):
    torch.manual_seed(0)
    stock = timm.create_model(NAME).eval()
    file = tmp_path / f"weights{suffix}"
    save_file(stock.state_dict(), file) if suffix == ".safetensors" else torch.save(stock.state_dict(), file)
    model = HyperCLIP.from_timm(NAME, "transformer", weights=str(file), config={"embed_dim": 32, "hyper_width": 64})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = stock.forward_features(images)
        assert torch.equal(model.image.forward_features(images), expected)
        features = torch.nn.functional.normalize(model.image.forward_head(expected), dim=-1)
        assert torch.equal(model.encode_image(images, model.adapt([["a", "b"]])), features)
    assert model.encode_text(["a"]).shape == (1, 32)
    cfg = timm.get_pretrained_cfg(NAME)
    ours = model.preprocessing
    assert (ours.mean, ours.std, ours.crop_pct) == (cfg.mean, cfg.std, cfg.crop_pct)
    assert model.config.freeze_statistics and not model.training


def test_names_and_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"weights must be a \.safetensors"):
        HyperCLIP.from_timm(NAME, weights=str(tmp_path / "none.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="weights must hold the model's"):
        HyperCLIP.from_timm(NAME, weights=str(tmp_path / "other.safetensors"))


def test_random_weights():
    model = HyperCLIP.from_timm("vit_tiny_patch16_224", weights=False, config={"embed_dim": 8, "depth": 12})
    assert type(model.image).__name__ == "HyperViT" and model.image_size == 224
