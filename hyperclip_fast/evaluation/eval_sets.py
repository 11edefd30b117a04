"""Labelled images to evaluate on: folders of classes, webdataset shards, and the built-in sets.

a folder        one folder a class; its name, with spaces for underscores, is the class name
tar shards      <key>.jpg or .png, <key>.cls (index or name), beside classnames.txt (CLIP_benchmark's layout)
openmoji        held-out names, in tasks of one group
digits          held-out handwritten digits
skin-tones      OpenMoji's hands in five skin tones, which are the groups
scenes          held-out objects' scenes under six attributes
photos          eighteen photographs that come with scikit-image, scikit-learn and matplotlib, in four tasks
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from hyperclip_fast.data.augmentation import to_rgba
from hyperclip_fast.data.file_source import read_folder
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.openmoji import load_skin_tones
from hyperclip_fast.data.photos import photo_tasks
from hyperclip_fast.data.pictures import load_pictures
from hyperclip_fast.data.preprocessing import HALF, Preprocessing
from hyperclip_fast.data.scenes import VALUES, scene_tasks
from hyperclip_fast.utils.extras import require

BUILT_IN = ("openmoji", "digits", "skin-tones", "scenes", "photos")


@dataclass(frozen=True)
class EvalSet:
    """Tasks of one data set.

    Args:
        name: of the data set.
        tasks: its tasks; accuracies are averaged over them.
        groups: by task: the group of each image, for worst-group accuracy; None: there are no groups.
    """

    name: str
    tasks: list[EvalTask]
    groups: list[tuple[str, ...]] | None = None


def load_eval_set(source: str, preprocessing: Preprocessing, classes: int = 10) -> EvalSet:
    """A data set by its name or place.

    Args:
        source: one of BUILT_IN, a folder of class folders, a folder with tar shards, or one tar file.
        preprocessing: the model's; its mean and std come later, since tasks hold pixels.
        classes: class names of a task, for openmoji.

    Raises:
        ValueError: for something else, or classes without images.
    """
    preprocessing = replace(preprocessing, mean=HALF, std=HALF)
    size = preprocessing.size
    if source == "openmoji":
        return EvalSet(source, held_out_tasks(load_pictures(("openmoji",)), classes))
    if source == "digits":
        return EvalSet(source, held_out_tasks(load_pictures(("digits",))))
    if source == "scenes":
        return EvalSet(source, _one_a_question(scene_tasks(load_pictures(("openmoji",), size=32), size=size)))
    if source == "photos":
        return EvalSet(source, photo_tasks(preprocessing))
    if source == "skin-tones":
        images, labels, names, tones = load_skin_tones(size)
        return EvalSet(source, [EvalTask(source, names, images, labels)], [tones])
    path = Path(source)
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return EvalSet(path.stem, [_read_shards(path, preprocessing)])
    if path.is_dir():
        return EvalSet(path.name, [_read_folder(path, preprocessing)])
    raise ValueError(f"data must be a folder, a tar file or one of {', '.join(BUILT_IN)}, got {source}")


def _one_a_question(tasks: list[EvalTask]) -> list[EvalTask]:
    """Scenes' tasks with all objects in one, so that every attribute counts the same."""
    objects, others = tasks[: -len(VALUES)], tasks[-len(VALUES) :]
    starts = [sum(len(task.class_names) for task in objects[:i]) for i in range(len(objects))]
    names = tuple(name for task in objects for name in task.class_names)
    labels = torch.cat([task.labels + start for task, start in zip(objects, starts)])
    return [EvalTask("object", names, torch.cat([task.images for task in objects]), labels), *others]


def _read_folder(path: Path, preprocessing: Preprocessing) -> EvalTask:
    found = read_folder(path)
    names = tuple(sorted(set(found.texts)))
    files = tqdm(found.files, desc="images", unit="image", disable=None)
    images = torch.stack([to_rgba(load_image(file, preprocessing)) for file in files])
    return EvalTask(path.name, names, images, torch.tensor([names.index(text) for text in found.texts]))


def _read_shards(path: Path, preprocessing: Preprocessing) -> EvalTask:
    folder = path if path.is_dir() else path.parent
    known = folder / "classnames.txt"
    names = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    images, texts = [], []
    for image, text in _samples(path):
        images.append(to_rgba(load_image(image, preprocessing)))
        texts.append(text)
    if not images:
        raise ValueError(f"data must be shards with samples of an image and a .cls, {path} has none")
    if names:
        labels = [int(text) if text.isdecimal() else names.index(text) for text in texts]
        if max(labels) >= len(names):
            raise ValueError(f"classnames.txt must name {max(labels) + 1} classes, {known} names {len(names)}")
    else:
        names = sorted(set(texts))
        labels = [names.index(text) for text in texts]
    return EvalTask(path.stem, tuple(names), torch.stack(images), torch.tensor(labels))


def _samples(path: Path) -> Iterator[tuple[bytes, str]]:
    """Image file and class of each sample of one shard or a folder of them."""
    webdataset = require("webdataset", "train")
    shards = sorted(map(str, path.glob("*.tar"))) if path.is_dir() else [str(path)]
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        kinds = [kind for kind in ("jpg", "jpeg", "png", "webp") if kind in sample]
        if kinds and "cls" in sample:
            yield sample[kinds[0]], sample["cls"].decode().strip()
