"""Preprocessing: what a model's tensors are, compared with timm's and open_clip's own transforms."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image

from hyperclip_fast.data.image_files import image_transform, load_image
from hyperclip_fast.data.preprocessing import HALF, Preprocessing

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SIZES = ((37, 53), (301, 200), (33, 32), (224, 224), (500, 71))  # odd, wide, almost and wholly square, a strip
OPEN_CLIP = [
    {**CLIP, "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0},
    {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0},
    {**CLIP, "interpolation": "bilinear", "resize_mode": "longest", "fill_color": 0},
    {**CLIP, "interpolation": "bicubic", "resize_mode": "longest", "fill_color": 77},
]
TIMM = [
    "resnet50.a1_in1k",
    "vit_base_patch16_siglip_224.webli",
    "tf_efficientnet_lite0.in1k",
    "volo_d5_448.sail_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
]


def photograph(size):
    """Noise with some structure, which shows a difference of half a pixel."""
    rng = np.random.default_rng(size[0])
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return Image.blend(small, noise, 0.3)


@pytest.mark.parametrize("cfg", OPEN_CLIP, ids=lambda cfg: f"{cfg['resize_mode']}-{cfg['fill_color']}")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_open_clips_transform(cfg, size):
    image = photograph(size)
    expected = open_clip.image_transform(32, is_train=False, **cfg)(image)
    ours = Preprocessing.from_open_clip({"size": (32, 32), **cfg})
    torch.testing.assert_close(image_transform(ours)(image), expected, rtol=0, atol=1e-6)
    again = open_clip.transform.PreprocessCfg(**ours.open_clip_config())
    assert torch.equal(open_clip.transform.image_transform_v2(again, is_train=False)(image), expected)


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_timms_transform(name, size):
    cfg = timm.get_pretrained_cfg(name).to_dict()
    expected = timm.data.create_transform(**timm.data.resolve_data_config(cfg))(photograph(size))
    ours = Preprocessing.from_timm(cfg)
    torch.testing.assert_close(image_transform(ours)(photograph(size)), expected, rtol=0, atol=1e-6)
    assert Preprocessing.from_timm(ours.timm_config()) == ours


def test_border_takes_timms_mean_where_no_colour_is_given():
    cfg = {**timm.get_pretrained_cfg("resnet50.a1_in1k").to_dict(), "crop_mode": "border"}
    expected = timm.data.create_transform(**timm.data.resolve_data_config(cfg))(photograph((60, 20)))
    assert torch.equal(image_transform(Preprocessing.from_timm(cfg))(photograph((60, 20))), expected)


def test_every_pretrained_tag_of_both_libraries_is_understood_or_refused():
    sides = {}
    for name in timm.list_pretrained():
        try:
            sides[name] = Preprocessing.from_timm(timm.get_pretrained_cfg(name).to_dict()).size
        except ValueError as error:
            assert "must be that of squares" in str(error) and "sapiens2" in name
    assert len(sides) > 1700
    for model, tag in open_clip.list_pretrained():
        cfg = open_clip.transform.PreprocessCfg()
        given = open_clip.transform.merge_preprocess_dict(cfg, open_clip.get_pretrained_cfg(model, tag))
        ours = Preprocessing.from_open_clip(given)
        assert (ours.mean, ours.interpolation) == (given["mean"], given["interpolation"]), (model, tag)


def test_strips_end_in_every_mode(tmp_path):
    Image.new("RGB", (2, 40_000), "red").save(tmp_path / "strip.png")
    for mode in ("center", "squash", "border"):
        image = load_image(tmp_path / "strip.png", Preprocessing(16, crop_mode=mode))
        assert image.shape == (3, 16, 16) and image[0].max() == 1


@pytest.mark.parametrize("wrong", [{"crop_mode": "fit"}, {"fill_color": 256}, {"crop_pct": 2.5}], ids=str)
def test_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Preprocessing(32, **wrong)


def test_a_border_loses_nothing_of_a_strip():
    strip = Image.new("RGB", (3400, 100), "blue")
    strip.paste((255, 0, 0), (0, 0, 816, 100))
    row = image_transform(Preprocessing(224, crop_mode="border"))(strip)[0, 112]
    assert int((row > 0.5).sum()) == pytest.approx(224 * 0.24, abs=2)
