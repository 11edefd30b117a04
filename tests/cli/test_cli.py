"""The command line as a user meets it: tables, JSON, files written, errors without tracebacks."""

import csv
import io
import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from hyperclip_fast.cli.arguments import read_tasks
from hyperclip_fast.cli.main import main
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.task_bank import TaskBank
from tests.towers import HashTower, patch_text_tower, tiny_model


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A tiny model's folder."""
    patch_text_tower(monkeypatch)
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30 + i), colour).save(folder / f"{colour}.png")
    return folder


def test_classify_scores_every_image_in_every_task(model, photos, tmp_path, capsys):
    tasks = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"]}
    (tmp_path / "tasks.yaml").write_text(json.dumps(tasks))
    arguments = ["classify", str(photos), "--tasks", str(tmp_path / "tasks.yaml"), "--model", model]
    assert main([*arguments, "--json", "--batch-size", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    bank = TaskBank(tiny_model())
    bank.add_many(tasks)
    for line in lines:
        expected = bank.classify(load_image(line["image"], Preprocessing(32))[None], [line["task"]], 3)[0]
        assert list(line["predictions"]) == list(expected.names)
        assert list(line["predictions"].values()) == pytest.approx(expected.probabilities, abs=1e-3)
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 7 and "pets" in table[1] and "%" in table[1]


def test_classify_with_labels(model, photos, capsys):
    file = str(photos / "red.png")
    assert main(["classify", file, "--labels", "cat, dog,", "--model", model, "--json", "--topk", "9"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert set(line["predictions"]) == {"cat", "dog"}
    assert sum(line["predictions"].values()) == pytest.approx(1, abs=1e-3)


def test_specialize_writes_what_timm_alone_can_load(model, tmp_path, capsys):
    out = tmp_path / "made" / "pets"
    assert main(["specialize", "--labels", "cat,dog", "--out", str(out), "--model", model]) == 0
    stock = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32)
    source = tiny_model()
    classes = load_file(out / "classes.safetensors")["class_embeddings"]
    with torch.no_grad():
        expected = source.image(images, source.adapt([["cat", "dog"]]))
        torch.testing.assert_close(stock(images), expected)
        torch.testing.assert_close(classes, source.encode_text(["cat", "dog"]))
    assert json.loads((out / "labels.json").read_text()) == ["cat", "dog"]
    assert main(["specialize", "--labels", "a,b", "--out", str(out), "--model", model]) == 2
    assert "new or an empty folder" in capsys.readouterr().err
    assert [file.name for file in out.parent.iterdir()] == ["pets"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["classify", "nowhere.png", "--labels", "a,b"], "nowhere.png"),
        (["classify", "{photos}", "--labels", " , "], "--labels must be"),
        (["classify", "{photos}", "--labels", ""], "--labels must be"),
        (["classify", "{photos}", "--labels", "cat,dog,cat"], "--labels must be distinct"),
        (["classify", "{photos}", "--labels", "a,b", "--model", "no/such/model"], "got no/such/model"),
        (["classify", "{photos}", "--labels", "a,b", "--device", "toaster"], "--device must be"),
        (["demo", "--device", "cuda:99"], "--device must be"),
        (["classify", "{photos}", "--labels", "a,b", "--topk", "0"], "must be at least 1"),
        (["classify", "{photos}", "--tasks", "{photos}/none.yaml"], "none.yaml"),
        (["classify", "{photos}", "--labels", "a,b", "--model", "{photos}"], "model must be a folder"),
        (["evaluate", "--classes", "1"], "--classes must be at least 2"),
        (["train", "--config", "{photos}/none.yaml", "--out", "{photos}/run"], "none.yaml"),
    ],
)
def test_errors_are_messages(photos, capsys, arguments, message):
    filled = [argument.format(photos=photos) for argument in arguments]
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{}", '{"a": []}', '{"a": "cat"}', '{"a": [1]}', '{"a": ["b", "b"]}', "{", "\x00"]
)
def test_refused_task_files(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(ValueError, match="--tasks must"):
        read_tasks(tmp_path / "tasks.json")


def test_damaged_images_are_named_and_the_others_classified(model, photos, tmp_path, capsys):
    (tmp_path / "tasks.json").write_text('{"one": ["a", "b"], "two": ["c"]}')
    arguments = ["classify", str(photos), "--tasks", str(tmp_path / "tasks.json"), "--model", model, "--json"]
    assert main(arguments) == 0
    whole = [line for line in capsys.readouterr().out.splitlines() if "red.png" not in line]
    (photos / "red.png").write_bytes((photos / "red.png").read_bytes()[:50])
    assert main([*arguments, "--batch-size", "3"]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines() == whole and len(whole) == 4
    assert shown.err.count("red.png") == 1 and "1 of 3 images could not be read" in shown.err
    assert main([*arguments, "--strict"]) == 2
    assert "red.png" in capsys.readouterr().err


def test_classify_in_csv(model, photos, capsys):
    arguments = ["classify", str(photos), "--labels", '"bow, tie",hat', "--model", model]
    assert main([*arguments, "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert main([*arguments, "--jsonl"]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["image"], line["name"], float(line["probability"])) for line in lines] == [
        (line["image"], name, share) for line in expected for name, share in line["predictions"].items()
    ]
    assert {line["name"] for line in lines} == {"bow, tie", "hat"}
    assert [line["rank"] for line in lines] == ["1", "2"] * 3


def test_a_saved_bank_classifies_as_its_tasks_without_a_text_tower(model, photos, tmp_path, monkeypatch, capsys):
    tasks, bank = tmp_path / "tasks.json", tmp_path / "tasks.safetensors"
    tasks.write_text('{"one": ["a", "b"], "two": ["c", "d"]}')
    arguments = ["classify", str(photos), "--model", model, "--json"]
    assert main([*arguments, "--tasks", str(tasks)]) == 0
    expected = capsys.readouterr().out
    assert main(["bank", "create", "--tasks", str(tasks), "--out", str(bank), "--model", model]) == 0
    assert "2 tasks, 4 class names" in capsys.readouterr().out
    monkeypatch.setattr(HashTower, "encode", None)
    assert main([*arguments, "--bank", str(bank)]) == 0
    assert capsys.readouterr().out == expected


COMMANDS = "demo classify bank init embed train evaluate specialize export serve bench clip-benchmark"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: hyperclip {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_without_a_command_the_help_is_shown(arguments):
    command = [sys.executable, "-m", "hyperclip_fast.cli", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(" ".join(["usage: hyperclip", *arguments])) and "example" in run.stderr
