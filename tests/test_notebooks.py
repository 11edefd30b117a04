"""The notebooks of examples/: every cell of code runs, in order, and shows what its text says."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, folder, monkeypatch):
    """What the cells of a notebook leave behind."""
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(folder)
    scope = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), scope)
    return scope


@pytest.mark.slow
def test_swap_and_train(tmp_path, monkeypatch, capsys):
    accuracy = run("swap_and_train.ipynb", tmp_path, monkeypatch)["accuracy"]
    printed = capsys.readouterr().out
    assert "outputs equal: True" in printed and "agrees: True" in printed
    own, another = (sum(accuracy[task, kind] for task in range(3)) / 3 for kind in ("own", "another"))
    assert own > 0.8 and own > another + 0.2


def test_thousand_tasks(tmp_path, monkeypatch):
    scope = run("thousand_tasks.ipynb", tmp_path, monkeypatch)
    assert len(scope["predictions"]) == len(scope["bank"]) == 1000
    assert scope["right"] > scope["guess"] + 0.2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
