"""The first seconds of a command: light parsers, our own lines alone on stderr, and quiet ends."""

import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import hyperclip_fast
from hyperclip_fast.cli.console import as_json, make_printable, shortened
from hyperclip_fast.cli.main import _parser, main

COMMANDS = ("", "demo", "classify", "train", "evaluate", "specialize", "export", "serve", "embed", "clip-benchmark")
COMMANDS += ("bench", "bench kernels", "bench model", "bench encoders", "bench serving")
HEAVY = ("torch", "timm", "numpy", "transformers", "PIL", "yaml")
HELP = f"""
import contextlib, io, sys
from hyperclip_fast.cli.main import main
for command in {COMMANDS!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    assert "usage: hyperclip" in out.getvalue(), command
    assert not [name for name in {HEAVY!r} if name in sys.modules], command
"""


def hyperclip(*arguments, **environment):
    """The arguments of a subprocess that runs a command."""
    command = [sys.executable, "-m", "hyperclip_fast.cli", *map(str, arguments)]
    return {"args": command, "env": {**os.environ, "OMP_NUM_THREADS": "1", **environment}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("orange", "café"):
        Image.new("RGB", (60, 50), "orange").save(folder / f"{name}.jpg")
    return folder


def test_help_waits_for_no_library():
    subprocess.run([sys.executable, "-c", HELP], check=True)


def test_version():
    run = subprocess.run(**hyperclip("--version"), capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"hyperclip_fast {hyperclip_fast.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_sentences_and_an_example(command, capsys, monkeypatch):
    """Every option says something, and the example is one that the parser takes."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    examples = re.findall(rf"^  (hyperclip {command}.*)$", text, re.MULTILINE)
    assert examples and max(map(len, text.splitlines())) <= 110
    for example in examples:
        assert hasattr(_parser().parse_args(shlex.split(example)[1:]), "run")
    silent = re.findall(r"^  (-\S.*)\n(?! {10})", text, re.MULTILINE)
    assert not [option for option in silent if not re.search(r"\S {2,}\S", option)]


@pytest.mark.slow
def test_only_our_lines_and_consoles_of_any_encoding(photos):
    arguments = hyperclip("classify", photos, "--labels", "cat,dög", PYTHONIOENCODING="ascii")
    run = subprocess.run(**arguments, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    assert "d\\xf6g" in run.stdout and "caf\\xe9.jpg" in run.stdout


@pytest.mark.parametrize("encoding, shown", [("ascii", '"caf\\u00e9"'), ("utf-8", '"café"')])
def test_json_is_json_on_any_console(encoding, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr("sys.stdout", stream)
    make_printable(stream)
    print(as_json("café"), flush=True)
    printed = stream.buffer.getvalue().decode(encoding).strip()
    assert printed == shown and json.loads(printed) == "café"


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_it_quietly(photos):
    arguments = hyperclip("classify", photos, "--labels", "cat,dog", "--batch-size", 1, PYTHONUNBUFFERED="1")
    with subprocess.Popen(**arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_reader_that_has_left_before_the_help(argument):
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(**hyperclip(argument, PYTHONUNBUFFERED=""), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, b"")


def test_another_broken_pipe_is_a_fault(photos, monkeypatch, capfd):
    """Such as that of a process that loads images: not the end of our reader."""

    def broken(_):
        raise BrokenPipeError("a worker has died")

    monkeypatch.setattr("hyperclip_fast.cli.main._check_device", broken)
    assert main(["classify", str(photos), "--labels", "cat,dog"]) == 2
    assert capfd.readouterr().err == "hyperclip classify: a worker has died\n"


@pytest.mark.parametrize("step", ["console.make_printable", "main._parser", "main._check_device"])
def test_an_interrupt_while_libraries_load_is_one_line(step, photos, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hyperclip_fast.cli.{step}", interrupted)
    assert main(["classify", str(photos), "--labels", "cat,dog"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_long_paths_show_that_their_beginning_is_left_out():
    assert shortened("a/b.jpg", 8) == "a/b.jpg"
    assert shortened("folder/b.jpg", 8) == "…r/b.jpg"
