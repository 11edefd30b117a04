"""Dockerfile and compose.yaml, as far as they can be tried without Docker: arguments, extras, the health check."""

import fnmatch
import json
import re
import subprocess
import sys

import yaml

from hyperclip_fast.cli.main import _parser
from hyperclip_fast.serving.options import ServeOptions
from tests.serving.process import ROOT, serving_here

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["hyperclip"]


def only(instruction):
    (value,) = [value for name, value in LINES if name == instruction]
    return value


def test_it_starts_the_server_as_a_user_without_rights():
    start = json.loads(only("ENTRYPOINT"))
    assert start[0] == "hyperclip"
    args = _parser().parse_args([*start[1:], *COMPOSE["command"]])
    assert (args.command, args.host, args.port, args.create) == ("serve", "0.0.0.0", int(only("EXPOSE")), True)
    assert args.bank.startswith(only("VOLUME") + "/") and args.api_key_file == "/run/secrets/keys"
    user = only("USER")
    assert user != "root" and any(f"useradd --uid 10001 {user}" in value for name, value in LINES if name == "RUN")
    assert [name for name, _ in LINES].index("USER") < [name for name, _ in LINES].index("ENTRYPOINT")
    (port,) = COMPOSE["ports"]
    assert port.startswith("127.0.0.1:") and port.endswith(only("EXPOSE"))
    grace = int(COMPOSE["stop_grace_period"].removesuffix("s"))
    assert grace > args.drain_seconds  # else Docker kills what is still being answered


def test_it_installs_an_extra_that_is_there():
    (extra,) = re.findall(r"/source\[(\w+)\]", TEXT)
    assert f'"{extra}": ' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_what_is_left_out_is_not_needed():
    """Everything that setup.py reads or installs is copied."""
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    needed = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "hyperclip_fast", "kernels", "bench"]
    needed += ["hyperclip_fast/serving/static/index.html", "hyperclip_fast/assets/demo/model.safetensors"]
    assert all((ROOT / path).exists() for path in needed)
    assert not [path for path in needed if any(fnmatch.fnmatch(path, pattern) for pattern in ignored)]


def test_the_health_check_sees_a_server_and_the_lack_of_one(model, tmp_path):
    command = json.loads(only("HEALTHCHECK").partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    with serving_here(model, tmp_path / "b.safetensors", ServeOptions(hosts=("127.0.0.1",))) as address:
        code = command[2].replace("http://127.0.0.1:8000", address)
        assert code != command[2]
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode != 0
