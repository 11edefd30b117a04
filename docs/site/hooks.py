"""Hook of mkdocs.yml: mkdocstrings reads the package as it installs, with kernels/ and bench/ inside hyperclip_fast.

In a checkout they lie beside it, where a reader of files does not find `hyperclip_fast.kernels`.
"""

import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"hyperclip_fast": "hyperclip_fast", "kernels": "hyperclip_fast/kernels", "bench": "hyperclip_fast/bench"}
_tree = tempfile.TemporaryDirectory(prefix="hyperclip_fast_docs_")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the sources as they install, and point mkdocstrings at the copy."""
    for folder, place in PARTS.items():
        ignored = shutil.ignore_patterns("__pycache__", "assets", "results")
        shutil.copytree(ROOT / folder, Path(_tree.name) / place, ignore=ignored, dirs_exist_ok=True)
        (Path(_tree.name) / place / "__init__.py").touch()  # which mkdocstrings expects of every folder in a package
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_tree.name]
    return config
