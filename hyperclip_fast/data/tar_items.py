"""Pictures inside webdataset shards (.tar), read in place: nothing is ever unpacked.

A shard's headers are listed once; a picture is then the bytes at its offset. So no member's name becomes a path, and a
run can start again in the middle of a shard without reading what comes before.
"""

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hyperclip_fast.data.image_files import IMAGE_SUFFIXES, MAX_BYTES, find_images


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
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))


def members(shard: str | Path) -> list[Item]:
    """The pictures of a shard, in its order.

    Raises:
        ValueError: for something else than an uncompressed tar file, one that is cut short, one without pictures, or a
            picture that is a link, a sparse file, or has a name that leads out of the archive.
    """
    items, end = [], Path(shard).stat().st_size if Path(shard).is_file() else 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES:
                    _check_member(shard, member, end)
                    items.append(Item(f"{shard}/{member.name}", str(shard), member.offset_data, member.size))
    except (tarfile.TarError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"paths must hold whole uncompressed .tar files, got {shard}: {error}") from error
    if not items:
        raise ValueError(f"paths must hold .tar files with pictures, got {shard} with none")
    return items


def _check_member(shard: str | Path, member: tarfile.TarInfo, end: int) -> None:
    name = PurePosixPath(member.name.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"paths must hold .tar files whose names stay inside, got {member.name!r} in {shard}")
    if not member.isreg() or member.issparse():
        raise ValueError(f"paths must hold .tar files of plain files, {member.name!r} in {shard} is none")
    if member.offset_data + member.size > end:
        raise ValueError(f"paths must hold whole uncompressed .tar files, {member.name!r} in {shard} is cut short")
