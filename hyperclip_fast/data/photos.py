"""Eighteen photographs that come with scikit-image, scikit-learn and matplotlib, as tasks. For evaluation only.

Each package's licence lets anyone use them; none is part of this one.
"""

from pathlib import Path

import torch

from hyperclip_fast.data.augmentation import to_rgba
from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.utils.extras import package_folder

PACKAGES = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}
# By task: files with what they show, and further class names.
TASKS = {
    "animals and people": (
        {
            "skimage/chelsea.png": "cat",
            "skimage/horse.png": "horse",
            "skimage/astronaut.png": "astronaut",
            "matplotlib/grace_hopper.jpg": "naval officer",
            "skimage/camera.png": "photographer with a camera",
        },
        ("dog", "parrot", "elephant"),
    ),
    "things": (
        {
            "skimage/coffee.png": "cup of coffee",
            "skimage/motorcycle_left.png": "motorcycle",
            "skimage/rocket.jpg": "rocket",
            "skimage/clock_motion.png": "clock",
            "skimage/coins.png": "coins",
        },
        ("bicycle", "glass of wine", "bunch of keys"),
    ),
    "places and the sky": (
        {
            "sklearn/china.jpg": "pagoda",
            "skimage/moon.png": "moon",
            "skimage/hubble_deep_field.jpg": "galaxies",
        },
        ("beach", "mountain", "bridge", "lighthouse", "sunset"),
    ),
    "close up": (
        {
            "sklearn/flower.jpg": "flower",
            "skimage/grass.png": "grass",
            "skimage/gravel.png": "gravel",
            "skimage/brick.png": "bricks",
            "skimage/retina.jpg": "retina of an eye",
        },
        ("fur", "water", "sand"),
    ),
}


def photo_tasks(preprocessing: Preprocessing) -> list[EvalTask]:
    """The photographs in four tasks of eight class names.

    Args:
        preprocessing: the model's; its mean and std are those of [-1, 1].

    Raises:
        ImportError: where one of the packages is missing.
    """
    folders = {package: package_folder(package, "demo") / inside for package, inside in PACKAGES.items()}
    return [_task(name, files, others, folders, preprocessing) for name, (files, others) in TASKS.items()]


def _task(
    name: str,
    files: dict[str, str],
    others: tuple[str, ...],
    folders: dict[str, Path],
    preprocessing: Preprocessing,
) -> EvalTask:
    places = (file.partition("/") for file in files)
    images = [load_image(folders[package] / rest, preprocessing) for package, _, rest in places]
    return EvalTask(name, (*files.values(), *others), to_rgba(torch.stack(images)), torch.arange(len(images)))
