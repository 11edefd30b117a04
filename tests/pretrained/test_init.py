"""hyperclip init: a folder that the other commands take, and what it prints."""

import open_clip
import pytest
import torch

from hyperclip_fast.cli.main import main
from hyperclip_fast.hyperclip import HyperCLIP
from tests.pretrained.test_transformers import TEXTS, expected_output, relative, write_model


def test_a_transformers_model(tmp_path, capsys):
    theirs = write_model("siglip", tmp_path / "theirs")
    source = f"transformers:{tmp_path / 'theirs'}"
    assert main(["init", "--from", source, "--out", str(tmp_path / "start"), "--include-text"]) == 0
    shown = capsys.readouterr().out
    for part in ("image tower    vit_base_patch16_siglip_224, HyperViT", "new            hypernetwork", "check"):
        assert part in shown
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = expected_output(theirs, "siglip", tmp_path / "theirs", images)
    model = HyperCLIP.from_pretrained(tmp_path / "start")
    assert relative(model.encode_image(images, model.adapt([TEXTS])), out.image_embeds) < 1e-5
    assert "text/" not in shown and (tmp_path / "start" / "text" / "model.safetensors").is_file()


@pytest.mark.slow
def test_open_clip_and_timm(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "clip.pt")
    for source, more in ((f"open_clip:ViT-S-32-alt/{tmp_path / 'clip.pt'}", []), ("timm:resnet10t", ["--weights"])):
        arguments = ["init", "--from", source, "--out", str(tmp_path / "start"), *more, *(["random"] if more else [])]
        assert main(arguments) == 0, capsys.readouterr().err
        assert HyperCLIP.from_pretrained(tmp_path / "start").encode_text(["cat"]).isfinite().all()
    assert "head of the image tower, text head, hypernetwork" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["ViT-B-32", "open_clip:", "flax:ViT-B-32"])
def test_other_sources_are_refused(source, tmp_path, capsys):
    assert main(["init", "--from", source, "--out", str(tmp_path / "start")]) == 2
    assert "source must be open_clip:<model>" in capsys.readouterr().err and not (tmp_path / "start").exists()


def test_options_of_timm_models_are_refused_beside_others(tmp_path, capsys):
    arguments = ["init", "--from", "open_clip:ViT-S-32-alt", "--weights", "mine.pt", "--out", str(tmp_path / "start")]
    assert main(arguments) == 2
    assert "must be left out but beside a timm model" in capsys.readouterr().err
