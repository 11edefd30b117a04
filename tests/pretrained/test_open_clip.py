"""HyperCLIP.from_open_clip: at step 0 it is the open_clip model; what timm has no counterpart for is refused."""

import copy
import json

import open_clip
import pytest
import torch
from PIL import Image

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.integrations import open_clip_table
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.pretrained.open_clip import _name_of
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.text import weights_sha256

NAMES = ["cat", "a dog", "red square"]
VIT = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
TIMM = {"timm_pool": "", "timm_proj": "linear", "image_size": 64}
SMALL_TEXT = {"layers": 2, "width": 64, "heads": 2, "vocab_size": 49408}
# Every kind of image tower that open_clip builds, small; the real ones are compared by names and shapes below.
TOWERS = {
    "vit": (VIT, False, "HyperViT"),
    "vit quick": (VIT, True, "HyperViT"),
    "vit tanh": ({**VIT, "act_kwargs": {"approximate": "tanh"}}, False, "HyperViT"),
    "vit scaled": ({**VIT, "ls_init_value": 0.1, "mlp_ratio": 3.0}, False, "HyperViT"),
    "vit clipa": ({**VIT, **CLIPA}, False, "HyperViT"),
    "vit avg": ({**VIT, "pool_type": "avg"}, False, "HyperViT"),
    "vit tokens": ({**VIT, "output_tokens": True}, False, "HyperViT"),
    "siglip": (
        {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224},
        False,
        "HyperViT",
    ),
    "fastvit": (
        {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None, "image_size": 256},
        False,
        "HyperFastVit",
    ),
    "convnext linear": ({**TIMM, "timm_model_name": "convnext_atto"}, False, "HyperConvNeXt"),
    "convnext bias": ({**TIMM, "timm_model_name": "convnext_atto", "timm_proj_bias": True}, False, "HyperConvNeXt"),
    "convnext mlp": ({**TIMM, "timm_model_name": "convnext_atto", "timm_proj": "mlp"}, False, "HyperConvNeXt"),
    "vit pooled": (
        {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "linear", "image_size": 224},
        False,
        "HyperViT",
    ),
    "eva": (
        {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None, "image_size": 384},
        False,
        "HyperEva",
    ),
    "resnet": ({"layers": [3, 4, 6, 3], "width": 64, "image_size": 224}, False, "HyperByobNet"),
}


def small_clip(vision, quick=False, own_text=True, embed_dim=48):
    """An open_clip model with weights that tell its norms and biases apart."""
    torch.manual_seed(0)
    if vision.get("timm_proj") == "none":
        embed_dim = 768
    kind = open_clip.CustomTextCLIP if own_text else open_clip.CLIP
    clip = kind(embed_dim, vision, SMALL_TEXT, quick_gelu=quick, init_logit_bias=-3.0).eval()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("proj.weight") or name == "visual.proj":
                parameter.mul_(3)
    return clip


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def check_parity(model, clip, images, tokens):
    """Embeddings, logits and those of the rows that a new hypernetwork writes equal open_clip's."""
    expected = clip.encode_image(images, normalize=True)
    expected = expected[0] if isinstance(expected, tuple) else expected
    texts = model.text_tower(tokens)
    rows = model.rows(texts[None])
    assert torch.equal(rows.table, model.image.base_params.table)
    assert relative(model.encode_image(images), expected) < 1e-5
    assert relative(model.encode_image(images, rows), expected) < 1e-5
    named = clip.encode_text(tokens, normalize=True)
    assert relative(model.project_text(texts), named) < 1e-5
    ours = model.logit_scale.exp() * model.encode_image(images) @ model.project_text(texts).T + model.logit_bias
    bias = 0 if clip.logit_bias is None else clip.logit_bias
    assert relative(ours, clip.logit_scale.exp() * expected @ named.T + bias) < 1e-5


@pytest.mark.parametrize("kind", TOWERS)
def test_step_0_is_the_open_clip_model(kind):
    vision, quick, encoder = TOWERS[kind]
    clip = small_clip(vision, quick)
    if kind == "vit tokens":
        clip.encode_image = lambda images, normalize: torch.nn.functional.normalize(clip.visual(images)[0], dim=-1)
    model = HyperCLIP.from_open_clip(clip, name="ViT-B-32-quickgelu" if quick else "ViT-B-32")
    assert type(model.image).__name__ == encoder and not model.training
    images = torch.randn(2, 3, model.image_size, model.image_size)
    check_parity(model, clip, images, open_clip.get_tokenizer("ViT-B-32")(NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "MobileCLIP2-S0", "RN50"])
def test_named_models(name, tmp_path):
    """By name with a checkpoint file, and as a model whose name is found."""
    torch.manual_seed(0)
    clip = open_clip.create_model(name).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = HyperCLIP.from_open_clip(name, str(tmp_path / "clip.pt"))
    images = torch.randn(1, 3, model.image_size, model.image_size)
    check_parity(model, clip, images, open_clip.get_tokenizer(name)(NAMES))
    found = HyperCLIP.from_open_clip(clip)
    assert found.config.text_sha256 == model.config.text_sha256
    assert torch.equal(found.encode_image(images), model.encode_image(images))
    picture = Image.effect_noise((300, 200), 90).convert("RGB")
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False
    )
    assert torch.equal(model.preprocess(picture), transform(picture))


