"""Text heads: the kernel against its equation, and each kind wherever class embeddings are made."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.integrations.open_clip import to_open_clip
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.text.head import create_text_head
from tests.helpers import assert_close
from tests.towers import HashTower, patch_text_tower, tiny_config, tiny_model

NAMES = ["cat", "dog", "parrot"]
KERNEL = {"text_head": "kernel", "text_anchors": 7}
IDENTITY = {"text_head": "identity", "embed_dim": HashTower.dim}
TEXT = "transformer:width=16,depth=1,heads=2,dim=24"


def test_the_kernel_is_its_equation():
    head = create_text_head("kernel", 24, 5, anchors=7, gamma=3.0)
    x = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0))
    x[1, 3] = 0  # padding
    wide, anchors = x.double(), head.anchors.double()
    unit = torch.where(wide.norm(dim=-1, keepdim=True) > 0, wide / wide.norm(dim=-1, keepdim=True), 0)
    squared = (unit[..., None, :] - anchors).square().sum(-1)
    squared[1, 3] = 2  # as if at a right angle to every anchor
    expected = torch.exp(-3.0 / 2 * squared) @ head.weight.double().T + head.bias.double()
    assert_close(head(x), expected)
    torch.nn.init.normal_(head.linear)
    expected = expected + unit @ head.linear.double().T
    assert_close(head(x), expected)
    assert_close(head(5 * x), expected)


def test_a_linear_head_is_what_it_was(monkeypatch):
    patch_text_tower(monkeypatch)
    model = tiny_model()
    features = model.text_features(NAMES)
    expected = torch.nn.functional.normalize(features @ model.state_dict()["text_projection.weight"].T, dim=-1)
    torch.testing.assert_close(model.encode_text(NAMES), expected)
    assert not {"text_head", "text_anchors", "text_gamma"} & set(json.loads(model.config.to_json()))


def test_the_identity_gives_the_text_features(monkeypatch):
    patch_text_tower(monkeypatch)
    model = tiny_model(**IDENTITY)
    assert torch.equal(model.encode_text(NAMES), torch.nn.functional.normalize(model.text_features(NAMES), dim=-1))
    assert not any(key.startswith("text_projection") for key in model.state_dict())


@pytest.mark.parametrize("options", [KERNEL, IDENTITY], ids=str)
def test_save_load_and_bank(tmp_path, monkeypatch, options):
    patch_text_tower(monkeypatch)
    model = tiny_model(**options)
    model.save_pretrained(tmp_path / "model")
    kept = json.loads((tmp_path / "model" / "config.json").read_text())
    assert kept["text_head"] == options["text_head"] and ("text_anchors" in kept) == (options is KERNEL)
    loaded = HyperCLIP.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded.encode_text(NAMES), model.encode_text(NAMES))
    bank = TaskBank(loaded)
    bank.add("pets", NAMES)
    assert torch.equal(bank.class_embeddings("pets"), model.encode_text(NAMES))
    bank.save(tmp_path / "bank.safetensors")
    TaskBank.load(tmp_path / "bank.safetensors", model)
    if options is KERNEL:
        assert load_file(tmp_path / "model" / "model.safetensors")["text_projection.anchors"].shape == (7, 24)
        other = HyperCLIP(tiny_config(**options, text_gamma=2.0)).eval()
        other.load_state_dict(model.state_dict())
        with pytest.raises(ValueError, match="made by another one"):
            TaskBank.load(tmp_path / "bank.safetensors", other)


@pytest.mark.parametrize("options", [KERNEL, IDENTITY], ids=str)
def test_open_clips_classifier_is_the_models(options):
    model = tiny_model(text_tower=TEXT, **options)
    adapter, _, tokenizer = to_open_clip(model, NAMES, ["{}"])
    classifier = open_clip.build_zero_shot_classifier(adapter, tokenizer, NAMES, ["{}"])
    torch.testing.assert_close(classifier.T, model.encode_text(NAMES), atol=1e-6, rtol=1e-5)


def test_the_kernel_learns():
    head = create_text_head("kernel", 24, 5, anchors=7)
    head(torch.randn(3, 24)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
    assert {name for name, _ in head.named_parameters()} == {"weight", "bias", "linear"}


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"text_head": "mlp"}, "text_head must be one of"),
        ({"text_head": "kernel"}, "text_anchors must be at least 1"),
        ({"text_anchors": 3}, "text_anchors must be 0"),
        ({**KERNEL, "text_gamma": 0.0}, "text_gamma must be greater than 0, got 0"),
        ({"text_head": "identity"}, "embed_dim must be text_dim = 24 with text_head identity, got 16"),
    ],
    ids=str,
)
def test_refused_heads(monkeypatch, wrong, match):
    patch_text_tower(monkeypatch)
    with pytest.raises(ValueError, match=match):
        HyperCLIP(tiny_config(**wrong))
