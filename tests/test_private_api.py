"""Private interfaces of other packages stand in two files, each of which says why."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ("hyperclip_fast/utils/private_api.py", "kernels/common/private_api.py")
DOCUMENTED = {"_fields", "_replace"}  # of a namedtuple


def sources() -> list[Path]:
    """Every source file of the package."""
    return [path for part in ("hyperclip_fast", "kernels", "bench") for path in (ROOT / part).rglob("*.py")]


def is_private(name: str) -> bool:
    return name.startswith("_") and name.isidentifier() and not name.endswith("__")


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives: to functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def private_uses(tree: ast.AST, ours: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each private name that is not ours: an attribute, also by getattr or as a key, or an import."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call | ast.Subscript):
            keys = node.args[1:2] if isinstance(node, ast.Call) else [node.slice]
            names = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if not names[0].startswith("hyperclip_fast"):  # in another package, a name like one of ours is not ours
                yield from ((node.lineno, name) for name in names if is_private(name))
                continue
        yield from ((node.lineno, name) for name in names if is_private(name) and name not in ours | DOCUMENTED)


def test_private_names_of_others_stand_in_private_api():
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sources()}
    ours = {name for tree in trees.values() for name in own_names(tree)}
    wrong = [
        f"{path}:{line} uses {name}"
        for path, tree in trees.items()
        if path not in ALLOWED
        for line, name in private_uses(tree, ours)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import torch._dynamo",
        "from timm.models._features import FeatureGetterNet",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "torch._C._is_tracing()",
        "module._forward_hooks",
        "getattr(norm, '_fast_norm', False)",
        "vars(module)['_parameters']",
    ],
)
def test_each_way_to_use_one_is_seen(code):
    assert list(private_uses(ast.parse(code), {"_features", "_BatchNorm"}))