def test_zero_shot_classifiers_are_open_clips():
    clip = small_clip(VIT)
    templates = ("a photo of a {}.",)
    model = HyperCLIP.from_open_clip(clip, name="ViT-B-32", config={"templates": templates})
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    weights = open_clip.build_zero_shot_classifier(clip, tokenizer, NAMES, [templates[0].format], device="cpu")
    assert relative(model.encode_text(NAMES).T, weights) < 1e-5
    bank = TaskBank(model)
    bank.add("task", NAMES)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = clip.logit_scale.exp() * clip.encode_image(images, normalize=True) @ weights + clip.logit_bias
    torch.testing.assert_close(bank.logits(images, ["task"] * 4), logits, rtol=1e-4, atol=1e-4)


def test_a_clip_without_a_text_module_of_its_own():
    clip = small_clip(VIT, own_text=False)
    config = {**open_clip.get_model_config("ViT-B-32"), "text_cfg": SMALL_TEXT, "embed_dim": 48}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(config))
        model = HyperCLIP.from_open_clip(clip, name="ViT-B-32")
    check_parity(model, clip, torch.randn(2, 3, 32, 32), open_clip.get_tokenizer("ViT-B-32")(NAMES))
    with pytest.raises(ValueError, match="name must say which"):
        HyperCLIP.from_open_clip(clip)


@pytest.mark.parametrize(
    "name, found",
    [
        *((name, name) for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "RN50")),
        ("MobileCLIP-S2", "MobileCLIP2-S2"),  # the same but for the weights
    ],
)
def test_a_models_name_is_found_by_its_shape(name, found):
    with torch.device("meta"):
        assert _name_of(open_clip.create_model(name, load_weights=False, device="meta")) == found


def test_training_rows_leaves_what_was_taken_over():
    clip = small_clip(VIT)
    model = HyperCLIP.from_open_clip(clip, name="ViT-B-32", config={"hyper_width": 32, "hyper_depth": 1})
    out = model(torch.randn(2, 3, 32, 32), [NAMES, NAMES[:2]], torch.tensor([0, 1]))
    (out["image_features"] @ out["text_features"][0].T).sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("hypernetwork") for name in names) and any(name.startswith("image") for name in names)
    assert all(parameter.grad is None for parameter in model.text_tower.parameters())


def test_a_trained_text_tower_starts_from_the_weights():
    clip = small_clip(VIT)
    model = HyperCLIP.from_open_clip(clip, name="ViT-B-32", config={"train_text": True})
    assert weights_sha256(model.text) == weights_sha256(clip.text)
    assert all(parameter.requires_grad for parameter in model.text.parameters())
    assert model.config.text_sha256 is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attentional_pool": True, "attn_pooler_heads": 2}, "attentional pooling"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"norm_kwargs": {"eps": 1e-6}}, "eps 1e-06"),
        ({"timm_model_name": "resnet18", "timm_pool": "rot_attn", "timm_proj": None}, "RotAttentionPool2d"),
        ({"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "mlp"}, "under an MLP"),
        ({"layers": [1, 1, 1, 1]}, "ModifiedResNet of"),
    ],
    ids=["pool", "blocks", "eps", "rot", "mlp", "resnet"],
)
def test_what_timm_does_not_have_is_refused_with_the_reason(change, message):
    clip = small_clip({**VIT, **change})
    with pytest.raises(ValueError, match=f"image tower that timm has, too, got .*{message}"):
        HyperCLIP.from_open_clip(clip, name="ViT-B-32")


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match=r"name must be open_clip:<model> with a model such as ViT-B-32"):
        HyperCLIP.from_open_clip("ViT-B-23")
    with pytest.raises(ValueError, match=r"open_clip:ViT-B-32-quickgelu/openai, for the weights' activation"):
        HyperCLIP.from_open_clip("ViT-B-32", "openai")
    with pytest.raises(ValueError, match="pretrained goes with a model's name"):
        HyperCLIP.from_open_clip(small_clip(VIT), "openai")
    with pytest.raises(ValueError, match=r"config must go with the pretrained weights, got \{'depth': 3\}"):
        HyperCLIP.from_open_clip(small_clip(VIT), name="ViT-B-32", config={"depth": 3})


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_happens(request):
    """Every line is there; every seventh is computed, which takes a second each."""
    text = (request.config.rootpath / "docs" / "pretrained.md").read_text(encoding="utf-8")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    names = open_clip.list_models()
    assert set(names) <= set(lines)
    for name in [*names[::7], "coca_ViT-L-14"]:
        found = open_clip_table.line(open_clip_table.entry(name, open_clip.get_model_config(name)))
        assert lines[name] == found, "python -m hyperclip_fast.integrations.open_clip_table writes the table anew"


def test_a_saved_model_keeps_a_text_tower_that_no_name_leads_to(tmp_path):
    clip = small_clip(VIT)
    with pytest.MonkeyPatch.context() as patch:
        config = {**open_clip.get_model_config("ViT-B-32"), "text_cfg": SMALL_TEXT, "embed_dim": 48}
        patch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(config))
        model = HyperCLIP.from_open_clip(clip, name="ViT-B-32")
        model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["text_included"]
    again = HyperCLIP.from_pretrained(tmp_path / "a")
    assert torch.equal(again.encode_text(NAMES), model.encode_text(NAMES))
    again.save_pretrained(tmp_path / "b")
    images = torch.randn(2, 3, 32, 32)
    twice = HyperCLIP.from_pretrained(tmp_path / "b")
    assert torch.equal(twice.encode_image(images, twice.adapt([NAMES])), model.encode_image(images))
    assert isinstance(twice.image.base_params, NormParams)
