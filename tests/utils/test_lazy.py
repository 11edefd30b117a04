"""Names that are imported when they are first used, and models that timm knows as soon as both are imported."""

import subprocess
import sys

import pytest

import hyperclip_fast
from hyperclip_fast import data, embed, evaluation, export, training
from hyperclip_fast.utils.lazy import lazy_names

ORDERS = (
    "import hyperclip_fast, timm",
    "import timm, hyperclip_fast",
    "from hyperclip_fast import HyperViT; import timm",
    "import hyperclip_fast.hyper_block; from hyperclip_fast import HyperViT; import timm",
    "from timm.models import vision_transformer; import hyperclip_fast; import timm",
)


@pytest.mark.slow
def test_timm_knows_our_models_in_any_order():
    """Each order in a process of its own, which has PyTorch from the one that it was forked from."""
    code = """
import os, sys, torch, torchvision
for order in sys.argv[1:]:
    if not os.fork():
        assert "timm" not in sys.modules and "hyperclip_fast" not in sys.modules
        exec(order)
        assert len(timm.list_models("hyper_vit_tiny_*")) > 1
        timm.create_model("hyper_vit_tiny_patch16_224")
        sys.exit()
    assert os.wait()[1] == 0, order
"""
    subprocess.run([sys.executable, "-c", code, *ORDERS], check=True)


@pytest.mark.parametrize("package", [hyperclip_fast, data, embed, evaluation, export, training])
def test_every_public_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None and name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_all_names_and_modules_after_a_bare_import():
    code = """
import pickle, sys
import hyperclip_fast
assert "torch" not in sys.modules
from hyperclip_fast import *
assert __version__ == hyperclip_fast.__version__ and HyperViT.__module__ == "hyperclip_fast.hyper_vit"
assert pickle.loads(pickle.dumps(NormSpec)) is hyperclip_fast.norm_params.NormSpec
assert "hyperclip_fast.training" not in sys.modules and hyperclip_fast.training.TrainConfig().steps
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_watched_module_can_be_loaded_again():
    code = """
import importlib, sys
from hyperclip_fast.utils.lazy import after_import
before, calls = len(sys.meta_path), []
after_import("colorsys", lambda: calls.append("colorsys" in sys.modules))
import colorsys
importlib.reload(colorsys)
after_import("colorsys", lambda: calls.append(True))
assert calls == [True, True] and len(sys.meta_path) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_is_looked_up_once(monkeypatch):
    find, names = lazy_names("hyperclip_fast.utils", {"seeds": ("step_seed",)})
    assert find("step_seed")(2, 3) == 2_000_009 and "step_seed" in names()
    assert sys.modules["hyperclip_fast.utils"].step_seed is find("step_seed")
    monkeypatch.delattr("hyperclip_fast.utils.step_seed")
