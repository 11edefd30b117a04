"""From an image file to what a model in training sees: timm's or open_clip's transforms."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.data.image_files import load_image, open_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.utils.extras import require


def create_reader(config: DataConfig, preprocessing: Preprocessing) -> Callable[[str | Path | bytes], Tensor]:
    """A function from an image file, or its bytes, to (3, S, S) float32, normalised.

    Chance is torch's and Python's own. The function raises a ValueError for what is no whole image.

    Args:
        config: which transform, and how strong.
        preprocessing: of the model.
    """
    if config.transform == "plain":
        return partial(_read_plain, preprocessing)
    return partial(_read, (_timm if config.transform == "timm" else _open_clip)(config, preprocessing))


def _read_plain(preprocessing: Preprocessing, file: str | Path | bytes) -> Tensor:
    return load_image(file, preprocessing)


def _read(transform: Callable[[Any], Tensor], file: str | Path | bytes) -> Tensor:
    return transform(open_image(file))


def _timm(config: DataConfig, preprocessing: Preprocessing):
    return require("timm.data", "train").create_transform(
        preprocessing.size,
        is_training=True,
        scale=(config.crop, 1.0),
        hflip=config.flip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment or None,
        interpolation="bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


def _open_clip(config: DataConfig, preprocessing: Preprocessing):
    augmentation = {"scale": (config.crop, 1.0)}
    return require("open_clip", "clip").image_transform(
        preprocessing.size, is_train=True, mean=preprocessing.mean, std=preprocessing.std, aug_cfg=augmentation
    )
