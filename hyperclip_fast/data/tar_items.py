"""Pictures inside webdataset shards (.tar), read in place: nothing is ever unpacked.

A shard's headers are listed once; a picture is then the bytes at its offset. So no member's name becomes a path, and a
run can start again in the middle of a shard without reading what comes before.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from hyperclip_fast.data.image_files import MAX_BYTES, find_images, is_image_name

Read = TypeVar("Read")


@dataclass(frozen=True)
class Item:
    """One picture, wherever it lies.

    Args:
        name: "<file>", or "<shard>/<member>".
        path: the file, or the shard.
        offset: where it starts in `path`; None: it is the whole file.
        size: its bytes.
    """

    name: str
    path: str
    offset: int | None
    size: int

    def read(self) -> bytes:
        """The picture's bytes, cut where they exceed MAX_BYTES, so that `open_image` refuses them."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(min(self.size, MAX_BYTES + 1))


def find_items(paths: Iterable[str | Path]) -> list[Item]:
    """Pictures in files, folders (at any depth) and shards, in an order that depends on the names only.

    Args:
        paths: image files, .tar files, and folders that hold some at any depth.

    Raises:
        ValueError: for a path without pictures, or a shard that `members` refuses.
    """
    items = []
    for path in map(Path, paths):
        shards = [path] if path.suffix == ".tar" else sorted(path.rglob("*.tar"))
        for shard in shards:
            items += members(shard)
        if path not in shards and (not shards or _holds_images(path)):
            items += [Item(str(file), str(file), None, file.stat().st_size) for file in find_images([path])]
    seen: set[str] = set()
    for item in items:
        if item.name in seen:
            raise ValueError(f"paths must name every picture once, {item.name} comes twice")
        seen.add(item.name)
    return items


def _holds_images(folder: Path) -> bool:
    return any(is_image_name(file.relative_to(folder)) for file in folder.rglob("*"))


def members(shard: str | Path) -> list[Item]:
    """The pictures of a shard, in its order.

    Raises:
        ValueError: for something else than an uncompressed tar file, one that is cut short, one without pictures, or a
            picture that is a link, a sparse file, or has a name that leads out of the archive.
    """
    items, end = [], Path(shard).stat().st_size if Path(shard).is_file() else 0
    try:
        with open_shard(shard) as archive:
            for member in walk(archive, end):
                if is_image_name(PurePosixPath(member.name)):
                    _check_member(shard, member, end)
                    items.append(Item(f"{shard}/{member.name}", str(shard), member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"paths must hold whole uncompressed .tar files, got {shard}: {error}") from error
    if not items:
        raise ValueError(f"paths must hold .tar files with pictures, got {shard} with none")
    return items


def walk(archive: tarfile.TarFile, end: int | None) -> Iterator[tarfile.TarInfo]:
    """The members of an open archive, to an end that is one.

    tarfile takes whatever is no header for the end, and so a damaged or a cut archive for a short one.

    Args:
        archive: from its start.
        end: bytes of the file; None: it is compressed, and nothing but the order can be checked.

    Raises:
        tarfile.ReadError: for a member that does not lie behind the last one, or an end of something else than zeros.
    """
    last = -1
    while (member := _checked(archive.next)) is not None:
        if member.offset <= last:
            raise tarfile.ReadError(f"the header at byte {member.offset} is damaged")
        last = member.offset
        yield member
    if end is not None and archive.fileobj is not None:
        archive.fileobj.seek(min(archive.offset, end))
        rest = archive.fileobj.read(tarfile.BLOCKSIZE) if archive.offset <= end else b"beyond"
        if rest.strip(b"\0") or 0 < len(rest) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"it is cut short or damaged at byte {archive.offset}")


def open_shard(path: str | Path, mode: Literal["r:", "r:*"] = "r:") -> tarfile.TarFile:
    """An archive, opened; raises what `walk` does."""
    return _checked(lambda: tarfile.open(path, mode))


def _checked(read: Callable[[], Read]) -> Read:
    """What tarfile read; sizes that no file has are an error of its own."""
    try:
        return read()
    except (ValueError, OverflowError) as error:
        raise tarfile.ReadError(str(error)) from error


def _check_member(shard: str | Path, member: tarfile.TarInfo, end: int) -> None:
    name = PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"paths must hold .tar files whose names stay inside, got {member.name!r} in {shard}")
    if not member.isreg() or member.issparse():
        raise ValueError(f"paths must hold .tar files of plain files, {member.name!r} in {shard} is none")
    if member.offset_data + member.size > end:
        raise ValueError(f"paths must hold whole uncompressed .tar files, {member.name!r} in {shard} is cut short")
