"""Files and folders written beside their place and renamed: whoever looks finds the old ones whole, or the new ones.

That holds for a process that is killed at any moment, and, since content reaches the disk before its name, for a
machine that loses power.
"""

import contextlib
import ctypes
import errno
import json
import os
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

UNFINISHED = ".tmp-"  # how the names of what is being written begin; a killed process leaves such behind
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of writing to an open file: they name none
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextlib.contextmanager
def written_file(path: str | Path) -> Iterator[Path]:
    """An empty file beside `path` to write to. It takes `path`'s place at the end; a failure removes it.

    Its suffix is that of `path`, since some writers look at it. Who may read it follows from the umask, whatever its
    writer says. Errors name `path`.
    """
    place, beside = _place_and_beside(path)
    with _errors_naming(path, beside):
        beside.touch(exist_ok=False)
        mode = beside.stat().st_mode
        try:
            yield beside
            _settle(beside, mode)
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Write a whole file, text as UTF-8."""
    with written_file(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def written_folder(path: str | Path, argument: str = "out", replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `path` to write to. It takes `path`'s place at the end; a failure removes it.

    On Linux an old folder and the new one change places in one step. Elsewhere, and on file systems that cannot, the
    old one is renamed first; killed between the two renames, a process leaves both, whole, beside `path`.

    Args:
        path: the folder; those that it lies in are made.
        argument: what to call it in an error.
        replace: take the place of a folder with files in it, too.

    Raises:
        ValueError: for a file, or a folder with files in it, unless `replace`.
    """
    if not replace:
        _check_free(path, argument)
    place, beside = _place_and_beside(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _errors_naming(path, beside):
        beside.mkdir()
        try:
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    _settle(file, beside.stat().st_mode & 0o666)
            if not replace:
                _check_free(path, argument)
            _put(beside, place)
        finally:
            _remove(beside)


def remove_unfinished(folder: str | Path, name: str | None = None) -> None:
    """Remove what a killed process was writing into a folder; with a name, what was to have that name alone."""
    for left in Path(folder).glob(f"{UNFINISHED}{_mark(name) if name else ''}*"):
        _remove(left)


def reach_disk(folder: str | Path) -> None:
    """Wait until the names in a folder are on the disk: a rename that was lost in a power cut leaves the old file."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _place_and_beside(path: str | Path) -> tuple[Path, Path]:
    """Where a path is, links followed, and a name beside it that nobody else writes to."""
    place = Path(os.path.realpath(path))
    return place, place.with_name(f"{UNFINISHED}{_mark(place.name)}{secrets.token_hex(8)}{place.suffix}")


def _mark(name: str) -> str:
    """What the names of what is to have this name have in common."""
    return f"{zlib.crc32(os.fsencode(name)):08x}"


def _check_free(path: str | Path, argument: str) -> None:
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{argument} must be a new or an empty folder, got {path}")


@contextlib.contextmanager
def _errors_naming(path: str | Path, beside: Path) -> Iterator[None]:
    """Errors inside name `path` in place of what lies beside it."""
    try:
        yield
    except OSError as error:
        if str(beside) in str(error.filename):
            error.filename = str(error.filename).replace(str(beside), str(path))
            del error.filename2
        elif error.filename is None and error.errno in DISK_ERRORS:
            error.filename = str(path)
        raise


def _settle(file: Path, mode: int) -> None:
    """Give a file the permissions of `mode` that it lacks, as one of mkstemp does, and have it on the disk."""
    given = stat.S_IMODE(file.stat().st_mode)
    if stat.S_IMODE(mode) & ~given:
        file.chmod(given | stat.S_IMODE(mode))
    with open(file, "rb+") as content:
        os.fsync(content.fileno())


def _put(folder: Path, place: Path) -> None:
    """Rename a folder; what had its new name afterwards has its old one, or is gone."""
    if not place.exists():
        os.replace(folder, place)
    elif not _swap(folder, place):
        _, old = _place_and_beside(place)
        try:
            os.replace(place, old)
            os.replace(folder, place)
        except BaseException:
            if old.exists() and not place.exists():
                os.replace(old, place)
            raise
        _remove(old)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the platform or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def save_safetensors(tensors: dict[str, torch.Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. The same content is the same bytes, and others may read it as they may other files."""
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}  # convolutions may be in channels_last
    write_file(path, _sorted(serialize(dense, metadata)))


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
