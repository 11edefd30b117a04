"""Image files as the model takes them: upright, on white, the centre square."""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hyperclip_fast.data import to_rgb
from hyperclip_fast.extras import require

MAX_PIXELS = 64_000_000
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def find_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Image files: those named, and those in the folders named, at any depth, sorted.

    Raises:
        ValueError: for a path that does not exist, or a folder without images.
    """
    files = []
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if path.is_file():
            files.append(path)
            continue
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not inside:
            what = "an empty folder" if path.is_dir() else "no such path"
            raise ValueError(f"paths must be image files or folders that hold some, got {path} ({what})")
        files += inside
    return files


def load_image(path: str | Path | BinaryIO, size: int) -> Tensor:
    """An image file as (3, S, S) float32 in [-1, 1]: upright, on white, the centre square.

    Raises:
        ValueError: if it is no image, is cut short, or has more than MAX_PIXELS pixels.
    """
    image_module, ops = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    square = ops.fit(open_image(path), (size, size), method=image_module.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return to_rgb(pixels.view(1, size, size, 4).permute(0, 3, 1, 2))[0]


def open_image(file: str | Path | BinaryIO):
    """An image file, by its path or opened, as an upright RGBA image of Pillow.

    Raises:
        ValueError: as `load_image`.
    """
    image_module, ops = require("PIL.Image", "train"), require("PIL.ImageOps", "train")
    try:
        with image_module.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"path must be an image of at most {MAX_PIXELS} pixels, got {file}: {image.size}")
            return _to_rgba(ops.exif_transpose(image))
    except image_module.DecompressionBombError as error:
        raise ValueError(f"path must be an image of at most {MAX_PIXELS} pixels, got {file}") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        raise ValueError(f"path must be a whole image file, got {file}: {error}") from error


def _to_rgba(image):
    """A Pillow image of any mode as RGBA; 16-bit grey is scaled, not clipped."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return image.convert("RGB").convert("RGBA") if image.mode == "CMYK" else image.convert("RGBA")
