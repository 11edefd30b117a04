"""`hyperclip train --smoke`: any recipe in seconds.

Model, batch and steps shrink, texts get a tiny tower where theirs is large, and data that lies elsewhere is made up;
loop, loss, precision, schedule and parallelism stay the recipe's.
"""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from hyperclip_fast.data.batch import Share
from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.training.config import RunConfig
from hyperclip_fast.utils.extras import require

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "brown", "grey")
SHARDS = 8
PAIRS = 16  # of each colour


def smoke(run: RunConfig, folder: str | Path, steps: int, share: Share) -> RunConfig:
    """A rehearsal of a recipe.

    Args:
        run: the recipe.
        folder: of the run; made-up data is written into its folder data/.
        steps: of the rehearsal.
        share: of this process; the first one writes, and all are given a part of the batch.
    """
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 32}
    if "vit_" in run.model.image_tower:
        sizes |= {"patch_size": 8, "width": 64, "depth": 2, "num_heads": 2}
    hyper: dict[str, Any] = {"hyper_width": 32, "hyper_depth": 1, "hyper_heads": 2, "hyper_bottleneck": 16}
    model = replace(run.model, **sizes, **hyper)
    if model.text_tower != "minilm":
        model = replace(model, text_tower="transformer:width=32,depth=1,heads=2,dim=32", text_dim=None)
    tasks = 1 if run.train.tasks_per_batch == 1 else 2 * share.world
    classes = 8 if isinstance(run.train.classes_per_task, int) else (4, 8)
    if tasks == 1:
        classes = 8 * share.world
    train = replace(run.train, init="", steps=steps, warmup=1, tasks_per_batch=tasks, classes_per_task=classes)
    train = replace(train, accumulate=min(train.accumulate, 2), log_every=1, eval_every=0, save_every=2)
    if train.precision == "float16":
        train = replace(train, precision="bfloat16")  # what every CPU can
    data = replace(run.data, shuffle=16, workers=min(run.data.workers, 1))
    return RunConfig(model, train, _made_up(data, Path(folder) / "data", share))


def _made_up(data: DataConfig, folder: Path, share: Share) -> DataConfig:
    """Colours in place of the recipe's data; digits in place of all pictures, which take time to draw."""
    if data.kind == "pictures":
        return replace(data, sets=("digits",))
    write = {"folder": _write_folder, "table": _write_table, "shards": _write_shards}[data.kind]
    path = {"folder": folder, "table": folder / "table.csv", "shards": folder / f"{{0..{SHARDS - 1}}}.tar"}[data.kind]
    if share.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, data)
    return replace(data, path=str(path), class_names="")


def _pictures() -> list[tuple[str, bytes]]:
    """Names of colours with JPEG files of them."""
    made = []
    for i in range(PAIRS):
        for name in COLOURS:
            file = io.BytesIO()
            require("PIL.Image", "train").new("RGB", (40, 32 + i), name).save(file, "JPEG")
            made.append((name, file.getvalue()))
    return made


def _write_folder(folder: Path, data: DataConfig) -> None:
    for i, (name, content) in enumerate(_pictures()):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{i}.jpg").write_bytes(content)


def _write_table(folder: Path, data: DataConfig) -> None:
    lines = [f"{data.image_column},{data.text_column}"]
    for i, (name, content) in enumerate(_pictures()):
        (folder / f"{i}.jpg").write_bytes(content)
        lines.append(f"{i}.jpg,{_text(name, i, data)}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_shards(folder: Path, data: DataConfig) -> None:
    pictures = _pictures()
    suffix, _, field = data.text_key.partition(":")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as file:
            for i in range(shard, len(pictures), SHARDS):
                name, content = pictures[i]
                text = f"{name} picture {i}"
                text = f'{{"{field}": "{text}"}}' if field else text
                for key, value in ((data.image_key[0], content), (suffix, text.encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{key}")
                    info.size = len(value)
                    file.addfile(info, io.BytesIO(value))


def _text(name: str, i: int, data: DataConfig) -> str:
    return name if data.tasks == "labels" else f"{name} picture {i}"
