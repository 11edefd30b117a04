"""From an image file to what a model in training sees: timm's or open_clip's transforms, to [-1, 1]."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.data.image_files import load_image, open_image
from hyperclip_fast.utils.extras import require

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation that bring [0, 1] to [-1, 1]


def create_reader(config: DataConfig, size: int) -> Callable[[str | Path | bytes], Tensor]:
    """A function from an image file, or its bytes, to (3, S, S) float32 in [-1, 1]; chance is torch's and Python's own.

    The function raises a ValueError for what is no whole image.

    Args:
        config: which transform, and how strong.
        size: S.
    """
    if config.transform == "plain":
        return partial(_read_plain, size)
    return partial(_read, _timm(config, size) if config.transform == "timm" else _open_clip(config, size))


def _read_plain(size: int, file: str | Path | bytes) -> Tensor:
    return load_image(file, size)


def _read(transform: Callable[[Any], Tensor], file: str | Path | bytes) -> Tensor:
    return transform(open_image(file))


def _timm(config: DataConfig, size: int):
    return require("timm.data", "train").create_transform(
        size,
        is_training=True,
        scale=(config.crop, 1.0),
        hflip=config.flip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment or None,
        interpolation="bicubic",
        mean=HALF,
        std=HALF,
    )


def _open_clip(config: DataConfig, size: int):
    augmentation = {"scale": (config.crop, 1.0)}
    open_clip = require("open_clip", "clip")
    return open_clip.image_transform(size, is_train=True, mean=HALF, std=HALF, aug_cfg=augmentation)
