"""Held-out pictures as webdatasets in clip_benchmark's layout, one folder a task: data without a download.

    python examples/webdataset.py --out data                # all 33 tasks: OpenMoji by group, scikit-learn's digits
    python examples/webdataset.py --out data --tasks digits --shards 2

A folder holds classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt and test/0.tar, ..., whose
members are pairs of a picture, 000000.png, and the index of its class, 000000.cls.
"""

import argparse
import io
import tarfile
from pathlib import Path

from PIL import Image

from hyperclip_fast.data.augmentation import to_rgb
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.pictures import load_pictures


def write_task(task: EvalTask, folder: Path, shards: int = 1, templates: tuple[str, ...] = ("{c}",)) -> None:
    """One task as one webdataset."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(task.class_names), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates), encoding="utf-8")
    (folder / "test" / "nshards.txt").write_text(str(shards))
    pixels = (to_rgb(task.images) * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for shard in range(shards):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as archive:
            for i in range(shard, len(pixels), shards):
                picture = io.BytesIO()
                Image.fromarray(pixels[i]).save(picture, "PNG")
                _add(archive, f"{i:06}.png", picture.getvalue())
                _add(archive, f"{i:06}.cls", str(int(task.labels[i])).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder; each task becomes one inside it")
    parser.add_argument("--tasks", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="archives a task; default: %(default)s")
    args = parser.parse_args()
    tasks = {task.name.replace(" ", "_"): task for task in held_out_tasks(load_pictures())}
    for name in args.tasks or tasks:
        if name not in tasks:
            raise SystemExit(f"--tasks must be some of {', '.join(tasks)}, got {name}")
        write_task(tasks[name], Path(args.out) / name, args.shards)
        print(f"{Path(args.out) / name}: {len(tasks[name].images)} pictures of {len(tasks[name].class_names)} classes")


if __name__ == "__main__":
    main()
