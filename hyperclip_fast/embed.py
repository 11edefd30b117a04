"""Pictures in bulk to embeddings, for many tasks in one pass, on one machine or on a Ray cluster.

The pictures are cut into parts by their order alone, and a part is embedded in batches that never reach into another
one. So a part's bytes do not depend on what ran before: a run that was killed goes on with the parts that are missing,
here or on a cluster, and leaves what an undisturbed run leaves.
"""

import csv
import hashlib
import json
import warnings
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.tar_items import Item, find_items
from hyperclip_fast.embed_formats import FORMATS, Part
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.task_bank import Task, TaskBank, fingerprint
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import write_beside


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
                waiting.append((item, pool.submit(_decode, item, self.bank.model.image_size)))
                if len(waiting) > self.config.batch_size:
                    first, image = waiting.popleft()
                    yield first, image.result()
            yield from ((item, image.result()) for item, image in waiting)


def _decode(item: Item, size: int) -> Tensor | str:
    """The picture, or what is wrong with it; a disk that fails stops the run, and no picture is blamed for it."""
    content = item.read()
    try:
        return load_image(content, size)
    except ValueError as error:
        return str(error)


def part_path(out: Path, number: int, config: EmbedConfig) -> Path:
    """The file that shows that a part is whole."""
    return out / f"part-{number:06}{FORMATS[config.format].suffix}"


