"""Image files with texts: a folder of images for each class, or a CSV or TSV table; and the batches made of them.

Labels: a task is a set of class names, drawn anew each time, with one image of each. Captions: the pairs of an epoch
come in random order, each once, and a task is the group of K that comes next; with G = 1 it is the whole batch. Every
batch is a function of (seed, step), whoever loads it: processes may change from one run to its continuation.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hyperclip_fast.data.batch import Batch, BatchShape, Share, batch_of, draw_sizes, share_of_tasks
from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.data.image_files import class_folders, find_images
from hyperclip_fast.data.loader import load
from hyperclip_fast.utils.seeds import generator_of, hash_seed, seeded
from hyperclip_fast.utils.text_files import table_lines

ATTEMPTS = 100  # images tried for one place of a batch, before a set counts as unreadable


@dataclass(frozen=True)
class ImageSet:
    """M image files, each with a text.

    Args:
        files: where they are.
        texts: class names or captions.
    """

    files: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


def read_folder(path: str | Path, class_names: dict[str, str] | None = None) -> ImageSet:
    """A folder with a folder of images for each class, whose name, with spaces for underscores, is the class's.

    Args:
        path: the folder.
        class_names: class names by folder name, in place of these.

    Raises:
        ValueError: for a folder without such folders, or without images.
    """
    names = class_names or {}
    folders = class_folders(path)
    if not folders:
        raise ValueError(f"path must be a folder with a folder for each class, got {path}")
    pairs = [
        (str(file), names.get(folder.name, folder.name.replace("_", " ")))
        for folder in folders
        for file in find_images(folder)
    ]
    return ImageSet(*zip(*pairs))


def read_table(
    path: str | Path, image_column: str = "filepath", text_column: str = "title", names: dict[str, str] | None = None
) -> ImageSet:
    """A CSV file, or a TSV file where its name ends so, with a header; lines without path or text are left out.

    Args:
        path: the file; images are relative to its folder.
        image_column: name of the column of paths.
        text_column: name of the column of texts.
        names: class names by text, in place of the texts.

    Raises:
        ValueError: for a file without these columns, or without lines.
    """
    path = Path(path)
    lines = [(line[image_column], line[text_column]) for line in table_lines(path, [image_column, text_column], "path")]
    pairs = [(str(path.parent / image), (names or {}).get(text, text)) for image, text in lines if image and text]
    if not pairs:
        raise ValueError(f"path must be a table with lines that have an image and a text, got {path}")
    if len(pairs) < len(lines):
        warnings.warn(f"{path}: {len(lines) - len(pairs)} lines without image or text left out", stacklevel=2)
    return ImageSet(*zip(*pairs))


class ImageSetSource(Dataset):
    """Batches of an ImageSet, made by workers where the configuration has some.

    Args:
        images: the set.
        shape: of the batches.
        data: how to read it.
        reader: see `transforms.create_reader`.
        share: of this process.
        pin: for a copy to a GPU.

    Raises:
        ValueError: for fewer classes than a task takes, fewer captions than a batch does, or captions in tasks of
            varying size.
    """

    def __init__(
        self,
        images: ImageSet,
        shape: BatchShape,
        data: DataConfig,
        reader: Callable[[str], Tensor],
        share: Share,
        pin: bool = False,
    ):
        self.images, self.shape, self.data, self.reader, self.share, self.pin = (
            images,
            shape,
            data,
            reader,
            share,
            pin,
        )
        self.by_class: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(images.texts):
            self.by_class[text].append(i)
        self.labelled = data.tasks == "labels"
        self.names = tuple(self.by_class) if self.labelled else ()
        low, most = shape.class_range
        if not self.labelled and low != most:
            raise ValueError(f"classes_per_task must be one number for captions, got {shape.classes_per_task}")
        what, wanted = (
            ("classes_per_task", most) if self.labelled else ("a batch's pairs", most * shape.tasks_per_batch)
        )
        have = len(self.by_class) if self.labelled else len(images)
        if have < wanted:
            raise ValueError(f"{what} must be at most what {data.path} has, {have} {data.tasks}, got {wanted}")
        self._order = (-1, torch.empty(0, dtype=torch.long))

    def batches(self, start: int, state: Any = None) -> Iterator[Batch]:
        """The batches from step `start` on."""
        return load(self, self.data.workers, self.pin, _count_from(start))

    def __getitem__(self, step: int) -> Batch:
        """This process's part of the batch of a step."""
        sizes = draw_sizes(self.shape, step)
        parts, pairs, broken = share_of_tasks(sizes, self.share), [], 0
        plan = self._labels(step, sizes) if self.labelled else self._captions(step, sum(sizes))
        for start, stop in parts:
            taken = {self.images.texts[i] for i in (plan[start:stop] if len(sizes) > 1 else plan)}
            for place in range(start, stop):
                image, text, failures = self._read(step, place, plan[place], taken)
                taken.add(text)
                pairs.append((image, text))
                broken += failures
        return batch_of(pairs, tuple(stop - start for start, stop in parts), broken)

    def _labels(self, step: int, sizes: list[int]) -> list[int]:
        """An image of each class of each task of a step."""
        generator = generator_of(self.shape.seed, step, "labels")
        chosen = []
        for size in sizes:
            for name in torch.randperm(len(self.names), generator=generator)[:size].tolist():
                files = self.by_class[self.names[name]]
                chosen.append(files[int(torch.randint(len(files), (), generator=generator))])
        return chosen

    def _captions(self, step: int, count: int) -> list[int]:
        """The pairs of a step: the next ones of the epoch."""
        first = step * self.shape.tasks_per_batch * self.shape.class_range[1]
        return [self._pair(first + i) for i in range(count)]

    def _pair(self, position: int) -> int:
        epoch, place = divmod(position, len(self.images))
        if self._order[0] != epoch:
            generator = generator_of(self.shape.seed, epoch, "epoch")
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        return int(self._order[1][place])

    def _read(self, step: int, place: int, wanted: int, taken: set[str]) -> tuple[Tensor, str, int]:
        """The image and text for a place of a batch, and how many broken files came before one that could be read."""
        first = wanted
        for attempt in range(ATTEMPTS):
            seed = hash_seed(self.shape.seed, step, place, attempt)
            with seeded(seed):
                try:
                    return self.reader(self.images.files[wanted]), self.images.texts[wanted], attempt
                except (ValueError, OSError) as error:
                    warnings.warn(f"skipped: {error}", stacklevel=2)
            wanted = self._another(seed, first, attempt, taken)
        raise ValueError(f"path must hold images that can be read, {ATTEMPTS} of {self.data.path} could not")

    def _another(self, seed: int, first: int, attempt: int, taken: set[str]) -> int:
        """An image in a broken one's place: of its class, if that has another, else of a class new to the task."""
        generator = torch.Generator().manual_seed(seed)
        if not self.labelled:
            return int(torch.randint(len(self.images), (), generator=generator))
        files = self.by_class[self.images.texts[first]]
        others = [name for name in self.names if name not in taken] if attempt >= min(len(files), 8) - 1 else []
        if others:
            files = self.by_class[others[int(torch.randint(len(others), (), generator=generator))]]
        return files[int(torch.randint(len(files), (), generator=generator))]


def _count_from(start: int) -> Iterator[int]:
    while True:
        yield start
        start += 1
