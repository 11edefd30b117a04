"""Pictures, their split, mixed batches, augmentation, and the user's own image files."""

import io
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperclip_fast import data
from hyperclip_fast.data import augmentation, image_files, openmoji
from hyperclip_fast.data import pictures as pictures_module
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.utils.seeds import stable_hash

SIZE = 32


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module", params=[pytest.param("all", marks=pytest.mark.slow)])
def pictures(cache_dir, request):
    """Every emoji and digit, which take seconds to draw: each test of them is slow."""
    return data.load_pictures(size=SIZE, cache_dir=cache_dir, progress=False)


@pytest.fixture
def few(monkeypatch):
    """Only 20 emoji, so that rendering costs nothing."""
    files = openmoji._openmoji_files()[:20]
    monkeypatch.setattr(openmoji, "_openmoji_files", lambda: files)


def make_pictures(group_sizes, copies=2):
    """Pictures whose every pixel is the number of the picture (below 256)."""
    names = tuple(f"{group} {i}" for group, size in group_sizes.items() for i in range(size))
    groups = tuple(name.split()[0] for name in names)
    labels = torch.arange(len(names)).repeat(copies)
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 8, 8).contiguous()
    return data.Pictures(images, labels, names, groups, torch.zeros(len(labels), dtype=torch.bool))


def test_pictures_have_clean_unique_names(pictures):
    assert len(pictures.names) > 1800 and len(set(pictures.names)) == len(pictures.names) == len(pictures.groups)
    wrong = [
        name for name in pictures.names if name != " ".join(name.lower().split()) or not name.isascii() or not name
    ]
    assert not wrong
    assert {"red apple", "flag of france", "the digit nine", "one o'clock"} <= set(pictures.names)
    assert not any("skin tone" in name for name in pictures.names)
    assert pictures.images.shape == (len(pictures), 4, SIZE, SIZE) and pictures.images.dtype == torch.uint8
    assert pictures.labels.unique().tolist() == list(range(len(pictures.names)))


@pytest.mark.parametrize(
    "name, group",
    [
        ("dog", "animals"),
        ("pizza", "food"),
        ("grinning face", "faces"),
        ("red heart", "symbols"),
        ("japan", "flags"),
        ("thumbs up", "hands"),
        ("judge", "people"),
        ("cactus", "nature"),
        ("bus", "travel"),
        ("hammer", "objects"),
    ],
)
def test_groups(pictures, name, group):
    name = f"flag of {name}" if group == "flags" else name
    assert pictures.groups[pictures.names.index(name)] == group


def test_pictures_are_whole_centred_and_distinct(pictures):
    emoji = torch.tensor([pictures.groups[label] != "digits" for label in pictures.labels])
    ink = pictures.images[emoji][:, 3] > 64
    for seen, span in ((ink.any(1), "width"), (ink.any(2), "height")):
        first = seen.int().argmax(1)
        last = SIZE - 1 - seen.flip(1).int().argmax(1)
        assert ((first + last - SIZE + 1).abs() <= 2).all(), f"{span} not centred"
        assert seen.any(1).all()
    side = torch.maximum(ink.any(1).sum(1), ink.any(2).sum(1))
    assert (side > 0.8 * SIZE).float().mean() > 0.95  # all but the smallest marks fill the frame
    assert len({image.numpy().tobytes() for image in pictures.images[emoji]}) == int(emoji.sum())


def test_split_is_about_its_share_in_every_group(pictures):
    out = torch.zeros(len(pictures.names), dtype=torch.bool)
    out[pictures.labels[pictures.held_out]] = True
    for group in set(pictures.groups) - {"digits"}:
        share = out[[i for i, other in enumerate(pictures.groups) if other == group]].float().mean()
        assert 0.12 <= share <= 0.18, group
    digits = torch.tensor([pictures.groups[label] == "digits" for label in pictures.labels])
    assert 0.12 <= pictures.held_out[digits].float().mean() <= 0.18


def test_split_keeps_names_and_families_on_one_side(pictures):
    sides = {}
    for label, held_out in zip(pictures.labels.tolist(), pictures.held_out.tolist()):
        if pictures.groups[label] != "digits":
            sides.setdefault(data.family_of(pictures.names[label]), set()).add(held_out)
    assert all(len(side) == 1 for side in sides.values())
    assert {True} in sides.values() and {False} in sides.values()


