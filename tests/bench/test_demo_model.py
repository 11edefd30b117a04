"""How the shipped model is made of its start and its training."""

import pytest
import torch
from safetensors.torch import load_file

from hyperclip_fast.bench.demo_model import finish
from hyperclip_fast.hyperclip import load_model
from tests.towers import patch_text_tower, tiny_model


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def test_what_is_shipped_lies_between_start_and_training_in_sixteen_bits(tmp_path):
    start, trained = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    start.save_pretrained(tmp_path / "start")
    trained.save_pretrained(tmp_path / "trained")
    finish(str(tmp_path / "start"), str(tmp_path / "trained"), str(tmp_path / "out"), 0.25)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    shipped, first, last = load_model(tmp_path / "out"), start.state_dict(), trained.state_dict()
    assert shipped.config == trained.config
    for name, tensor in shipped.state_dict().items():
        assert tensor.dtype == torch.float32
        mixed = name.startswith(("image.", "text_projection."))
        expected = first[name] + 0.25 * (last[name] - first[name]) if mixed else last[name]
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-3)


def test_weights_beyond_sixteen_bits_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        model.hypernetwork.pool.heads[0].bias.fill_(1e6)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"float16 holds, got others in \['hypernetwork.pool.heads.0.bias'\]"):
        finish(str(tmp_path / "start"), str(tmp_path / "trained"), str(tmp_path), 0.5)
