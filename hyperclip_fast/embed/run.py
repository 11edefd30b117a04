"""Pictures in bulk to embeddings, for many tasks in one pass, on one machine or on a Ray cluster.

The pictures are cut into parts by their order alone, and a part is embedded in batches that never reach into another
one. So a part's bytes do not depend on what ran before: a run that was killed goes on with the parts that are missing,
here or on a cluster, and leaves what an undisturbed run leaves.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hyperclip_fast.data.tar_items import Item, find_items
from hyperclip_fast.embed.embedder import EmbedConfig, Embedder, part_path
from hyperclip_fast.embed.formats import FORMATS
from hyperclip_fast.embed.on_ray import run_on_ray
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.task_bank import TaskBank, fingerprint
from hyperclip_fast.tasks import AdaptedTask
from hyperclip_fast.utils.class_names import check_named_tasks
from hyperclip_fast.utils.files import UNFINISHED, remove_unfinished, write_file
from hyperclip_fast.utils.text_files import table_lines


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
        ValueError: for bad input, such as a task that `check_task` refuses, or a folder that holds another run.
    """
    if ray_workers < 0 or threads < 1:
        raise ValueError(f"ray_workers must not be negative and threads at least 1, got {ray_workers} and {threads}")
    config, out = config or EmbedConfig(), Path(out)
    items = find_items(paths)
    clip = tasks.model if isinstance(tasks, TaskBank) else load_model(model, config.device)
    names = _class_names(tasks)
    if not names:
        raise ValueError("tasks must hold at least one task, got none")
    table = None if manifest is None else read_manifest(manifest, items, names)
    _open_run(out, clip, names, items, table, config)
    bank = _bank(tasks, clip, out / "tasks.safetensors")
    parts = -(-len(items) // config.part_size)
    missing = [number for number in range(parts) if not part_path(out, number, config).exists()]
    if ray_workers:
        done: Iterable[Any] = run_on_ray((model, items, table, config, out, threads), missing, ray_workers)
    else:
        done = map(Embedder(bank, items, table, config, out, threads).write, missing)
    for _ in tqdm(done, "embed", len(missing), unit="part", disable=None if progress else True):
        pass
    return _close_run(out, parts, items, bank, config)


def _class_names(tasks: Mapping[str, Sequence[str]] | TaskBank) -> dict[str, list[str]]:
    if isinstance(tasks, TaskBank):
        return {task: list(tasks.classes(task)) for task in tasks}
    check_named_tasks(tasks)
    return {task: list(names) for task, names in tasks.items()}


def _bank(tasks: Mapping[str, Sequence[str]] | TaskBank, clip: HyperCLIP, path: Path) -> TaskBank:
    """The run's tasks, made at its first start only: made again, with other threads, rows may differ in a bit."""
    if path.exists():
        bank = TaskBank.load(path, clip)
        if isinstance(tasks, TaskBank) and not all(_same(tasks[name], bank[name]) for name in tasks):
            raise ValueError(f"tasks must be the bank that the run began with, {path} holds other rows or embeddings")
        return bank
    if isinstance(tasks, TaskBank):
        bank = tasks
    else:
        bank = TaskBank(clip)
        bank.add_many(tasks)
    bank.save(path)
    return bank


def _same(one: AdaptedTask, other: AdaptedTask) -> bool:
    """Whether two tasks of the same class names are the same."""
    return torch.equal(one.row, other.row) and torch.equal(one.embeddings, other.embeddings)


def read_manifest(path: str | Path, items: Sequence[Item], tasks: Container[str]) -> dict[str, str]:
    """The task of each picture, from a CSV file with the columns image and task.

    Raises:
        ValueError: for a file without these columns, a picture that it lacks, or an unknown task.
    """
    table = {line["image"]: line["task"] for line in table_lines(path, ["image", "task"], "manifest")}
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
        and (not out.is_dir() or any(not file.name.startswith(UNFINISHED) for file in out.iterdir()))
    ):
        raise ValueError(f"out must be a new or an empty folder, or hold a run, got {out}")
    out.mkdir(parents=True, exist_ok=True)
    remove_unfinished(out)
    write_file(path, content)


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
    write_file(out / "index.json", json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n")
    return index
