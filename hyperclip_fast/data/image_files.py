"""Image files as the model takes them: upright, on white, the centre square. What comes from outside is checked here.

One function, `open_image`, decodes every picture that somebody else made: bytes and pixels are counted before anything
is decoded, only formats of photographs and drawings are tried (Pillow would hand an EPS file to Ghostscript), and
whatever is wrong is one ValueError that says so.
"""

import functools
import io
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

import timm
from torch import Tensor

from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.utils.extras import require

MAX_PIXELS = 64_000_000  # 256 MB as RGBA, while it is decoded
MAX_BYTES = 128 << 20  # of a file: MAX_PIXELS of a photograph as PNG take about as much
FAR_OUT = 8  # times the greatest value that preprocessing gives: such images were never normalised
MAX_RATIO = 16  # of a picture's sides; a longer one loses its ends, far from the centre square
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LEFTOVERS = ("__MACOSX", ".ipynb_checkpoints")  # folders that programs leave behind, with copies of pictures
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
# What Pillow's readers raise on damaged bytes: found by damaging some 340,000 files.
BROKEN: tuple[type[Exception], ...] = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
BROKEN += (struct.error,)
ADDRESS = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")


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
        inside = sorted(file for file in path.rglob("*") if is_image_name(file.relative_to(path)) and file.is_file())
        if not inside:
            what = "an empty folder" if path.is_dir() else "no such path"
            raise ValueError(f"paths must be image files or folders that hold some, got {path} ({what})")
        files += inside
    return files


def is_image_name(name: PurePath) -> bool:
    """Whether a name in a folder or an archive is a picture's, and not of what macOS or Jupyter leaves beside one."""
    if name.suffix.lower() not in IMAGE_SUFFIXES or name.name.startswith("._"):
        return False
    return not any(part in LEFTOVERS for part in name.parts)


def class_folders(path: str | Path) -> list[Path]:
    """The folders in a folder that are classes, sorted; hidden ones are none, nor what programs leave behind."""
    folders = (folder for folder in Path(path).glob("*") if folder.is_dir())
    return sorted(folder for folder in folders if not folder.name.startswith(".") and folder.name not in LEFTOVERS)


def open_image(source: Any, max_pixels: int | None = None, max_bytes: int | None = None) -> Any:
    """A picture as an RGB Pillow image: upright by its EXIF orientation, on white where it is transparent.

    Of an animation it is the first frame. 16-bit grey is scaled to 8 bits, not clipped.

    Args:
        source: a file's path, its content as bytes, or a Pillow image.
        max_pixels: refuse more; None: MAX_PIXELS.
        max_bytes: refuse a longer file; None: MAX_BYTES.

    Raises:
        ValueError: if it is no image of FORMATS, is cut short or damaged, is larger than allowed, or has values without
            an agreed range (floating point, or integers beyond 16 bits).
    """
    max_pixels, max_bytes = max_pixels or MAX_PIXELS, max_bytes or MAX_BYTES
    image_module, ops = require("PIL.Image", "clip"), require("PIL.ImageOps", "clip")
    if not isinstance(source, (str, Path, bytes, image_module.Image)):
        wanted = "a file's path, its content as bytes, or a Pillow image"
        raise ValueError(f"source must be {wanted}, got {type(source).__module__}.{type(source).__qualname__}")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, image_module.Image):
            return _on_white(ops.exif_transpose(source), image_module, name)
        content = source if isinstance(source, bytes) else _read(source, max_bytes)
        if len(content) > max_bytes:
            raise _Refused(f"of at most {max_bytes} bytes, got {name}")
        with image_module.open(io.BytesIO(content), formats=FORMATS) as image:
            if max(image.width * image.height, _tile_pixels(image)) > max_pixels:
                raise _Refused(f"of at most {max_pixels} pixels, got {name}: {image.width} x {image.height}")
            return _on_white(ops.exif_transpose(image), image_module, name)
    except image_module.DecompressionBombError as error:
        raise ValueError(f"source must be an image of at most {max_pixels} pixels, got {name}") from error
    except _Refused as error:
        raise ValueError(f"source must be an image {error}") from None
    except BROKEN as error:
        reason = ADDRESS.sub("it", str(error))  # Pillow names what we gave it
        raise ValueError(f"source must be a whole image file ({', '.join(FORMATS)}), got {name}: {reason}") from error


