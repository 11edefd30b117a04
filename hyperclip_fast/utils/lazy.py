"""Names that are imported when somebody asks for them, so that `hyperclip --help` need not wait for PyTorch.

A package says where its public names live (PEP 562), and imports them under `typing.TYPE_CHECKING` for type checkers:

    __getattr__, __dir__ = lazy_names(__name__, {"models": ("HyperViT",)})
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names are found in its modules.

    The package's own modules are found, too, as in `hyperclip_fast.data.load_pictures()` after `import hyperclip_fast`.

    Args:
        package: its `__name__`.
        modules: public names by the module that has them: "models" is one of the package, ".data.models" one beside it.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f".{homes[name]}", package), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names


def after_import(module: str, then: Callable[[], object]) -> None:
    """Call `then` once `module` has been imported: now, if it has been already."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watcher(module, then))


class _Watcher:
    """A finder that finds one module as everybody else does, and has its loader call a function afterwards, once."""

    def __init__(self, module: str, then: Callable[[], object]):
        self.module, self.then = module, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del vars(loader)["exec_module"]  # from here on it is the class's again
                execute(module)
                self.then()

            vars(loader)["exec_module"] = exec_module
        return spec
