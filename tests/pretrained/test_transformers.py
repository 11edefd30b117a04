"""HyperCLIP.from_transformers: at step 0 it is the CLIP or SigLIP of transformers; one folder then works offline."""

import shutil

import pytest
import torch
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.text import create_text_tower, load_text_tower
from tests.pretrained.test_open_clip import relative

WORDS = ["a", "photo", "of", "cat", "dog", "the"]
TEXTS = ["a cat", "the photo of the dog", "dog"]
VISION = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
TEXT = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 10}
TOKENS = {"max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SQUARE = {"height": 32, "width": 32}
KINDS = ("clip", "siglip", "siglip2")


def write_tokenizer(folder):
    """Six words, with marks at both ends."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS, "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<bos>", 1), ("<eos>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)


def write_model(kind, folder, act="quick_gelu"):
    """A small model of a kind with weights that tell its norms and biases apart."""
    torch.manual_seed(0)
    text, sizes = {**TEXT, **TOKENS}, {**VISION, "intermediate_size": 100}
    if kind == "clip":
        vision = {**sizes, "image_size": 32, "hidden_act": act}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE)
    elif kind == "siglip":
        config = SiglipConfig(text_config={**text, "projection_size": 48}, vision_config={**sizes, "image_size": 32})
        model, processor = SiglipModel(config), SiglipImageProcessor(size=SQUARE)
    else:
        config = Siglip2Config(text_config={**text, "projection_size": 48}, vision_config={**sizes, "num_patches": 16})
        model, processor = Siglip2Model(config), Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_tokenizer(folder)
    return model.eval()


@torch.no_grad()
def expected_output(model, kind, folder, images):
    """What transformers gives for images and TEXTS, with the arguments that its documentation asks for."""
    padding = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": 16}
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, truncation=True, return_tensors="pt", **padding)
    named = {"input_ids": tokens.input_ids}
    if kind == "clip":
        named["attention_mask"] = tokens.attention_mask
    if kind != "siglip2":
        return model(pixel_values=images, **named)
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)
    mask, shapes = torch.ones(patches.shape[:2], dtype=torch.long), torch.full((len(images), 2), 4)
    return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes, **named)


@pytest.mark.parametrize("kind, act", [*((kind, "quick_gelu") for kind in KINDS), ("clip", "gelu")])
@torch.no_grad()
def test_step_0_is_the_transformers_model_and_one_folder_keeps_it(kind, act, tmp_path):
    model = write_model(kind, tmp_path / "theirs", act)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    out = expected_output(model, kind, tmp_path / "theirs", images)
    ours = HyperCLIP.from_transformers(tmp_path / "theirs")
    assert type(ours.image).__name__ == "HyperViT"
    ours.save_pretrained(tmp_path / "ours", include_text=True)
    shutil.rmtree(tmp_path / "theirs")
    for one in (ours, HyperCLIP.from_pretrained(tmp_path / "ours")):
        embeddings, classes = one.encode_image(images, one.adapt([TEXTS])), one.encode_text(TEXTS)
        assert relative(embeddings, out.image_embeds) < 1e-5
        assert relative(classes, out.text_embeds) < 1e-5
        logits = one.logit_scale.exp() * embeddings @ classes.T + one.logit_bias
        assert relative(logits, out.logits_per_image) < 1e-5


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pictures_become_the_processors_pixels(kind, tmp_path):
    from PIL import Image

    write_model(kind, tmp_path)
    picture = Image.effect_noise((61, 50), 90).convert("RGB")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(HyperCLIP.from_transformers(tmp_path).preprocess(picture), expected, rtol=0, atol=1e-5)


def test_changed_weights_of_a_named_text_tower_do_not_pass(tmp_path):
    write_model("clip", tmp_path / "theirs")
    HyperCLIP.from_transformers(tmp_path / "theirs").save_pretrained(tmp_path / "ours", include_text=False)
    assert HyperCLIP.from_pretrained(tmp_path / "ours").encode_text(TEXTS).shape == (3, 24)
    changed = CLIPModel.from_pretrained(tmp_path / "theirs")
    changed.text_projection.weight.data.mul_(1.01)
    changed.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"text_tower must have the weights .* got .* include_text=True"):
        HyperCLIP.from_pretrained(tmp_path / "ours").encode_text(TEXTS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_half_alone_is_what_get_text_features_gives(kind, tmp_path):
    model = write_model(kind, tmp_path / "theirs")
    out = expected_output(model, kind, tmp_path / "theirs", torch.zeros(1, 3, 32, 32))
    tower = create_text_tower(f"hf:{tmp_path / 'theirs'}")
    assert relative(torch.nn.functional.normalize(tower.encode(TEXTS), dim=-1), out.text_embeds) < 1e-5
    (tmp_path / "text").mkdir()
    tower.save(tmp_path / "text")
    again = load_text_tower(f"hf:{tmp_path / 'theirs'}", tmp_path / "text", templates=["a {}"])
    assert torch.equal(again.encode_prompts(TEXTS), tower.encode(TEXTS)) and again.templates == ("a {}",)


def test_what_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a transformers model with weights in safetensors"):
        HyperCLIP.from_transformers(tmp_path)
    from hyperclip_fast.text import minilm_folder

    with pytest.raises(ValueError, match=r"source must be a model of type clip, siglip, siglip2, got bert"):
        HyperCLIP.from_transformers(minilm_folder())


def test_a_kept_text_tower_stays_in_float32(tmp_path):
    write_model("clip", tmp_path / "theirs").half().save_pretrained(tmp_path / "theirs")
    ours = HyperCLIP.from_transformers(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", include_text=True)
    again = HyperCLIP.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.encode_text(TEXTS), ours.encode_text(TEXTS))
    assert {parameter.dtype for parameter in again.text_tower.parameters()} == {torch.float32}


def test_a_folders_text_tower_is_kept_for_the_name_leads_there_from_one_place_alone(tmp_path, monkeypatch):
    write_model("clip", tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    ours = HyperCLIP.from_transformers("theirs")
    ours.save_pretrained(tmp_path / "ours")
    shutil.rmtree(tmp_path / "theirs")
    assert torch.equal(HyperCLIP.from_pretrained("ours").encode_text(TEXTS), ours.encode_text(TEXTS))


def test_changes_of_the_config_keep_what_the_weights_need(tmp_path):
    write_model("clip", tmp_path)
    usual, changed = (
        HyperCLIP.from_transformers(tmp_path, config=config)
        for config in (None, {"image_kwargs": {"proj_drop_rate": 0.1}})
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(changed.encode_image(images), usual.encode_image(images))
    assert changed.config.image_kwargs == {**usual.config.image_kwargs, "proj_drop_rate": 0.1}
    with pytest.raises(ValueError, match=r"text_tower must be hf:.* which was taken over, got minilm"):
        HyperCLIP.from_transformers(tmp_path, config={"text_tower": "minilm"})