def test_split_is_the_same_everywhere(pictures):
    assert stable_hash("cat") == 0xD077F244DEF8A70E  # md5 of "cat", first 8 bytes
    out = {pictures.names[label] for label in pictures.labels[pictures.held_out]}
    emoji = [name for name, group in zip(pictures.names, pictures.groups) if group != "digits"]
    assert out & set(emoji) == {name for name in emoji if pictures_module._is_held_out(data.family_of(name), 0.15)}


@pytest.mark.parametrize(
    "names",
    [
        ("man running", "woman running facing right", "person running"),
        ("keycap 1", "keycap hash"),
        ("man", "girl"),
        ("one o'clock", "ten-thirty"),
        ("red apple", "green apple"),
        ("1st place medal", "3rd place medal"),
    ],
)
def test_family(names):
    assert len({data.family_of(name) for name in names}) == 1
    assert data.family_of("dog") != data.family_of("wolf")


def test_larger_share_contains_smaller(few, tmp_path):
    masks = [
        data.load_pictures(size=16, held_out=share, cache_dir=tmp_path, progress=False).held_out
        for share in (0.0, 0.2, 0.5)
    ]
    assert not masks[0].any() and (masks[2] | ~masks[1]).all() and masks[2].sum() > masks[1].sum()


def test_cache_is_used_and_rebuilt_when_damaged(few, tmp_path, monkeypatch):
    load = lambda: data.load_pictures(["openmoji"], 16, cache_dir=tmp_path, progress=False)  # noqa: E731
    first = load()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    rebuilt = load()
    monkeypatch.setattr(openmoji, "_render", None)
    cached = load()
    for other in (rebuilt, cached):
        assert torch.equal(first.images, other.images) and torch.equal(first.labels, other.labels)
        assert first.names == other.names and first.groups == other.groups
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_no_cache_is_no_error(few, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="not cached"):
        assert len(data.load_pictures(["openmoji"], 16, cache_dir=tmp_path / "file", progress=False))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, reference = data.load_pictures(["digits"], size=32), load_digits()
    assert digits.labels.tolist() == reference.target.tolist() and digits.names[3] == "the digit three"
    ink = F.interpolate(digits.images[:, 3:, 2:29, 2:29].double(), size=8, mode="area").flatten(1)
    pair = torch.stack([ink.flatten(), torch.from_numpy(reference.images).flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.97


@pytest.mark.parametrize(
    "kwargs",
    [
        {"sets": ["cifar"]},
        {"sets": []},
        {"sets": "digits"},
        {"sets": ["digits", "digits"]},
        {"size": 4},
        {"held_out": 1.0},
        {"held_out": -0.1},
    ],
)
def test_load_pictures_refuses(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        data.load_pictures(**{"sets": ["digits"], **kwargs})


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn.*pip install '.\[train\]'"):
        data.load_pictures(["digits"])


def test_subset(pictures):
    mask = torch.arange(len(pictures)) % 7 == 0
    part = pictures.subset(mask)
    assert torch.equal(part.images, pictures.images[mask]) and part.names == pictures.names
    with pytest.raises(ValueError, match="mask"):
        pictures.subset(mask[:-1])


@settings(max_examples=30, deadline=None)
@given(
    tasks=st.integers(1, 5), classes=st.integers(1, 24), seed=st.integers(0, 2**40), mixed=st.sampled_from([0, 0.5, 1])
)
def test_batch_shows_the_classes_of_its_tasks(tasks, classes, seed, mixed):
    pictures = make_pictures({"digits": 3, "food": 20, "flags": 8})
    batch = data.TaskSampler(pictures, tasks, classes, seed, mixed).batch(seed % 100)
    assert batch.class_ids.shape == (tasks, classes)
    assert all(len(set(row)) == classes for row in batch.class_ids.tolist())
    assert batch.task_ids.tolist() == [task for task in range(tasks) for _ in range(classes)]
    shown = pictures.labels[batch.images[:, 0, 0, 0].long()]
    assert torch.equal(shown, batch.class_ids.flatten())
    assert batch.can_flip.tolist() == [pictures.groups[i] == "food" for i in shown]
    if mixed == 0:
        for row in batch.class_ids.tolist():
            groups = Counter(pictures.groups[i] for i in row)
            assert any(
                groups[group] == min(classes, size) for group, size in (("digits", 3), ("food", 20), ("flags", 8))
            )


def test_stream_depends_on_seed_and_step_only():
    pictures = make_pictures({"a": 40, "b": 40})
    first, second = data.TaskSampler(pictures, seed=3), data.TaskSampler(pictures, seed=3)
    first.batch(0)
    assert torch.equal(first.batch(7).images, second.batch(7).images)
    assert torch.equal(first.batch(7).class_ids, second.batch(7).class_ids)
    for other in (second.batch(8), data.TaskSampler(pictures, seed=4).batch(7)):
        assert not torch.equal(first.batch(7).class_ids, other.class_ids)


def test_groups_are_drawn_by_the_root_of_their_size():
    pictures = make_pictures({"large": 90, "small": 10}, copies=1)
    batch = data.TaskSampler(pictures, tasks_per_batch=1500, classes_per_task=1, mixed_groups=0).batch(0)
    large = sum(pictures.groups[i] == "large" for i in batch.class_ids.flatten().tolist())
    assert abs(large / 1500 - 0.75) < 0.05  # 4 standard deviations


def test_groups_may_be_drawn_more_often():
    pictures = make_pictures({"large": 90, "small": 10}, copies=1)
    sampler = data.TaskSampler(pictures, 1500, 1, mixed_groups=0, group_weights={"small": 9})
    large = sum(pictures.groups[i] == "large" for i in sampler.batch(0).class_ids.flatten().tolist())
    assert abs(large / 1500 - 0.25) < 0.05  # 4 standard deviations
    with pytest.raises(ValueError, match=r"group_weights must be of some of \['large', 'small'\], got {'huge': 2}"):
        data.TaskSampler(pictures, 1500, 1, group_weights={"huge": 2})


def test_names_without_pictures_are_never_drawn():
    pictures = make_pictures({"a": 30})
    kept = data.TaskSampler(pictures.subset(pictures.labels >= 10), 4, 20).batch(0)
    assert int(kept.class_ids.min()) == 10
    with pytest.raises(ValueError, match="classes_per_task"):
        data.TaskSampler(pictures.subset(pictures.labels >= 10), 4, 21)


@pytest.mark.parametrize("name, value", [("tasks_per_batch", 0), ("classes_per_task", 0), ("mixed_groups", 1.5)])
def test_sampler_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        data.TaskSampler(make_pictures({"a": 30}), **{name: value})


def test_can_flip(pictures):
    flip = dict(zip(pictures.names, pictures.can_flip.tolist()))
    assert flip["dog"] and flip["pizza"]
    assert not any(flip[name] for name in ("the digit two", "flag of ireland", "right arrow", "waxing crescent moon"))
    assert not flip["left-facing fist"]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([0, 128, 255]))
def test_to_rgb_is_pillows_compositing(seed, count, background):
    images = torch.randint(0, 256, (count, 4, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    got = data.to_rgb(images, background)
    rgba = images.double() / 255
    expected = (rgba[:, :3] * rgba[:, 3:] + background / 255 * (1 - rgba[:, 3:])) * 2 - 1
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)
    ground = Image.new("RGBA", (9, 9), (background,) * 3 + (255,))
    ground.alpha_composite(Image.fromarray(images[0].permute(1, 2, 0).numpy(), "RGBA"))
    pillow = torch.from_numpy(np.array(ground.convert("RGB"))).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(got[0].double(), pillow, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (5, 9)], ids=str)
def test_grid_is_affine_grid(size):
    theta = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.affine_grid(theta, (3, 4, *size), align_corners=False)
    torch.testing.assert_close(augmentation._grid(theta, size), expected)


def test_augment_is_the_generators():
    images = torch.randint(0, 256, (6, 4, 16, 16), dtype=torch.uint8)
    one, same, other = (data.augment(images, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.shape == (6, 3, 16, 16) and one.dtype == torch.float32 and one.abs().max() <= 1
    assert not torch.equal(one[0], one[1])


def test_augment_shows_nothing_of_transparent_pixels():
    images = torch.zeros(8, 4, 16, 16, dtype=torch.uint8)
    images[:, 3, 4:12, 4:12] = 255
    coloured = images.clone()
    coloured[:, :3] = torch.where(images[:, 3:] == 0, 200, images[:, :3])
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(data.augment(images, generators[0]), data.augment(coloured, generators[1]))


def test_augment_grounds_are_plain_light_and_varied():
    empty = torch.zeros(64, 4, 8, 8, dtype=torch.uint8)
    grounds = data.augment(empty, torch.Generator().manual_seed(0))
    assert torch.equal(grounds, grounds[:, :, :1, :1].expand_as(grounds))
    assert grounds.mean() > 0.3 and grounds.mean(dim=(1, 2, 3)).std() > 0.1


@pytest.mark.parametrize("flip", [False, True])
def test_augment_mirrors_only_what_it_may(flip):
    images = torch.zeros(200, 4, 32, 32, dtype=torch.uint8)
    images[:, 3, :, :8] = 255  # black on the left
    got = data.augment(images, torch.Generator().manual_seed(2), torch.full((200,), flip))
    on_left = got[..., :16].mean(dim=(1, 2, 3)) < got[..., 16:].mean(dim=(1, 2, 3))
    assert on_left.all() if not flip else 60 < on_left.sum() < 140


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 4, 8, 8)], ids=str)
def test_pixels_refuse(images):
    with pytest.raises(ValueError, match="images"):
        data.to_rgb(images)


def save(image, path, **options):
    image.save(path, **options)
    return path


def test_load_image_fits_and_crops(tmp_path):
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))  # the centre square
    got = image_files.load_image(save(image, tmp_path / "a.png"), Preprocessing(10))
    assert got.shape == (3, 10, 10) and got.dtype == torch.float32
    expected = torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 10, 10)
    torch.testing.assert_close(got[:, :, 1:-1], expected[:, :, 1:-1])


