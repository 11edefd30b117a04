"""README.md and docs/: every block of Python runs as written, page by page; every shell command is one that exists."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from hyperclip_fast import TaskBank
from hyperclip_fast.cli.main import _parser, main
from hyperclip_fast.embed.run import embed

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": ROOT / "README.md", "kernels/README.md": ROOT / "kernels/README.md"}
PAGES |= {"CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
PAGES |= {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WRITTEN_BY = {  # commands of a page whose files its Python reads
    "docs/export.md": (
        'hyperclip specialize --labels "cat,dog" --out cat_or_dog/',
        "hyperclip export mixed --out mixed.onnx",
        "hyperclip export text --out text.onnx",
    )
}


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages; "" is a shell block."""
    return [code for language, code in FENCE.findall(PAGES[page].read_text(encoding="utf-8")) if language in languages]


SLOW = {"docs/export.md": pytest.mark.slow}
WITH_PYTHON = [pytest.param(page, marks=SLOW.get(page, ())) for page in PAGES if blocks(page, "python")]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder in place of the hub."""

    def upload(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, **_: False)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return tmp_path / "hub"


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs_as_written(page, hub, tmp_path, monkeypatch):
    """In an empty folder but for photo.jpg, and what the page's own commands write."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 50), "orange").save("photo.jpg")
    for command in WRITTEN_BY.get(page, ()):
        assert command in commands(page)
        assert main(shlex.split(command)[1:]) == 0
    if page == "docs/embed.md":
        embed(["photo.jpg"], {"digits": ["zero", "one"]}, "embeddings")
    scope = {}
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), scope)
    RESULTS.get(page, lambda scope, hub: None)(scope, hub)


def check_export(scope, hub):
    bank = TaskBank(scope["model"])
    bank.add_many({"pets": ["cat", "dog"], "food": ["pizza", "sushi"]})
    exact = bank.logits(torch.from_numpy(scope["images"]), ["pets", "food", "food"])
    torch.testing.assert_close(torch.from_numpy(scope["logits"]), exact, atol=1e-4, rtol=1e-4)
    assert {path.name for path in (hub / "me").iterdir()} == {"model", "cat-or-dog"}


def check_open_clip(scope, hub):
    assert scope["classifier"].shape == (256, 3) and scope["clip"].visual.image_size == (160, 160)


def check_norm_rows(scope, hub):
    assert scope["bank"].tasks == ("pets",)
    assert Path("rows.safetensors").is_file()


def check_embed(scope, hub):
    assert scope["image"].size == (60, 50) and scope["embeddings"].shape == (1, 256)


def check_readme(scope, hub):
    assert scope["bank"].tasks == ("pets", "food") and scope["out"].shape == scope["x"].shape


RESULTS = {
    "README.md": check_readme,
    "docs/export.md": check_export,
    "docs/open_clip.md": check_open_clip,
    "docs/norm_rows.md": check_norm_rows,
    "docs/embed.md": check_embed,
}


def commands(page: str) -> Iterator[str]:
    """Shell commands of a page: lines of its unmarked blocks and `bash` blocks, continued ones joined."""
    for code in blocks(page, "", "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            if words := re.sub(r"(^|\s)#.*", "", line).strip():
                yield " ".join(words.split()) if '"' not in words and "'" not in words else words


def all_commands() -> list[tuple[str, str]]:
    """(page, command), of all pages."""
    return [(page, command) for page in PAGES for command in commands(page)]


def test_every_page_with_commands_is_read():
    pages = {page for page, _ in all_commands()}
    assert {"README.md", "CONTRIBUTING.md", "docs/serving.md", "docs/benchmarks.md", "docs/evaluation.md"} <= pages


def ours(command: str) -> list[str] | None:
    """The arguments of `hyperclip` in a command that runs it, behind variables or torchrun; else None."""
    words = shlex.split(command)
    for start in (["hyperclip"], ["-m", "hyperclip_fast.cli"]):
        for i in range(len(words)):
            if words[i : i + len(start)] == start and (start[0] == "-m" or all("=" in word for word in words[:i])):
                return words[i + len(start) :]
    return None


OURS = [(page, command) for page, command in all_commands() if ours(command) is not None]


@pytest.mark.parametrize(("page", "command"), OURS, ids=[command[:60] for _, command in OURS])
def test_hyperclip_knows_the_command_and_its_options(page, command, monkeypatch):
    def refuse(self, message):
        raise AssertionError(f"{page}: {command}: {message}")

    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    _parser().parse_args(ours(command))


def test_make_targets_exist():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    named = {words[1] for _, command in all_commands() if (words := command.split())[0] == "make"}
    assert {"demo", "test", "gpu-report"} <= named <= targets


def test_modules_and_scripts_exist():
    """What `python -m`, `python` and Ray's `serve run` are given."""
    started = [shlex.split(command) for _, command in all_commands()]
    modules = {words[2] for words in started if words[:2] == ["python", "-m"]}
    modules |= {words[2].partition(":")[0] for words in started if words[:2] == ["serve", "run"]}
    assert {"hyperclip_fast.env", "hyperclip_fast.serving.on_ray"} <= modules
    assert all(importlib.util.find_spec(module) for module in modules)
    scripts = {words[1] for words in started if words[0] == "python"} - {"-m", "-c"}
    assert "bench/ledger.py" in scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Links between pages, and to their headings."""
    text = FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, heading = target.partition("#")
        place = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert place.exists(), f"{page} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", FENCE.sub("", place.read_text(encoding="utf-8")), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, f"{page} links to {target}"


def test_pictures_are_what_their_scripts_draw(monkeypatch):
    folder = ROOT / "docs/pictures"
    monkeypatch.syspath_prepend(folder)
    idea, throughput = (importlib.import_module(name) for name in ("draw", "throughput"))
    assert (folder / "idea.svg").read_text(encoding="utf-8") == idea.draw()
    record = json.loads((folder / "throughput.json").read_text(encoding="utf-8"))
    assert (folder / "throughput.svg").read_text(encoding="utf-8") == throughput.draw(record)