def embed(
    paths: Iterable[str | Path],
    tasks: Mapping[str, Sequence[str]] | TaskBank,
    out: str | Path,
    config: EmbedConfig | None = None,
    model: str | None = None,
    manifest: str | Path | None = None,
    ray_workers: int = 0,
    threads: int = 2,
    progress: bool = False,
) -> dict:
    """Embed every picture for its tasks into the folder `out`; a run that was stopped goes on.

    Args:
        paths: image files, folders, webdataset shards; see `find_items`.
        tasks: class names by task, or a bank of this model.
        out: the folder: parts, tasks.safetensors, run.json, and in the end index.json, which names what was broken.
        config: see EmbedConfig.
        model: folder or hub id; None: the demo model.
        manifest: a CSV file with the columns image and task; None: every picture in every task.
        ray_workers: actors on the Ray cluster that this process is connected to, or on a local one; 0: no Ray. They
            read `paths` and `model` and write `out`, so these must lie where every node sees them.
        threads: that decode, in each process.
        progress: show a bar.

    Returns:
        index.json's content.

    Raises:
        ValueError: for bad input, or a folder that holds another run.
    """
    if ray_workers < 0 or threads < 1:
        raise ValueError(f"ray_workers must not be negative and threads at least 1, got {ray_workers} and {threads}")
    config, out = config or EmbedConfig(), Path(out)
    items = find_items(paths)
    clip = tasks.model if isinstance(tasks, TaskBank) else load_model(model, config.device)
    names = _class_names(tasks)
    table = None if manifest is None else read_manifest(manifest, items, names)
    _open_run(out, clip, names, items, table, config)
    bank = _bank(tasks, clip, out / "tasks.safetensors")
    parts = -(-len(items) // config.part_size)
    missing = [number for number in range(parts) if not part_path(out, number, config).exists()]
    if ray_workers:
        done = _on_ray((model, items, table, config, out, threads), missing, ray_workers)
    else:
        done = map(Embedder(bank, items, table, config, out, threads).write, missing)
    for _ in require("tqdm", "embed").tqdm(done, "embed", len(missing), unit="part") if progress else done:
        pass
    return _close_run(out, parts, items, bank, config)


def _class_names(tasks: Mapping[str, Sequence[str]] | TaskBank) -> dict[str, list[str]]:
    if isinstance(tasks, TaskBank):
        return {task: list(tasks.classes(task)) for task in tasks.tasks}
    return {task: list(names) for task, names in tasks.items()}


def _bank(tasks: Mapping[str, Sequence[str]] | TaskBank, clip: HyperCLIP, path: Path) -> TaskBank:
    """The run's tasks, made at its first start only: made again, with other threads, rows may differ in a bit."""
    if path.exists():
        bank = TaskBank.load(path, clip)
        if isinstance(tasks, TaskBank) and not all(_same(tasks.task(name), bank.task(name)) for name in tasks.tasks):
            raise ValueError(f"tasks must be the bank that the run began with, {path} holds other rows or embeddings")
        return bank
    bank = tasks
    if not isinstance(tasks, TaskBank):
        bank = TaskBank(clip)
        bank.add_many(tasks)
    bank.save(path)
    return bank


def _same(one: Task, other: Task) -> bool:
    """Whether two tasks of the same class names are the same."""
    return torch.equal(one.row, other.row) and torch.equal(one.embeddings, other.embeddings)


def read_manifest(path: str | Path, items: Sequence[Item], tasks: Container[str]) -> dict[str, str]:
    """The task of each picture, from a CSV file with the columns image and task.

    Raises:
        ValueError: for a file without these columns, a picture that it lacks, or an unknown task.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"image", "task"} <= set(reader.fieldnames or ()):
            raise ValueError(f"manifest must have the columns image and task, {path} has {reader.fieldnames}")
        table = {row["image"]: row["task"] for row in reader}
    for item in items:
        if table.get(item.name) not in tasks:
            raise ValueError(f"manifest must give {item.name} one of the tasks, {path} gives {table.get(item.name)!r}")
    return table


def _open_run(
    out: Path,
    clip: HyperCLIP,
    tasks: Mapping[str, Sequence[str]],
    items: Sequence[Item],
    table: Mapping[str, str] | None,
    config: EmbedConfig,
) -> None:
    """Make the folder, or find in it the same run; what a killed run left half-written goes."""
    inputs = [(item.name, item.offset, item.size, Path(item.path).stat().st_mtime_ns) for item in items]
    run = {
        "inputs": hashlib.sha256(json.dumps([inputs, table]).encode()).hexdigest(),
        "model": fingerprint(clip),
        "tasks": tasks,
        **vars(config),
    }
    content, path = json.dumps(run, indent=2, ensure_ascii=False).encode() + b"\n", out / "run.json"
    if path.exists() and path.read_bytes() != content:
        raise ValueError(f"out must be a new folder, or hold a run of the same pictures, tasks and options, got {out}")
    if (
        out.exists()
        and not path.exists()
        and (not out.is_dir() or any(file.suffix != ".tmp" for file in out.iterdir()))
    ):
        raise ValueError(f"out must be a new or an empty folder, or hold a run, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".*.tmp"):
        left.unlink()
    write_beside(content, path)


def _close_run(out: Path, parts: int, items: Sequence[Item], bank: TaskBank, config: EmbedConfig) -> dict:
    broken: dict[str, str] = {}
    for number in range(parts):
        broken |= FORMATS[config.format].broken(part_path(out, number, config))
    index = {
        "images": len(items),
        "tasks": list(bank.tasks),
        "dim": bank.model.config.embed_dim,
        "parts": parts,
        "broken": broken,
    }
    write_beside(json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n", out / "index.json")
    return index


class _RayWorker:
    """An Embedder in an actor: rows {"part": number} in, {"part", "broken"} out."""

    def __init__(self, model, items, manifest, config, out, threads):
        bank = TaskBank.load(out / "tasks.safetensors", load_model(model, config.device))
        self.embedder = Embedder(bank, items, manifest, config, out, threads)

    def __call__(self, row: dict) -> dict:
        return {"part": row["part"], "broken": self.embedder.write(int(row["part"]))}


def _on_ray(work: tuple, missing: Sequence[int], workers: int) -> Iterable[dict]:
    """The missing parts as a Ray dataset, mapped by a pool of actors."""
    data = require("ray.data", "ray")
    if not missing:
        return ()
    parts = data.from_items([{"part": number} for number in missing], override_num_blocks=len(missing))
    pool = data.ActorPoolStrategy(size=min(workers, len(missing)))
    gpus = 1 if work[3].device.startswith("cuda") else 0
    return parts.map(_RayWorker, fn_constructor_args=work, compute=pool, num_gpus=gpus).iter_rows()
