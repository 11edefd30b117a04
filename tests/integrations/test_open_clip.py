"""open_clip: our encoders in its configs, and a specialised HyperCLIP behind its model interface."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import hyperclip_fast
from hyperclip_fast import HyperViT, NormParams, TaskBank
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.hyperclip import load_model
from hyperclip_fast.integrations.open_clip import to_open_clip
from hyperclip_fast.text import minilm_folder
from tests.towers import tiny_model

TEXT = "transformer:width=32,depth=1,heads=2,dim=24,context_length=8"
NAMES = ["cat", "dog", "red parrot"]
IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
SHIPPED = Path(hyperclip_fast.__file__).with_name("assets") / "open_clip"


def small_config(folder, name, pool):
    """The shipped config with a small text tower."""
    config = json.loads((SHIPPED / "HyperViT-Ti-16.json").read_text())
    config["embed_dim"] = 24
    config["vision_cfg"]["timm_pool"] = pool
    config["text_cfg"].update(context_length=8, width=32, heads=2, layers=1)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.mark.parametrize("pool", ["", "avg"])
def test_an_open_clip_config_builds_our_encoder(tmp_path, pool):
    small_config(tmp_path, f"small-{pool or 'token'}", pool)
    clip = open_clip.create_model(f"small-{pool or 'token'}", output_dict=True).train()
    trunk = clip.visual.trunk
    assert isinstance(trunk, HyperViT)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    out = clip(images, open_clip.get_tokenizer(f"small-{pool or 'token'}")(["a cat", "a dog"]))
    loss = open_clip.loss.SigLipLoss()(**out)
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in trunk.named_parameters() if "head" not in name)
    rows = torch.cat([trunk.base_params.table, 1.5 * trunk.base_params.table]).detach()
    params = NormParams(trunk.norm_spec, rows, [0, 1])
    with torch.no_grad():
        mixed = F.normalize(clip.eval().visual.head(trunk(images, params)), dim=-1)
        torch.testing.assert_close(mixed[0], clip.encode_image(images, normalize=True)[0], atol=1e-5, rtol=1e-4)
        trunk.load_state_dict({**trunk.state_dict(), **params.state_dict(1)})
        torch.testing.assert_close(mixed[1], clip.encode_image(images, normalize=True)[1], atol=1e-5, rtol=1e-4)


def test_the_shipped_config_is_found_by_name():
    open_clip.add_model_config(SHIPPED)
    assert "HyperViT-Ti-16" in open_clip.list_models()
    clip = open_clip.create_model("HyperViT-Ti-16")
    assert isinstance(clip.visual.trunk, HyperViT)
    assert clip.logit_scale.exp().item() == pytest.approx(10) and clip.logit_bias.item() == -10


def bank_logits(model, templates=()):
    """TaskBank's logits, the prompts being the model's own."""
    model.text_tower.templates = templates
    bank = TaskBank(model)
    bank.add("pets", NAMES)
    model.text_tower.templates = ()
    return bank.logits(IMAGES, ["pets"] * len(IMAGES))


@pytest.mark.parametrize("template", ["{}", "a photo of a {}.", "this is {c}", lambda name: f"the {name} here"])
@pytest.mark.parametrize("batch", [None, 2])
def test_open_clips_own_classifier_gives_the_banks_logits(template, batch):
    model = tiny_model(text_tower=TEXT)
    adapter, _, tokenizer = to_open_clip(model, NAMES, [template])
    filled = template if callable(template) else template.replace("{c}", "{}")
    classifier = open_clip.build_zero_shot_classifier(adapter, tokenizer, NAMES, [filled], num_classes_per_batch=batch)
    with torch.no_grad():
        features = adapter.encode_image(IMAGES, normalize=True)
        logits = adapter.logit_scale.exp() * features @ classifier + adapter.logit_bias
    text = filled("{}") if callable(filled) else filled
    torch.testing.assert_close(logits, bank_logits(model, (text,)), atol=1e-5, rtol=1e-4)
    assert (bank_logits(model, (text,)) - bank_logits(tiny_model(text_tower=TEXT), ("x {}",))).abs().max() > 1e-2


def test_several_templates_give_the_banks_row_and_nearly_its_classifier():
    model, templates = tiny_model(text_tower=TEXT), ["a {}", "the {}", "{} outside"]
    adapter, _, tokenizer = to_open_clip(model, NAMES, templates)
    ours = open_clip.build_zero_shot_classifier(adapter, tokenizer, NAMES, templates)
    model.text_tower.templates = tuple(templates)
    with torch.no_grad():
        row = model.adapt([NAMES]).state_dict()
        assert ((model.encode_text(NAMES) * ours.T).sum(-1) > 0.99).all()
        by_name = {name: [text.format(name) for text in templates] for name in NAMES}
        assert torch.equal(to_open_clip(model, NAMES)[0].encode_image(IMAGES), adapter.encode_image(IMAGES))
        assert torch.equal(to_open_clip(model, NAMES, by_name)[0].encode_image(IMAGES), adapter.encode_image(IMAGES))
    held = adapter.visual.state_dict()
    assert all(torch.equal(held[name], value) for name, value in row.items())


def test_forward_and_get_logits_are_open_clips():
    adapter, _, tokenizer = to_open_clip(tiny_model(text_tower=TEXT), NAMES)
    text = tokenizer(NAMES)
    assert text.dtype == torch.int64 and text.shape == (3, 8) and torch.equal(tokenizer("cat"), text[:1])
    with torch.no_grad():
        image_features, text_features, scale, bias = adapter(IMAGES, text)
        logits, transposed = adapter.get_logits(IMAGES, text)
        adapter.output_dict = True
        named = adapter(text=text)
    torch.testing.assert_close(logits, scale * image_features @ text_features.T + bias)
    assert torch.equal(logits.T, transposed)
    assert set(named) == {"image_features", "text_features", "logit_scale", "logit_bias"}
    assert named["image_features"] is None and torch.equal(named["text_features"], text_features)
    theirs = open_clip.CustomTextCLIP
    for name in ("encode_image", "encode_text", "get_logits", "forward"):
        arguments = [
            getattr(kind, name).__code__.co_varnames[: 3 if "encode" in name else 2] for kind in (theirs, type(adapter))
        ]
        assert arguments[0] == arguments[1], name


def test_minilm_and_a_picture(tmp_path):
    """The demo model: padded tokens embed as unpadded ones, and open_clip's transform prepares as ours does."""
    model = load_model()
    adapter, transform, tokenizer = to_open_clip(model, NAMES)
    text = tokenizer([*NAMES, "a very much longer name of a thing that needs many more tokens than all of the others"])
    assert text.shape == (4, 256)
    image = Image.effect_noise((70, 50), 90).convert("RGB")
    image.save(tmp_path / "a.png")
    with torch.no_grad():
        torch.testing.assert_close(adapter.encode_text(text, normalize=True)[:3], model.encode_text(NAMES))
        torch.testing.assert_close(adapter.encode_text(text[:1]), adapter.encode_text(text)[:1])
    assert torch.equal(transform(image), load_image(tmp_path / "a.png", model.preprocessing))
    assert adapter.visual.image_size == (160, 160) and adapter.visual.preprocess_cfg["interpolation"] == "bicubic"


