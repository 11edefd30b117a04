"""One process's part of an embedding run: decodes, classifies, writes parts."""

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.tar_items import Item
from hyperclip_fast.embed.formats import FORMATS, Part
from hyperclip_fast.task_bank import TaskBank


@dataclass(frozen=True)
class EmbedConfig:
    """How pictures are embedded; a run goes on only with the same.

    Args:
        format: "safetensors", "npy" or "parquet".
        part_size: pictures in a part.
        batch_size: rows in a forward pass; a row is a picture in a task.
        device: where the model runs.
    """

    format: str = "safetensors"
    part_size: int = 1024
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.part_size < 1 or self.batch_size < 1:
            raise ValueError(f"part_size and batch_size must be at least 1, got {self.part_size} and {self.batch_size}")


class Embedder:
    """Parts to files. A process has one, or each worker of a cluster.

    Args:
        bank: the tasks, and the model.
        items: every picture.
        manifest: the task of each picture by its name; None: every picture in every task.
        config: see EmbedConfig.
        out: the run's folder.
        threads: that decode.
    """

    def __init__(
        self,
        bank: TaskBank,
        items: Sequence[Item],
        manifest: Mapping[str, str] | None,
        config: EmbedConfig,
        out: Path,
        threads: int,
    ):
        self.bank, self.items, self.manifest, self.config = bank, items, manifest, config
        self.out, self.threads = out, threads

    def write(self, number: int) -> int:
        """Embed one part and write it; the number of broken pictures."""
        size = self.config.part_size
        part = self.embed(self.items[number * size : (number + 1) * size])
        FORMATS[self.config.format].write(part, part_path(self.out, number, self.config))
        return len(part.broken)

    @torch.inference_mode()
    def embed(self, items: Sequence[Item]) -> Part:
        """The embeddings of some pictures; those that cannot be read are left out, with a warning."""
        rows: list[tuple[str, str]] = []
        broken: dict[str, str] = {}
        embeddings = [torch.empty(0, self.bank.model.config.embed_dim)]
        pairs = self._pairs(items, broken)
        while batch := list(islice(pairs, self.config.batch_size)):
            names, tasks, images = zip(*batch)
            ids = self.bank.task_ids(tasks)
            pixels = torch.stack(images).to(self.bank.model.device)
            embeddings.append(self.bank.model.encode_image(pixels, self.bank.params[ids]).float().cpu())
            rows += zip(names, tasks)
        return Part(torch.cat(embeddings), tuple(name for name, _ in rows), tuple(task for _, task in rows), broken)

    def _pairs(self, items: Sequence[Item], broken: dict[str, str]) -> Iterator[tuple[str, str, Tensor]]:
        """Each picture in each of its tasks."""
        for item, image in self._decoded(items):
            if isinstance(image, str):
                broken[item.name] = image
                warnings.warn(f"skipped {item.name}: {image}", stacklevel=2)
                continue
            for task in self.bank.tasks if self.manifest is None else (self.manifest[item.name],):
                yield item.name, task, image

    def _decoded(self, items: Sequence[Item]) -> Iterator[tuple[Item, Tensor | str]]:
        """Pictures in their order; those of the next batch are decoded while this one is embedded."""
        waiting: deque[tuple[Item, Future]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for item in items:
                waiting.append((item, pool.submit(_decode, item, self.bank.model.preprocessing)))
                if len(waiting) > self.config.batch_size:
                    first, image = waiting.popleft()
                    yield first, image.result()
            yield from ((item, image.result()) for item, image in waiting)


def _decode(item: Item, preprocessing: Preprocessing) -> Tensor | str:
    """The picture, or what is wrong with it; a disk that fails stops the run, and no picture is blamed for it."""
    content = item.read()
    try:
        return load_image(content, preprocessing)
    except ValueError as error:
        return str(error)


def part_path(out: Path, number: int, config: EmbedConfig) -> Path:
    """The file that shows that a part is whole."""
    return out / f"part-{number:06}{FORMATS[config.format].suffix}"
