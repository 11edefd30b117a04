"""hyperclip embed: what TaskBank's model computes, whatever the format; a killed run leaves what a whole one leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from hyperclip_fast import TaskBank
from hyperclip_fast.cli.main import main
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.embed import formats as embed_formats
from hyperclip_fast.embed.embedder import EmbedConfig
from hyperclip_fast.embed.run import embed
from tests.towers import tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = "transformer:width=32,depth=1,heads=2,dim=24,context_length=8"
TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model, eight photos, one of them broken, and a shard of five pictures."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model(text_tower=TEXT).save_pretrained(folder / "model")
    (folder / "photos" / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(12)]
    for i, picture in enumerate(pictures[:7]):
        picture.save(folder / "photos" / ("deep" if i % 2 else ".") / f"{i}.png")
    (folder / "photos" / "3b.png").write_bytes((folder / "photos" / "4.png").read_bytes()[:900])
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for i, picture in enumerate(pictures[7:]):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            for name, content in ((f"{i}.png", buffer.getvalue()), (f"{i}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (folder / "tasks.json").write_text(json.dumps(TASKS))
    return folder


def run(source, out, format="safetensors", part_size=3, **options):
    """embed with the broken picture's warning expected."""
    config = EmbedConfig(format, part_size, batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "skipped .*3b.png")
        return embed([source / "photos", source / "shard.tar"], TASKS, out, config, source / "model", **options)


def rows(out, format):
    """(image, task, embedding) of every row, read as a user reads it."""
    found = []
    for number in range(len(list(out.glob(f"part-*.{format}")))):
        path = out / f"part-{number:06}.{format}"
        if format == "parquet":
            table = pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()
            found += zip(table["image"], table["task"], map(torch.tensor, table["embedding"]))
            continue
        if format == "safetensors":
            with safe_open(path, framework="pt") as file:
                embeddings, about = file.get_tensor("embeddings"), json.loads(file.metadata()["about"])
        else:
            embeddings, about = torch.from_numpy(np.load(path)), json.loads(path.with_suffix(".json").read_text())
        found += zip(about["images"], about["tasks"], embeddings, strict=True)
    return found


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def pixels(source, name):
    if ".tar/" not in name:
        return load_image(name, Preprocessing(32))
    shard, _, member = name.rpartition("/")
    with tarfile.open(shard) as archive:
        return load_image(archive.extractfile(member).read(), Preprocessing(32))


@pytest.mark.parametrize("format", ["safetensors", "npy", "parquet"])
def test_every_picture_in_every_task(source, tmp_path, format):
    index = run(source, tmp_path / "out", format)
    assert index["images"] == 13 and list(index["broken"]) == [str(source / "photos" / "3b.png")]
    assert "whole image file" in index["broken"][str(source / "photos" / "3b.png")]
    assert index == json.loads((tmp_path / "out" / "index.json").read_text())
    found = rows(tmp_path / "out", format)
    assert len(found) == len({row[:2] for row in found}) == 24
    bank = TaskBank(tiny_model(text_tower=TEXT))
    bank.add_many(TASKS)
    with torch.no_grad():
        for name, task, embedding in found:
            params = bank.params[bank.task_ids([task])]
            exact = bank.model.encode_image(pixels(source, name)[None], params)[0]
            torch.testing.assert_close(embedding, exact, atol=1e-5, rtol=1e-4)


def test_each_picture_in_its_own_task(source, tmp_path):
    names = [str(source / "photos" / "3b.png"), *{row[0] for row in rows_of(source, tmp_path / "all")}]
    own = {name: ("pets", "food")[i % 2] for i, name in enumerate(sorted(names))}
    lines = ["task,image", *(f"{task},{name}" for name, task in own.items())]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    run(source, tmp_path / "own", manifest=tmp_path / "own.csv")
    found = {row[:2]: row[2] for row in rows(tmp_path / "own", "safetensors")}
    every = {row[:2]: row[2] for row in rows_of(source, tmp_path / "all")}
    assert set(found) == {(name, own[name]) for name in names if "3b" not in name}
    for key, embedding in found.items():
        torch.testing.assert_close(embedding, every[key], atol=1e-5, rtol=1e-4)
    for text, match in ((lines[1:], "columns image and task"), (lines[:-1], "one of the tasks")):
        (tmp_path / "bad.csv").write_text("\n".join(text))
        with pytest.raises(ValueError, match=match):
            run(source, tmp_path / "bad", manifest=tmp_path / "bad.csv")
    assert not (tmp_path / "bad").exists()


def rows_of(source, out):
    run(source, out)
    return rows(out, "safetensors")


