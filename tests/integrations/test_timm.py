"""hyper_<name> in timm's registry: what timm's own scripts do with a name gives what they make of the stock model."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import list_models, model_entrypoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from hyperclip_fast import HyperEncoder, HyperViT
from hyperclip_fast.encoders import to_encoder
from hyperclip_fast.modulated_norms import ROW_NORMS
from tests.encoders.encoder_cases import rows_of, with_row
from tests.encoders.vit_cases import assert_same
from tests.helpers import assert_close

STOCK = list_models(exclude_filters="hyper_*")
OURS = {name.removeprefix("hyper_") for name in list_models("hyper_*")}
SMALL = [name for name in list_models("test_*") if name in OURS]  # timm's own, one of many a family
CFG = ("hf_hub_id", "hf_hub_filename", "url", "tag", "mean", "std", "input_size", "interpolation", "num_classes")


def families(names):
    """The first name of each family: those of one module that begin with the same word."""
    first = {}
    for name in names:
        first.setdefault((model_entrypoint(name).__module__, name.split("_")[0]), name)
    return list(first.values())


def pair(name, **kwargs):
    """A stock model in eval mode, and hyper_<name> with its weights."""
    torch.manual_seed(0)
    stock = timm.create_model(name, **kwargs).eval()
    ours = timm.create_model(f"hyper_{name}", **kwargs).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.slow
def test_a_name_of_each_family_is_built():
    for name in families(sorted(OURS)):
        with torch.device("meta"):
            model = timm.create_model(f"hyper_{name}", num_classes=3)
        assert isinstance(model, HyperViT | HyperEncoder), name
        assert model.norm_spec.num_params and model.num_classes == 3, name
        norms = {
            type(part) for part in model.modules() if "Norm" in type(part).__name__ and "weight" in part._parameters
        }
        assert {kind.__name__ for kind in norms - ROW_NORMS.keys()} <= {"GlobalResponseNorm"}, (
            name
        )  # of ConvNeXtV2's MLP


@pytest.mark.slow
def test_names_that_are_not_registered_are_refused_with_the_reason():
    left_out = set(STOCK) - OURS
    assert set(STOCK) > OURS and 0 < len(left_out) < 60
    for name in left_out:
        with torch.device("meta"):
            stock = timm.create_model(name)
        with pytest.raises(ValueError, match=rf"norm with weights.*got {type(stock).__name__} without one"):
            to_encoder(stock)


def test_pretrained_weights_are_timms():
    stock = [name for name in timm.list_pretrained(exclude_filters="hyper_*") if name.split(".")[0] in OURS]
    assert set(timm.list_pretrained("hyper_*")) == {f"hyper_{name}" for name in stock}
    assert len(stock) > 1000 and "hyper_efficientnet_b0.ra_in1k" in timm.list_pretrained("hyper_*")
    for name in sorted({*stock, *OURS}):
        ours, theirs = timm.get_pretrained_cfg(f"hyper_{name}"), timm.get_pretrained_cfg(name)
        for field in CFG if theirs is not None else ():
            assert getattr(ours, field) == getattr(theirs, field), (name, field)


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k", "test_convnext"])
def test_pretrained_asks_for_the_same_file(name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "timm.models._builder.load_pretrained", lambda _, pretrained_cfg, **__: asked.append(pretrained_cfg)
    )
    for each in (name, f"hyper_{name}"):
        with torch.device("meta"):
            model = timm.create_model(each, pretrained=True, num_classes=10)
    assert asked[0]["hf_hub_id"] == f"timm/{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}"
    assert asked[0] == asked[1] and resolve_data_config(model=model)["input_size"] == asked[0]["input_size"]


@pytest.mark.parametrize("name", SMALL)
def test_without_rows_it_is_the_stock_model_and_with_rows_it_is_not(name):
    stock, ours = pair(name, num_classes=5)
    images, rows = torch.randn(3, *stock.default_cfg["input_size"]), rows_of(ours, 3)
    with torch.no_grad():
        assert torch.equal(ours(images), stock(images))
        mixed = ours(images, rows)
        for task in range(3):
            assert_close(mixed[task], with_row(stock, rows, task).double()(images.double())[task], slack=10)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_features_only(name):
    stock, ours = pair(name, features_only=True, out_indices=(0, 1))
    images, params = torch.randn(2, *stock.default_cfg["input_size"]), None
    assert [map.shape for map in ours(images)] == [map.shape for map in stock(images)]
    assert all(map(torch.equal, ours(images), stock(images)))
    if isinstance(ours, HyperEncoder):
        params = rows_of(ours, 2)
        for task in range(2):
            for mixed, alone in zip(ours(images, params), with_row(stock, params, task)(images), strict=True):
                assert_close(mixed[task], alone[task].double(), slack=10)


def trained(name, folder):
    """What timm's train.py does with a name, in two steps: the model, the averaged one, and the checkpoint's path."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, drop_path_rate=0.1, global_pool="avg", scriptable=False)
    model.set_grad_checkpointing()
    optimizer, ema = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05), ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
    for _ in range(2):
        images = torch.randn(4, *resolve_data_config(model=model)["input_size"])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        ema.update(model)
    saver.save_checkpoint(epoch=0, metric=1.0)
    return model.eval(), ema.module.eval(), folder / "last.pth.tar"


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext"])
def test_training_scripts_end_with_the_stock_models_weights(name, tmp_path):
    """And validate.py reads the checkpoint of either into either."""
    runs = {}
    for each in (name, f"hyper_{name}"):
        (tmp_path / each).mkdir()
        runs[each] = trained(each, tmp_path / each)
    (stock, stock_ema, path), (ours, our_ema, our_path) = runs.values()
    assert_same(ours.state_dict(), stock.state_dict())
    assert_same(our_ema.state_dict(), stock_ema.state_dict())
    images = torch.randn(2, *resolve_data_config(model=ours)["input_size"])
    for each in (name, f"hyper_{name}"):
        for checkpoint in (path, our_path):
            read = timm.create_model(each, num_classes=4, global_pool="avg", checkpoint_path=checkpoint).eval()
            assert torch.equal(read(images), stock_ema(images))  # timm prefers the average


@pytest.mark.slow
def test_registering_imports_no_encoder():
    code = """
import sys
import timm, hyperclip_fast
assert timm.is_model("hyper_resnet18") and "hyperclip_fast.encoders" not in sys.modules
assert type(timm.create_model("hyper_test_vit")).__name__ == "HyperViT"
assert set(timm.list_models(module="timm")) == set(timm.list_models("hyper_*"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
