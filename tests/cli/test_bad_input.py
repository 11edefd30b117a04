"""What comes from outside, made to do harm: every refusal is one ValueError that says what is wrong."""

import ast
import io
import json
import pickle
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from hyperclip_fast import TaskBank
from hyperclip_fast.cli.arguments import read_tasks
from hyperclip_fast.data.image_files import FORMATS, load_image, open_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.tar_items import find_items, members
from hyperclip_fast.hyperclip import load_model
from hyperclip_fast.text import create_text_tower, minilm_folder
from hyperclip_fast.utils.class_names import MAX_CLASSES, check_task
from hyperclip_fast.utils.files import load_safetensors, save_safetensors
from tests.towers import patch_text_tower, tiny_model
from tests.training.test_training import trainer

ROOT = Path(__file__).resolve().parents[2]

RAMP = Image.linear_gradient("L").resize((40, 30))
WHOLE = {format: RAMP.convert("RGB") for format in FORMATS}


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_that_says(width, height):
    """A PNG of a few hundred bytes whose header promises any number of pixels."""
    chunks = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return chunks


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_opens_from_bytes_and_file(tmp_path, format):
    content = encoded(WHOLE[format], format)
    (tmp_path / "file").write_bytes(content)
    image = open_image(content)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert image.tobytes() == open_image(tmp_path / "file").tobytes() == open_image(str(tmp_path / "file")).tobytes()
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(WHOLE[format], dtype=float)).mean() < 4


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused(format):
    content = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), format)
    for share in (0.02, 0.3, 0.7):
        with pytest.raises(ValueError, match=r"source must be .*image.* got \d+ bytes"):
            open_image(content[: int(share * len(content))])


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=30),
)
def test_damaged_bytes_decode_or_are_refused(format, changes):
    content = bytearray(encoded(WHOLE[format], format))
    for place, value in changes:
        content[place % len(content)] = value
    try:
        image = open_image(bytes(content), max_pixels=10_000)
    except ValueError as error:
        assert str(error).startswith("source must be ")
    else:
        assert image.mode == "RGB" and image.width * image.height <= 10_000