class Stop(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("format", ["safetensors", "npy"])
def test_a_run_stopped_before_any_rename_goes_on_to_the_same_bytes(source, tmp_path, format):
    run(source, tmp_path / "whole", format)
    whole, stops = files(tmp_path / "whole"), 0
    real = os.replace
    for step in range(100):
        done = 0

        def dying(beside, path, step=step):
            nonlocal done
            if done == step:
                Path(beside).with_suffix(".tmp").write_bytes(b"half")  # what a killed process leaves
                raise Stop
            done += 1
            real(beside, path)

        out = tmp_path / f"stopped {step}"
        try:
            with mock.patch("os.replace", dying):
                run(source, out, format)
        except Stop:
            stops += 1
            assert not (out / "index.json").exists()
            run(source, out, format)
            assert files(out) == whole
        else:
            break
    assert stops == len(whole)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(source, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(source, tmp_path / "whole", "parquet", part_size=1)
        command = [sys.executable, "-m", "hyperclip_fast.cli", "embed", source / "photos", source / "shard.tar"]
        command += ["--tasks", source / "tasks.json", "--out", tmp_path / "killed", "--format", "parquet"]
        command += ["--part-size", "1", "--batch-size", "4", "--model", source / "model"]
        kills = 0
        for parts in (1, 5):
            with subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
            ) as process:
                while len(list((tmp_path / "killed").glob("part-*"))) < parts and process.poll() is None:
                    time.sleep(0.001)
                process.send_signal(signal.SIGKILL)
            kills += process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "index.json").exists()
        assert kills  # a run may end before its kill, where this process was not let in
        assert main([*map(str, command[3:])]) == 0
        assert files(tmp_path / "killed") == files(tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_on_ray_the_bytes_are_the_same(source, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray sets it for its workers
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # Ray's own runtime_env would start the workers twice
    try:
        run(source, tmp_path / "here")
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
        index = run(source, tmp_path / "ray", ray_workers=2)
        assert index["parts"] == 5 and files(tmp_path / "ray") == files(tmp_path / "here")
        (tmp_path / "ray" / "part-000003.safetensors").unlink()  # goes on here with what a cluster left
        run(source, tmp_path / "ray")
        assert files(tmp_path / "ray") == files(tmp_path / "here")
    finally:
        ray.shutdown()
        torch.set_num_threads(threads)


def test_broken_pictures_are_named_as_they_are_met(source, tmp_path):
    with pytest.warns(UserWarning, match=r"skipped .*3b\.png: source must be a whole image file"):
        embed([source / "photos"], TASKS, tmp_path / "out", model=source / "model")


def test_a_disk_that_fails_breaks_no_picture(source, tmp_path):
    run(source, tmp_path / "whole")
    with (
        mock.patch("hyperclip_fast.data.tar_items.Item.read", side_effect=OSError("disk")),
        pytest.raises(OSError, match="disk"),
    ):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_run_is_not_overwritten(source, tmp_path):
    run(source, tmp_path / "out")
    before = files(tmp_path / "out")
    for change in ({"format": "npy"}, {"tasks": {"pets": ["cat"]}}, {"paths": [source / "shard.tar"]}):
        options = {
            "paths": [source / "photos", source / "shard.tar"],
            "tasks": TASKS,
            "format": "safetensors",
            **change,
        }
        config = EmbedConfig(options["format"], 3, 4)
        with pytest.raises(ValueError, match="same pictures, tasks and options"):
            embed(options["paths"], options["tasks"], tmp_path / "out", config, source / "model")
    bank = TaskBank(tiny_model(text_tower=TEXT))
    bank.add_many(TASKS)
    bank.save(tmp_path / "bank.safetensors")
    bank._table += 1
    other = TaskBank(bank.model)
    other.add_many(TASKS)
    other._embeddings[1] = -other._embeddings[1]
    for wrong in (bank, other):
        with pytest.raises(ValueError, match="holds other rows or embeddings"):
            embed(
                [source / "shard.tar", source / "photos"][::-1],
                wrong,
                tmp_path / "out",
                EmbedConfig("safetensors", 3, 4),
            )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for out in (tmp_path / "full", tmp_path / "full" / "letter.txt"):
        with pytest.raises(ValueError, match="out must be a new or an empty folder"):
            run(source, out)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("tasks", [{"pets": ["cat", "cat"]}, {"pets": "cat"}, {" ": ["cat"]}, {}])
def test_bad_tasks_leave_no_folder(source, tmp_path, tasks):
    with pytest.raises(ValueError, match="task"):
        embed([source / "photos"], tasks, tmp_path / "out", model=source / "model")
    assert not (tmp_path / "out").exists()


def test_a_bank_that_tasks_were_removed_from_goes_on(source, tmp_path):
    bank = TaskBank(tiny_model(text_tower=TEXT))
    bank.add_many({"gone": ["x"], **TASKS, "more": ["y", "z"]})
    bank.remove("gone")  # its rows are no longer in the order of its names
    embed([source / "shard.tar"], bank, tmp_path / "out")
    before = files(tmp_path / "out")
    embed([source / "shard.tar"], bank, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_command_line(source, tmp_path, capsys):
    bank = TaskBank(tiny_model(text_tower=TEXT))
    bank.add_many(TASKS)
    bank.save(tmp_path / "bank.safetensors")
    arguments = ["embed", str(source / "shard.tar"), "--model", str(source / "model"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--bank", str(tmp_path / "bank.safetensors")]) == 0
    assert f"{tmp_path / 'out'}: 5 images, 2 tasks\n" == capsys.readouterr().out
    assert len(rows(tmp_path / "out", "safetensors")) == 10
    for more, message in (
        (["--labels", "a,b", "--part-size", "0"], "part_size and batch_size must be at least 1"),
        (["--labels", "a,b", "--ray", "-1"], "ray_workers must not be negative"),
        (["--labels", "a,b"], "same pictures, tasks and options"),
        (["--labels", "a,a"], "--labels must be"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="format must be one of safetensors, npy, parquet"):
        EmbedConfig("pickle")
    assert set(embed_formats.FORMATS) == {"safetensors", "npy", "parquet"}
