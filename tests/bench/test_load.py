"""The load test: which answers count as right, and one short run against servers in threads."""

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from hyperclip_fast.bench import serving
from hyperclip_fast.cli.main import main
from hyperclip_fast.serving.options import ServeOptions
from tests.serving.process import serving_here
from tests.towers import patch_text_tower, tiny_model


class Session:
    """Answers every request alike, after `meanwhile` has happened."""

    def __init__(self, status, name, meanwhile):
        self.status, self.name, self.meanwhile = status, name, meanwhile

    @contextlib.asynccontextmanager
    async def post(self, *args, **kwargs):
        self.meanwhile()
        yield self

    async def json(self):
        return {"results": [{"task": "t", "ranked": [{"name": self.name, "probability": 1.0}]}]}


@pytest.mark.parametrize(
    "status, name, meanwhile, expected",
    [
        (200, "t 3 0", {}, "right"),
        (200, "t 4 0", {}, "right"),  # sent, not confirmed: it may have arrived
        (200, "t 2 0", {}, "lost"),
        (200, "t 5 0", {}, "lost"),
        (200, "t 5 0", {"sent": 5}, "right"),
        (200, "u 3 0", {}, "lost"),
        (404, "", {}, "lost"),
        (404, "", {"removals": 1}, "refused"),
        (503, "", {"removals": 1}, "lost"),
    ],
)
def test_an_answer_is_right_refused_or_lost(status, name, meanwhile, expected):
    task, tally = serving.Served("t", put=3, sent=4), serving.Tally()
    session = Session(status, name, lambda: vars(task).update(meanwhile))
    asyncio.run(serving._ask(session, "", b"", task, tally))
    assert (len(tally.seconds), tally.refused, len(tally.lost)) == {
        "right": (1, 0, 0),
        "refused": (0, 1, 0),
        "lost": (0, 0, 1),
    }[expected]


@pytest.mark.slow
def test_a_short_run(monkeypatch, tmp_path, capsys):
    patch_text_tower(monkeypatch)
    model = tiny_model()

    def server_here(arguments, command, stderr):
        bank = Path(arguments[arguments.index("--bank") + 1])
        return serving_here(model, bank, ServeOptions(mix="--one-task-a-batch" not in arguments), slow=0.02)

    monkeypatch.setattr(serving, "server_process", server_here)
    monkeypatch.setattr(serving, "address_of", lambda address: address)
    out = tmp_path / "figures.json"
    arguments = ["--json", str(out), "--rounds", "1", "--seconds", "0.7"]
    assert main(["bench", "serving", *arguments, "--tasks", "8", "--classes", "3", "--clients", "8"]) == 0
    mixed, single, changed = json.loads(out.read_text())["rows"]
    assert (mixed["mode"], single["mode"]) == tuple(serving.MODES)
    assert mixed["images_a_batch"] > 1.5 * single["images_a_batch"] and mixed["per_second"] > single["per_second"]
    assert changed["changes"] > 0 and not any(row["lost"] for row in (mixed, single, changed))
    assert "| mixed |" in capsys.readouterr().out


def test_refused_arguments(capsys):
    assert main(["bench", "serving", "--clients", "0"]) == 2
    assert "--clients must be positive" in capsys.readouterr().err
    assert main(["bench", "serving", "--model", "a", "--tower", "b"]) == 2
    assert "exclude each other" in capsys.readouterr().err
