"""HyperCLIP: rows from names, the identity of a new model, specialised stock models, files."""

import json
import re
import socket

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.hyperclip_config import config_from_dict
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.training.losses import siglip_loss
from tests.helpers import assert_close
from tests.towers import HashTower, patch_text_tower, tiny_config, tiny_model

TASKS = [["cat", "dog", "parrot"], ["pizza", "sushi"], ["cat", "car", "tree", "sea"]]
OLD_CONFIG = """{
  "conditioned": true,
  "depth": 6,
  "drop_path_rate": 0.05,
  "embed_dim": 128,
  "freeze_statistics": false,
  "global_pool": "avg",
  "hyper_bottleneck": 64,
  "hyper_depth": 2,
  "hyper_heads": 4,
  "hyper_pool": "cross",
  "hyper_width": 128,
  "image_tower": "vit_tiny_r_s16_p8_224",
  "img_size": 48,
  "init_logit_bias": -4.0,
  "init_logit_scale": 2.3026,
  "learned_tokens": 0,
  "modulate": null,
  "num_heads": 4,
  "patch_size": 4,
  "templates": [],
  "text_dim": 384,
  "text_tower": "minilm",
  "train_text": false,
  "width": 128
}"""  # of a model from before preprocessing and text heads were kept
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([2, 0, 1, 1, 0, 2])


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def test_a_new_model_gives_the_base_row_to_every_task():
    model = HyperCLIP(tiny_config()).eval()
    params = model.adapt(TASKS)
    assert torch.equal(params.table, model.image.base_params.table.expand(3, -1))
    assert torch.equal(model.encode_image(IMAGES, params[[0, 1, 2, 0, 1, 2]]), model.encode_image(IMAGES, params[IDS]))


def test_predict_equals_the_bank(tmp_path):
    model, bank = tiny_model(), TaskBank(tiny_model())
    bank.add_many({str(i): task for i, task in enumerate(TASKS)})
    expected = bank.classify(IMAGES, [str(int(i)) for i in IDS], topk=4)
    labels = [TASKS[i] for i in IDS]
    shares = model.predict_proba(IMAGES, labels)
    assert model.predict(IMAGES, labels) == [prediction.names[0] for prediction in expected]
    for task, ours, prediction in zip(labels, shares, expected):
        ours = dict(zip(task, ours.tolist()))
        assert ours == pytest.approx(dict(zip(prediction.names, prediction.probabilities)), abs=1e-5)
    assert shares.shape == (6, 4) and (shares[2, 2:] == 0).all()
    one = model.predict_proba(IMAGES, TASKS[1])
    torch.testing.assert_close(one[[2, 3]], shares[[2, 3], :2], rtol=0, atol=1e-5)
    assert model.predict(IMAGES[:0], TASKS[1]) == []