def test_load_image_honours_orientation_and_alpha(tmp_path):
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))  # black above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    got = image_files.load_image(save(image, tmp_path / "a.jpg", exif=exif, quality=95), Preprocessing(16))
    assert got[:, :7].min() > 0.9 and got[:, 9:].max() < -0.9
    clear = save(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), tmp_path / "b.png")
    assert torch.equal(image_files.load_image(clear, Preprocessing(8)), torch.ones(3, 8, 8))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "RGB", "RGBA"])
def test_load_image_reads_any_mode(tmp_path, mode):
    grey = Image.linear_gradient("L").resize((32, 32))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "1":
        image = grey = grey.point(lambda value: 255 * (value > 99)).convert("1")
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("CMYK", "P") else grey.convert(mode)
    got = image_files.load_image(save(image, tmp_path / "a.tif"), Preprocessing(32))
    expected = torch.from_numpy(np.array(grey.convert("L"))).float() / 127.5 - 1
    error = (got.mean(0).mean(1) - expected.mean(1)).abs().max()  # of rows, where the palette's dithering averages out
    assert error < (0.12 if mode == "P" else 0.02)


def test_load_image_refuses(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.png", "text.png", "empty.jpg", "missing.png"):
        with pytest.raises(ValueError, match=f"source must be a whole image file .* got .*{name}"):
            image_files.load_image(tmp_path / name, Preprocessing(8))
    whole = save(Image.new("L", (64, 64)), tmp_path / "whole.png")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 4000)
    with pytest.raises(ValueError, match="at most 4000 pixels"):
        image_files.load_image(whole, Preprocessing(8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit answers first
    with pytest.raises(ValueError, match="at most 4000 pixels"):
        image_files.load_image(whole, Preprocessing(8))


def test_find_images(tmp_path):
    for name in ("b.PNG", "sub/a.jpg", "sub/notes.txt", "single.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [path.name for path in image_files.find_images([tmp_path / "single.dat", tmp_path])]
    assert names == ["single.dat", "b.PNG", "a.jpg"]
    assert image_files.find_images(str(tmp_path / "sub")) == [tmp_path / "sub" / "a.jpg"]
    (tmp_path / "bare").mkdir()
    for path, why in ((tmp_path / "bare", "empty folder"), (tmp_path / "none", "no such path")):
        with pytest.raises(ValueError, match=why):
            image_files.find_images([path])
