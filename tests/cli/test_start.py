"""The first seconds of a command: light parsers, our own lines alone on stderr, and quiet ends."""

import os
import subprocess
import sys

import pytest
from PIL import Image

import hyperclip_fast
from hyperclip_fast.cli.console import shortened
from hyperclip_fast.cli.main import main

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


def test_version_and_no_command():
    run = subprocess.run(**hyperclip("--version"), capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"hyperclip_fast {hyperclip_fast.__version__}\n")


@pytest.mark.slow
def test_only_our_lines_and_consoles_of_any_encoding(photos):
    arguments = hyperclip("classify", photos, "--labels", "cat,dög", PYTHONIOENCODING="ascii")
    run = subprocess.run(**arguments, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    assert "d\\xf6g" in run.stdout and "caf\\xe9.jpg" in run.stdout


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_it_quietly(photos):
    arguments = hyperclip("classify", photos, "--labels", "cat,dog", "--batch-size", 1, PYTHONUNBUFFERED="1")
    with subprocess.Popen(**arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


@pytest.mark.parametrize("step", ["silence_libraries", "_check_device"])
def test_an_interrupt_while_libraries_load_is_one_line(step, photos, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"hyperclip_fast.cli.main.{step}", interrupted)
    assert main(["classify", str(photos), "--labels", "cat,dog"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_long_paths_show_that_their_beginning_is_left_out():
    assert shortened("a/b.jpg", 8) == "a/b.jpg"
    assert shortened("folder/b.jpg", 8) == "…r/b.jpg"