@pytest.mark.parametrize("side", [10_000, 30_000, 2_000_000_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(ValueError, match=r"at most 64000000 pixels|whole image file"):
        open_image(png_that_says(side, side))
    with pytest.raises(ValueError, match=r"at most 1199 pixels, got .*40 x 30"):
        open_image(encoded(RAMP, "PNG"), max_pixels=1199)
    assert open_image(encoded(RAMP, "PNG"), max_pixels=1200).size == (40, 30)


def tiled_tiff(side, tile):
    """A grey TIFF of one deflated tile, which may be far larger than the picture."""
    data = zlib.compress(bytes(min(tile * tile, 1 << 20)))
    values = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(values)) + entries + bytes(4)


def test_a_tiff_of_one_huge_tile_is_refused():
    assert open_image(tiled_tiff(16, 16)).size == (16, 16)
    with pytest.raises(ValueError, match="at most 64000000 pixels"):
        open_image(tiled_tiff(16, 32_768))


def test_a_long_file_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    with pytest.raises(ValueError, match=r"at most 134217728 bytes, got .*long\.png"):
        open_image(tmp_path / "long.png")
    content = encoded(RAMP, "PNG")
    with pytest.raises(ValueError, match=f"at most {len(content) - 1} bytes, got {len(content)} bytes"):
        open_image(content, max_bytes=len(content) - 1)
    assert open_image(content, max_bytes=len(content)).size == (40, 30)


@pytest.mark.parametrize("length", [2, 32, 33, 500, 10_000_000])
def test_a_strip_is_its_middle_and_takes_no_memory(length):
    """Scaled to 8 pixels of height, the longest would have 320 million."""
    for turn in (None, Image.Transpose.ROTATE_90):
        strip = Image.new("RGB", (length, 2), "black")
        strip.paste("white", (length // 2 - 1, 0, length // 2 + 1 + length % 2, 2))
        strip = strip.transpose(turn) if turn is not None else strip
        pixels = load_image(encoded(strip, "PNG"), Preprocessing(8))
        assert pixels.shape == (3, 8, 8) and pixels[:, 2:6, 2:6].min() > 0.9


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        encoded(RAMP, "PPM"),
        encoded(RAMP, "ICO"),
    ],
    ids=["empty", "header", "svg", "eps", "ppm", "ico"],
)
def test_other_formats_are_refused(content):
    with pytest.raises(ValueError, match="source must be a whole image file"):
        open_image(content)


@pytest.mark.parametrize("place", ["", "missing.png", "a\0b.png"])
def test_paths_that_are_no_files(tmp_path, place):
    with pytest.raises(ValueError, match="source must be a whole image file"):
        open_image(f"{tmp_path}/{place}")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_the_same_picture(mode):
    grey = Image.new("L", (8, 8), 255)
    if mode.startswith("I"):
        image = Image.fromarray(np.full((8, 8), 65535, np.uint16 if mode == "I;16" else np.int32))
        assert image.mode == mode
    else:
        image = grey.convert("RGB").convert("P").convert("PA") if mode == "PA" else grey.convert("RGB").convert(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr", "RGBX", "I", "PA") else "PNG"
    if mode == "PA":
        image = image.convert("LA")
    assert open_image(encoded(image, format)).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    "values", [np.float32(0.5), np.int32(70_000), np.int32(-1)], ids=["float", "large", "negative"]
)
def test_values_without_a_range_are_refused(values):
    with pytest.raises(ValueError, match=r"floating point|at most 16 bits"):
        open_image(encoded(Image.fromarray(np.full((8, 8), values)), "TIFF"))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key"])
def test_transparency_is_white(kind):
    if kind == "palette":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 200, 0, 0])
        content = encoded(image, "PNG", transparency=1)
    elif kind == "colour key":
        content = encoded(Image.new("RGB", (8, 8), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    else:
        content = encoded(Image.new("RGBA", (8, 8), (200, 0, 0, 0)).convert(kind), "PNG")
    assert torch.equal(load_image(content, Preprocessing(8)), torch.ones(3, 8, 8))


def test_half_transparent_is_half_white():
    assert open_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_followed(orientation):
    upright = Image.new("RGB", (6, 4), "white")
    upright.putpixel((0, 0), (255, 0, 0))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposition that EXIF's orientation reverses
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(encoded(stored, "PNG", exif=exif)).tobytes() == upright.tobytes()


@pytest.fixture
def bank(monkeypatch):
    patch_text_tower(monkeypatch)
    bank = TaskBank(tiny_model())
    bank.add_many({"pets": ["cat", "dog"], "food": ["pizza", "sushi"]})
    return bank


def test_absurd_labels_are_refused_before_they_are_embedded(bank, monkeypatch):
    def embed(texts):
        raise AssertionError("embedded")

    monkeypatch.setattr(bank.model, "text_features", embed)
    many = [f"name {i}" for i in range(10_001)]
    hundred = {f"task {i}": many[:10_000] for i in range(101)}
    for tasks, match in (
        ({"many": many}, "at most 10000 class names, got 10001"),
        ({"long": ["cat", "x" * 1001]}, "at most 1000 characters, got 1001"),
        (hundred, "at most 1000000 class names together, got 1010000"),
    ):
        with pytest.raises(ValueError, match=match):
            bank.add_many(tasks)
        with pytest.raises(ValueError, match=match):
            bank.model.adapt(list(tasks.values()))
    assert bank.tasks == ("pets", "food")


def test_without_pillow_the_error_names_an_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install '.\[clip\]'"):
        open_image(b"")


def test_the_limit_on_labels_is_not_below_it(bank):
    names = [f"name {i}" for i in range(MAX_CLASSES + 1)]
    check_task(names[:-1])
    with pytest.raises(ValueError, match=f"at most {MAX_CLASSES} class names, got {len(names)}"):
        bank.add("too many", names)


def test_a_task_file_of_nested_lists_is_refused(tmp_path):
    laughs = "a: [[&b0 [x]" + "".join(f", &b{i + 1} [*b{i}, *b{i}]" for i in range(60)) + "]]"  # 2**60 x in words
    for name, text in (("deep", "[" * 100_000), ("laughs", laughs)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="--tasks must"):
            read_tasks(tmp_path / name)


def changed(path, tensors=None, metadata=None):
    """A safetensors file with other tensors or metadata."""
    old, about = load_safetensors(path)
    save_safetensors({**old, **(tensors or {})}, path, {**about, **(metadata or {})})


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        ({"table": torch.ones(2, 3)}, {}),
        ({"table": torch.ones(3, 320)}, {}),
        ({"table": torch.full((2, 320), torch.nan)}, {}),
        ({"table": torch.ones(2, 320, dtype=torch.int64)}, {}),
        ({"class_embeddings": torch.ones(4, 15)}, {}),
        ({}, {"tasks": "[1]"}),
        ({}, {"tasks": "[" * 100_000}),
        ({}, {"tasks": '{"pets": "cat", "food": "pie"}'}),
        ({}, {"tasks": json.dumps({"pets": ["cat", "dog", "parrot"], "food": ["pizza"] * 9})}),
        ({}, {"tasks": "no JSON"}),
    ],
    ids=lambda value: "-".join(f"{key} {str(each)[:20]}" for key, each in value.items()) or "as it was",
)
def test_a_bank_that_was_tampered_with_is_refused(bank, tmp_path, tensors, metadata):
    path = tmp_path / "tasks.safetensors"
    bank.save(path)
    assert load_file(path)["table"].shape == (2, 320)
    changed(path, tensors, metadata)
    with pytest.raises(ValueError, match="path must"):
        TaskBank.load(path, bank.model)


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_run(monkeypatch, tmp_path):
    """A model, a training run and a text tower that hold a pickle: refused, and its code did not run."""
    ran, model, run, tower = (tmp_path / name for name in ("ran", "model", "run", "tower"))
    patch_text_tower(monkeypatch)
    tiny_model().save_pretrained(model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(model)
    trainer(run)
    torch.save({"model": Payload(ran)}, run / "checkpoint.pt")
    with pytest.raises(ValueError, match="out must hold a whole checkpoint"):
        trainer(run)
    tower.mkdir()
    for file in minilm_folder().iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            (tower / file.name).write_bytes(file.read_bytes())
    (tower / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match="weights in safetensors"):
        create_text_tower(f"hf:{tower}")
    assert not ran.exists()


def test_no_module_loads_pickles():
    """Every torch.load says weights_only=True, and nothing else that unpickles is called."""
    loads = 0
    for folder in ("hyperclip_fast", "kernels", "bench", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                assert called not in {"pickle.load", "pickle.loads", "joblib.load", "torch.jit.load"}, path
                if called == "torch.load":
                    loads += 1
                    assert any(each.arg == "weights_only" and each.value.value is True for each in node.keywords), path
    assert loads >= 1


def shard(path, *members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            content = encoded(RAMP, "PNG") if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png", "\\a.png"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path, name):
    path = shard(tmp_path / "0.tar", ("good.png", tarfile.REGTYPE), (name, tarfile.REGTYPE))
    with pytest.raises(ValueError, match="names stay inside"):
        members(path)
    assert [file.name for file in tmp_path.iterdir()] == ["0.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=r"plain files, 'a\.png' in .* is none"):
        members(shard(tmp_path / "0.tar", ("a.png", kind)))


def test_other_archives_are_refused(tmp_path):
    good = shard(tmp_path / "good.tar", ("deep/a.png", tarfile.REGTYPE), ("a.txt", tarfile.REGTYPE))
    (item,) = members(good)
    assert item.name == f"{good}/deep/a.png" and open_image(item.read()).size == (40, 30)
    assert find_items([tmp_path]) == [item]
    (tmp_path / "b.png").write_bytes(encoded(RAMP, "PNG"))
    assert [each.name for each in find_items([tmp_path])] == [item.name, str(tmp_path / "b.png")]
    content = good.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:600])
    (tmp_path / "text.tar").write_text("no archive" * 99)
    (tmp_path / "empty.tar").write_bytes(b"")
    shard(tmp_path / "zip.tar", ("a.png", tarfile.REGTYPE), mode="w:gz")
    shard(tmp_path / "none.tar", ("a.txt", tarfile.REGTYPE))
    (tmp_path / "folder.tar").mkdir()
    for name in ("cut", "text", "empty", "zip", "none", "folder", "missing"):
        with pytest.raises(ValueError, match=f"paths must hold .*{name}.tar"):
            find_items([tmp_path / f"{name}.tar"])
    with pytest.raises(ValueError, match="comes twice"):
        find_items([good, good])


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_archive_is_read_or_refused(tmp_path_factory, changes):
    path = shard(tmp_path_factory.mktemp("shard") / "0.tar", ("a.png", tarfile.REGTYPE), ("b.png", tarfile.REGTYPE))
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place] = value
    path.write_bytes(content)
    try:
        for item in members(path):
            open_image(item.read())
    except ValueError as error:
        assert str(error).startswith(("paths must hold", "source must be"))
