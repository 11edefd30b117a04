"""Files and folders written beside their place and renamed: whoever looks finds the old ones whole, or the new ones."""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

UNFINISHED = ".tmp-"  # how the names of what is being written begin; a killed process leaves such behind


@contextlib.contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes `path`'s place at the end, on the disk first; a failure removes it.

    Its suffix is that of `path`, since some writers look at it.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write a whole file, text as UTF-8."""
    with written_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written_folder(path: str | Path, argument: str = "out", replace: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write to, which takes `path`'s place at the end; a failure removes it.

    An old folder is renamed first. Killed between the two renames, a process leaves both, whole, beside `path`.

    Args:
        path: the folder; those that it lies in are made.
        argument: what to call it in an error.
        replace: take the place of a folder with files in it, too.

    Raises:
        ValueError: for a file, or a folder with files in it, unless `replace`.
    """
    path = Path(path)
    if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{argument} must be a new or an empty folder, got {path}")
    beside, old = _beside(path), _beside(path, "old-")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (beside, old):  # of a process that was killed, whose number is ours now
        shutil.rmtree(left, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(beside, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a killed process was writing into a folder."""
    for left in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _beside(path: Path, kind: str = "") -> Path:
    """A name that no other process or thread writes to."""
    return path.with_name(f"{UNFINISHED}{kind}{os.getpid()}-{threading.get_ident()}.{path.name}")


def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. The same content is the same bytes, and others may read it as they may other files."""
    write_file(path, _sorted(serialize(tensors, metadata)))


def _sorted(content: bytes) -> bytes:
    """A safetensors file with its metadata in the order of their keys: safetensors writes them in any."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[start:]


def load_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: if it is not one, or is cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, got {path}: {error}") from error
