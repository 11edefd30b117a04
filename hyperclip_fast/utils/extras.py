"""Packages that only some parts need: found, or missed with an error that names the extra to install."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an extra.

    Raises:
        ImportError: that names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module, extra) from error


def package_folder(package: str, extra: str) -> Path:
    """Where a package's data lies; the package itself is not imported.

    Raises:
        ImportError: that names the extra.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing(package, extra)
    return Path(spec.submodule_search_locations[0])


def missing(package: str, extra: str) -> ImportError:
    """The error for a package that is not there."""
    return ImportError(f"{package} is needed here: in a checkout of hyperclip_fast, pip install '.[{extra}]'")