def load_image(source: Any, preprocessing: Preprocessing) -> Tensor:
    """A picture as (3, S, S) float32, normalised: what `open_image` gives, through `image_transform`.

    Raises:
        ValueError: as `open_image`.
    """
    return image_transform(preprocessing)(open_image(source))


def check_images(images: object, preprocessing: Preprocessing, fixed_size: bool) -> None:
    """Raise ValueError unless these are images as a model takes them.

    Args:
        images: what came.
        preprocessing: the model's.
        fixed_size: whether it takes images of that size alone.
    """
    side = preprocessing.size
    wanted = f"images must be a floating point tensor (B, 3, {side}, {side}), as `model.preprocess` makes it"
    if not isinstance(images, Tensor):
        raise ValueError(f"{wanted}, got {type(images).__module__}.{type(images).__qualname__}")
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"{wanted}, got {images.dtype} of shape {tuple(images.shape)}")
    if fixed_size and images.shape[2:] != (side, side):
        raise ValueError(f"{wanted}, got shape {tuple(images.shape)}")
    if images.device.type == "cpu" and images.numel():  # elsewhere the host would wait for it
        low, high = preprocessing.low_and_high
        found = max(abs(end.item()) for end in images.aminmax())
        if found > FAR_OUT * max(-low, high):
            raise ValueError(f"{wanted}, with values from {low:.2f} to {high:.2f}, got values up to {found:.4g}")


@functools.cache
def image_transform(preprocessing: Preprocessing) -> Callable[[Any], Tensor]:
    """Pillow image -> (3, S, S): timm's transform for evaluation, of which an exported folder tells timm, too."""
    prepare = timm.data.create_transform(**preprocessing.timm_config())
    if preprocessing.crop_mode == "border":  # timm pads with the mean alone
        prepare.transforms[1] = timm.data.transforms.CenterCropOrPad(preprocessing.size, fill=preprocessing.border)
        return lambda image: prepare(_with_both_sides(image, int(preprocessing.size / preprocessing.crop_pct)))
    if preprocessing.crop_mode == "squash":
        return prepare
    return lambda image: prepare(_without_ends(image))


def _with_both_sides(image, longest: int):
    """A picture whose shorter side is left where the longer one is resized to `longest`: of a strip's nothing was."""
    scale = longest / max(image.size)
    if round(min(image.size) * scale) > 0:
        return image
    return image.resize([max(1, round(side * scale)) for side in image.size])


def _without_ends(image):
    """The middle of a strip: of 2 x 30,000,000 pixels, made S high, would come more than any memory holds."""
    half = MAX_RATIO * min(image.size) // 2
    (x, y), (width, height) = (side // 2 for side in image.size), image.size
    if max(image.size) <= 2 * half:
        return image
    return image.crop((max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)))


class _Refused(Exception):
    """What is wrong with an image that could be decoded."""


def _read(path: str | Path, max_bytes: int) -> bytes:
    """The file's content, no more than a byte beyond what is allowed: the whole of it is never mapped nor trusted."""
    with open(path, "rb") as file:
        return file.read(max_bytes + 1)


def _tile_pixels(image) -> int:
    """Pixels of a TIFF's tile: decoded whole, however small the image around it."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(TILE_WIDTH, 0)) * int(tags.get(TILE_LENGTH, 0))


def _on_white(image, image_module, name: str):
    """A Pillow image of any mode as RGB."""
    if image.mode.startswith("I"):
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise _Refused(f"of at most 16 bits a channel, got {name} with values from {low} to {high}")
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode == "F":
        raise _Refused(f"of whole numbers, got {name} in floating point, whose range nothing tells")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = image_module.new("RGBA", rgba.size, "white")
    return image_module.alpha_composite(white, rgba).convert("RGB")
