"""The rooms of the house: imports run one way, no file imports itself in a circle, and no folder becomes a corridor."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up: a room may import those of the floors below it, and nothing of its own floor but itself.
FLOORS = (
    ("utils", "version", "configs", "kernels"),
    ("data",),
    ("text",),
    ("pretrained",),
    ("models",),
    ("evaluation",),
    ("training",),
    ("export", "embed", "serving", "integrations"),
    ("bench",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_FILES = 17  # of a folder, its __init__.py not counted
MOST_AT_ROOT = 19  # the models, flat
PARTS = {"hyperclip_fast": "hyperclip_fast", "kernels": "hyperclip_fast.kernels", "bench": "hyperclip_fast.bench"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, package in PARTS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    """The folder that a module belongs to; "models" for those at the root."""
    parts = module.split(".")
    is_root = len(parts) == 1 or (len(parts) == 2 and modules()[module].name != "__init__.py")
    return "version" if parts[-1] == "version" else "models" if is_root else parts[1]


def imports(module: str) -> Iterator[str]:
    """Modules of ours that a module imports, at its top or inside functions."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from {name if name in modules() else base for name in names} & modules().keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules().keys()


@cache
def arrows() -> set[tuple[str, str]]:
    """(module, module that it imports)."""
    return {(module, other) for module in modules() for other in imports(module) if other != module}


def test_every_arrow_between_rooms_runs_down():
    wrong = []
    for module, other in sorted(arrows()):
        room, below = room_of(module), room_of(other)
        if module != "hyperclip_fast" and room != below and FLOOR[below] >= FLOOR[room]:
            wrong.append(f"{module} ({room}) imports {other} ({below})")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_in_a_circle():
    below = defaultdict(list)
    for module, other in sorted(arrows()):
        below[module].append(other)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in below[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def test_kernels_stand_alone():
    """They are published on their own, too: torch, triton and what comes with Python."""
    for module, path in modules().items():
        if room_of(module) == "kernels":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level or node.module.split(".")[0] != "hyperclip_fast", f"{path}:{node.lineno}"


@pytest.mark.parametrize("part", [*PARTS, "tests"])
def test_no_folder_is_a_corridor(part):
    for folder in [ROOT / part, *(ROOT / part).rglob("*")]:
        if folder.is_dir():
            files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
            most = MOST_AT_ROOT if folder == ROOT / "hyperclip_fast" else MOST_FILES
            assert len(files) <= most, f"{folder.relative_to(ROOT)} has {len(files)} files: {sorted(files)}"