def test_a_tokenizer_that_pads_with_the_end_of_a_text(tmp_path):
    """The end is read, as the tower's own encode reads it; what fills up is not."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.pad_token = tokenizer.sep_token
    tokenizer.save_pretrained(tmp_path)
    model = tiny_model(text_tower=f"hf:{tmp_path}")
    assert model.text_tower.pad_id == model.text_tower.tokenize(["cat"])["input_ids"][0, -1]
    adapter, _, tokenizer = to_open_clip(model, NAMES)
    with torch.no_grad():
        torch.testing.assert_close(adapter.encode_text(tokenizer(NAMES), normalize=True), model.encode_text(NAMES))


def test_a_name_may_come_twice_as_in_imagenets():
    model, names = tiny_model(text_tower=TEXT), ["missile", "cat", "missile"]
    adapter, _, tokenizer = to_open_clip(model, names)
    with torch.no_grad():
        logits, _ = adapter.get_logits(IMAGES, tokenizer(names))
        row = model.adapt([names])
        features = model.encode_image(IMAGES, NormParams(row.spec, row.table))
        expected = model.logit_scale.exp() * features @ model.encode_text(names).T + model.logit_bias
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_no_class_names_is_the_base_row():
    model = tiny_model(text_tower=TEXT)
    adapter, _, _ = to_open_clip(model, None)
    with torch.no_grad():
        torch.testing.assert_close(adapter.encode_image(IMAGES), model.image(IMAGES))


@pytest.mark.parametrize(
    "names, templates, match",
    [
        ([], None, "a task must be"),
        (NAMES, ["no place"], "one {} or {c} each"),
        (NAMES, ["{} and {}"], "one {} or {c} each"),
        (NAMES, [], "a list of prompts"),
        (NAMES, "a {}", "templates must"),
        (NAMES, {"cat": ["a cat"]}, "must give 'dog' a list of prompts"),
    ],
)
def test_refused_input(names, templates, match):
    with pytest.raises(ValueError, match=match):
        to_open_clip(tiny_model(text_tower=TEXT), names, templates)


def test_a_crop_that_open_clip_has_not_is_refused():
    with pytest.raises(ValueError, match=r"crop_pct must be 1.* got 0\.9"):
        to_open_clip(tiny_model(text_tower=TEXT, crop_pct=0.9), NAMES)
