"""The Python of docs/, run as written; shell commands there have tests of their own."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hyperclip_fast import NormParams
from hyperclip_fast.embed.run import embed

DOCS = Path(__file__).resolve().parent.parent / "docs"


def run(name):
    """All blocks of Python of one page, one after the other, in one scope."""
    scope = {}
    for block in (DOCS / name).read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(block.split("```")[0], scope)
    return scope


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 50), "orange").save("photo.jpg")


def test_open_clip(capsys):
    scope = run("open_clip.md")
    assert scope["classifier"].shape == (128, 3) and "parrot" in capsys.readouterr().out
    assert scope["clip"].visual.image_size == (48, 48)


def test_norm_rows():
    pytest.importorskip("peft")
    scope = run("norm_rows.md")
    assert torch.equal(scope["params"].table, NormParams.load("rows.safetensors").table[1:])
    assert scope["bank"].tasks == ("pets",)


def test_embed(capsys):
    embed(["photo.jpg"], {"digits": ["zero", "one"]}, "embeddings")
    assert run("embed.md")["image"].size == (60, 50)
    assert "torch.Size([1, 128]) photo.jpg digits" in capsys.readouterr().out
