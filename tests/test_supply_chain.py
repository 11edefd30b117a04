"""What is run and installed on behalf of users: no pickle, no foreign code, and the licence of each requirement listed.

ruff's rules S, those of bandit, look for the rest (`make lint`).
"""

import ast
import re
import runpy
from importlib import metadata
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for part in ("hyperclip_fast", "kernels", "bench") for path in sorted((ROOT / part).rglob("*.py"))]
NOT_FOR_USERS = ("test", "docs", "oldest", "report", "evidence")
WORDS = {"Apache-2.0": "apache", "MIT": "mit", "BSD-3-Clause": "bsd", "MIT-CMU": "mit-cmu", "BSD": "bsd"}
WORDS |= {"CC-BY-SA-4.0": "cc-by-sa-4.0", "MPL-2.0": "mpl-2.0", "PSF-2.0": "python software foundation"}


def calls():
    """(place, name, call) of every call in the package."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def test_no_pickle_is_read_but_by_pytorchs_restricted_reader():
    loads = [(place, call) for place, name, call in calls() if name == "torch.load"]
    assert loads
    for place, call in loads:
        assert [k.value.value for k in call.keywords if k.arg == "weights_only"] == [True], place
    readers = r"(pickle|marshal|shelve|dill|joblib|cloudpickle)\.(load|loads|Unpickler|open)"
    assert not [place for place, name, _ in calls() if re.fullmatch(readers, name)]


def test_no_code_of_others_is_run():
    """trust_remote_code is given nowhere; eval and exec are PyTorch's methods of that name, if anything."""
    for place, name, call in calls():
        assert "trust_remote_code" not in [keyword.arg for keyword in call.keywords], place
        assert name not in ("eval", "exec", "os.system", "os.popen"), place
        assert not any(k.arg == "shell" and getattr(k.value, "value", True) for k in call.keywords), place


def requirements():
    """Names of what users install, by extra."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", kept.update)
        runpy.run_path(str(ROOT / "setup.py"))
    extras = {name: each for name, each in kept["extras_require"].items() if name not in NOT_FOR_USERS}
    lines = {*kept["install_requires"], *(line for each in extras.values() for line in each)}
    return {re.match(r"[\w.-]+", line)[0] for line in lines}


def test_the_licence_of_each_requirement_is_listed():
    """As its own metadata says, where it is installed."""
    text = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert set(listed) == requirements()
    for name, licences in listed.items():
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        said = [about.get("License-Expression"), about.get("License"), *(about.get_all("Classifier") or [])]
        said = " ".join(each for each in said if each and (":" not in each or each.startswith("License"))).lower()
        for licence in licences.strip().split(", "):
            is_true = said in ("", "unknown") if licence == "not stated" else WORDS[licence] in said
            assert is_true, f"{name}: {licence}, its metadata says {said[:90]!r}"