def test_predict_takes_pictures(tmp_path):
    model = tiny_model()
    Image.effect_noise((40, 50), 90).convert("RGB").save(tmp_path / "a.png")
    batch = load_image(tmp_path / "a.png", model.preprocessing)[None]
    for one in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert torch.equal(model.preprocess(one)[None], batch)
        assert torch.equal(model.predict_proba(one, TASKS[0]), model.predict_proba(batch, TASKS[0]))
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(model.preprocess([image, image]), batch.expand(2, -1, -1, -1))
    assert model.predict([tmp_path / "a.png"] * 2, [TASKS[0], TASKS[1]])[0] in TASKS[0]


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (IMAGES, "cat", "non-empty list of class names"),
        (IMAGES, [], "non-empty list of class names"),
        (IMAGES, ["cat", ["dog"]], "non-empty list of class names|text that is not blank"),
        (IMAGES, [["cat"], ["dog"]], "labels must be lists for each of 6 images, got 2"),
        (IMAGES, ["cat", "cat"], "distinct"),
        (IMAGES[0], ["cat"], r"images must be .* got .*\(3, 32, 32\)"),
        (IMAGES[0].numpy(), ["cat"], "source must be a file's path.* got numpy.ndarray"),
        ([], ["cat"], "images must hold at least one picture"),
    ],
)
def test_predict_refuses(images, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().predict(images, labels)


def test_a_mixed_batch_equals_the_specialised_stock_models():
    model = tiny_model()
    with torch.no_grad():
        mixed = model.image(IMAGES, model.adapt(TASKS)[IDS])
        for image, task, ours in zip(IMAGES, IDS.tolist(), mixed):
            stock = model.specialize(TASKS[task])
            assert type(stock) is timm.models.VisionTransformer
            assert (stock(image[None])[0] - ours).abs().max() <= 1e-5


def test_padding_and_the_other_tasks_do_not_change_a_row():
    model = tiny_model()
    with torch.no_grad():
        together = model.adapt(TASKS).table
        alone = torch.cat([model.adapt([task]).table for task in TASKS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_every_text_is_encoded_once():
    model = tiny_model()
    model.stack_tasks(TASKS)
    features, mask = model.stack_tasks(TASKS)
    assert model.text_tower.calls == 2
    assert mask.tolist() == [[True] * 3 + [False], [True] * 2 + [False] * 2, [True] * 4]
    assert torch.equal(features[0, 0], features[2, 0])


def test_forward_from_names_and_from_features_agree():
    model = tiny_model()
    with torch.no_grad():
        by_name = model(IMAGES, TASKS, IDS)
        features, mask = model.stack_tasks(TASKS)
        by_feature = model(IMAGES, features, IDS, mask)
    assert set(by_name) == {"image_features", "text_features", "mask", "logit_scale", "logit_bias"}
    for key, value in by_name.items():
        assert torch.equal(value, by_feature[key]), key
    assert torch.equal(by_name["logit_scale"], model.logit_scale.exp())
    norms = torch.cat([by_name["image_features"].norm(dim=-1), by_name["text_features"].norm(dim=-1)[by_name["mask"]]])
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("train_text", [False, True])
def test_gradients_reach_every_part(train_text):
    model = tiny_model(train_text=train_text)
    model.train()
    out = model(IMAGES, [["a", "b", "c"], ["d", "e", "f"]], torch.tensor([0, 0, 0, 1, 1, 1]))
    images = out["image_features"].unflatten(0, (2, 3))
    siglip_loss(images, out["text_features"], out["logit_scale"], out["logit_bias"]).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert any(name.startswith("text.") for name, _ in model.named_parameters()) == train_text


def test_siglip_loss_against_its_equation_in_float64():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(3, 4, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    logits = scale * torch.einsum("gie,gje->gij", images, texts) + bias
    sign = 2 * torch.eye(4, dtype=torch.float64) - 1
    expected = torch.log1p(torch.exp(-sign * logits)).sum((1, 2)).mean() / 4
    torch.testing.assert_close(siglip_loss(images, texts, scale, bias), expected)
    with pytest.raises(ValueError, match="must be \\(G, K, E\\)"):
        siglip_loss(images[0], texts[0], scale, bias)


def test_unconditioned_model_ignores_the_names():
    model = HyperCLIP(tiny_config(conditioned=False)).eval()
    assert torch.equal(model.adapt(TASKS).table, model.image.base_params.table.expand(3, -1))
    assert not any("hypernetwork" in name for name in model.state_dict())


@pytest.mark.parametrize("options", [{}, {"hyper_pool": "mean"}, {"train_text": True}, {"conditioned": False}])
def test_save_and_load(tmp_path, options):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path / "model")
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "model").iterdir()}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["width"] == 32 and config["text_dim"] == HashTower.dim
    assert not any(isinstance(value, dict) for value in config.values())
    loaded = HyperCLIP.from_pretrained(str(tmp_path / "model")).eval()
    assert loaded.config == model.config
    with torch.no_grad():
        first, second = model(IMAGES, TASKS, IDS), loaded(IMAGES, TASKS, IDS)
    assert torch.equal(first["image_features"], second["image_features"])
    assert torch.equal(first["text_features"], second["text_features"])


def test_config_files_from_before_preprocessing_was_kept_stay_as_they_are():
    kept = json.loads(config_from_dict(json.loads(OLD_CONFIG)).to_json())
    assert kept == {**json.loads(OLD_CONFIG), "model_type": "hyperclip_fast"}


def test_preprocessing_is_saved_and_read(tmp_path):
    other = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bicubic", "crop_pct": 0.875}
    tiny_model(**other).save_pretrained(tmp_path)
    assert HyperCLIP.from_pretrained(tmp_path).preprocessing == Preprocessing(32, **other)


def test_a_frozen_text_tower_is_neither_saved_nor_needed_for_known_rows(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr("hyperclip_fast.hyperclip.create_text_tower", lambda *_, **__: pytest.fail("tower was built"))
    model = HyperCLIP.from_pretrained(str(tmp_path)).eval()
    assert not any(name.startswith("text.") for name in model.state_dict())
    base = model.image.base_params
    assert model.encode_image(IMAGES, NormParams(base.spec, base.table)).shape == (6, 16)


@pytest.mark.parametrize("tasks", [[], [[]], "cat", ["cat", "dog"], [["cat"], []], [["cat", 3]], [["cat", " "]]])
def test_refused_tasks(tasks):
    with pytest.raises(ValueError, match="task"):
        tiny_model().adapt(tasks)


@pytest.mark.parametrize(
    "names, match", [(["cat", "dog", "cat"], "got 'cat' twice"), ("cat", "non-empty list"), ([], "non-")]
)
def test_a_stock_model_is_made_for_distinct_names(names, match):
    with pytest.raises(ValueError, match=match):
        tiny_model().specialize(names)


def test_refused_config():
    with pytest.raises(ValueError, match="unknown keys \\['colour'\\]"):
        config_from_dict({"colour": "red"})


def test_files_that_are_refused(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    whole = (folder / "model.safetensors").read_bytes()

    def refused(match):
        with pytest.raises(ValueError, match=match):
            HyperCLIP.from_pretrained(str(folder))

    (folder / "config.json").write_text(json.dumps({**config, "colour": "red"}))
    refused("unknown keys \\['colour'\\]")
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file({name: weights[name] for name in weights if "hypernetwork" not in name}, folder / "model.safetensors")
    refused("weights that its config.json asks for")
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("weights that its config.json asks for")
    (folder / "config.json").unlink()
    refused("must be a folder with config.json")


def test_a_model_keeps_a_copy_of_its_config_and_checks_the_towers_width():
    config = tiny_config()
    assert HyperCLIP(config).config.text_dim == HashTower.dim and config.text_dim is None
    for train_text in (False, True):
        with pytest.raises(ValueError, match="text_dim must be 24"):
            HyperCLIP(tiny_config(text_dim=10, train_text=train_text)).adapt(TASKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model = tiny_model()
    with torch.no_grad():
        expected = model.double()(IMAGES.double(), TASKS, IDS)
        out = tiny_model().to(dtype)(IMAGES.to(dtype), TASKS, IDS)
    for key in ("image_features", "text_features"):
        assert out[key].dtype == dtype
        assert_close(out[key], expected[key], key, slack=20)


def test_a_tower_first_used_in_inference_mode_trains_and_moves_later():
    model = tiny_model()
    with torch.inference_mode():
        model.adapt(TASKS)
    model(IMAGES, TASKS, IDS)["image_features"].sum().backward()
    assert model.hypernetwork.embed.weight.grad.abs().sum() > 0
    assert next(model.to("meta").text_tower.parameters()).device.type == "meta"


@pytest.mark.parametrize("field, value", [("modulate", "norm"), ("templates", "a {}"), ("depth", 2.5), ("width", "a")])
def test_refused_types(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.5, 0.5)}, {"std": (1, 1, 0)}, {"interpolation": "nearest"}, {"crop_pct": 0.0}], ids=str
)
def test_refused_preprocessing(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        tiny_config(**wrong)


@pytest.mark.parametrize(
    "place", ["runs/none/model", "./none", "/none", "~/none", "none", "folder/none", "none/model.safetensors", ""]
)
def test_a_folder_that_is_not_there_is_never_asked_of_the_hub(place, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for load in (HyperCLIP.from_pretrained, load_model):
        with pytest.raises(ValueError, match=f"got {re.escape(place) or 'nothing'}, which is no folder"):
            load(place)


@pytest.fixture(params=[False, True], ids=["nobody listens", "HF_HUB_OFFLINE"])
def silent_hub(request, tmp_path, monkeypatch):
    """A hub that does not answer; the folder is its cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": request.param, "HF_HUB_CACHE": str(tmp_path)}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the hub's loader tries again"))
    return tmp_path


def test_a_hub_that_does_not_answer_is_asked_once(silent_hub, caplog):
    for load in (HyperCLIP.from_pretrained, load_model):
        with pytest.raises(ValueError, match="got owner/name, which is no folder nor in the hub's cache"):
            load("owner/name")
    assert not caplog.records


def test_what_the_hubs_cache_holds_needs_no_hub(silent_hub):
    model, cached = tiny_model(), silent_hub / "models--owner--name"
    model.save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    loaded = HyperCLIP.from_pretrained("owner/name").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_demo_names_the_shipped_model_and_loads_without_a_word(capfd):
    model = HyperCLIP.from_pretrained("demo")
    assert model.image_size == 160 and capfd.readouterr() == ("", "")
