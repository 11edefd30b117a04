"""Image-caption pairs streamed from webdataset's tar files, shuffled, by several workers, resumable at any sample.

The shards of an epoch are shuffled and dealt to the *slots*: the workers of all processes. A slot reads its shards one
after another, in blocks of `shuffle` samples, and gives each block in random order. webdataset's own shuffle mixes
through a buffer whose content no checkpoint could hold; with blocks, where a slot stands is four numbers: epoch, shard
and sample at which its block starts, and how much of the block is gone. Going on reads the shard again up to there and
decodes nothing.
"""

import io
import json
import lzma
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hyperclip_fast.data.batch import Batch, BatchShape, Share, batch_of
from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.data.loader import load
from hyperclip_fast.data.tar_items import open_shard, walk
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.seeds import generator_of, hash_seed, seeded

Sample = dict[str, Any]
MOST_BROKEN = 1000  # samples of one batch, before its shards count as unreadable


class Position(NamedTuple):
    """Where a slot stands: its block begins at a sample of a shard of an epoch, and `given` of the block are gone."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    given: int = 0


class ShardSource:
    """Batches of captions from shards; a worker makes whole batches, and the workers take turns.

    Args:
        shape: of the batches.
        data: the shards, and how to read them.
        reader: see `transforms.create_reader`.
        share: of this process.
        pin: for a copy to a GPU.

    Raises:
        ValueError: for fewer shards than slots, or labels.
        ImportError: where webdataset is missing.
    """

    names: tuple[str, ...] = ()

    def __init__(
        self,
        shape: BatchShape,
        data: DataConfig,
        reader: Callable[[bytes], Tensor],
        share: Share,
        pin: bool = False,
    ):
        if shape.class_range[0] != shape.class_range[1]:
            raise ValueError(f"classes_per_task must be one number for shards, got {shape.classes_per_task}")
        self.shape, self.data, self.reader, self.share, self.pin = shape, data, reader, share, pin
        expand = require("webdataset.shardlists", "train").expand_urls
        self.urls = [url for part in data.path.split("::") for url in expand(part)]
        self.slots = share.world * max(1, data.workers)
        if len(self.urls) < self.slots:
            raise ValueError(
                f"path must name a shard for each of {self.slots} workers, {data.path} has {len(self.urls)}"
            )
        pairs = shape.tasks_per_batch * shape.class_range[1]
        mine = share.of(pairs if shape.tasks_per_batch == 1 else shape.tasks_per_batch, "tasks_per_batch or its pairs")
        size = mine.stop - mine.start
        self.counts = (size,) if shape.tasks_per_batch == 1 else (shape.class_range[1],) * size

    def batches(self, start: int, state: dict[int, tuple[int, ...]] | None = None) -> Iterator[Batch]:
        """The batches from step `start` on; `state` says where the workers stood then, by their number."""
        workers = max(1, self.data.workers)
        positions = dict(state or {})
        for batch in load(_Stream(self, start % workers, positions), self.data.workers, self.pin):
            number, position = batch.state
            positions = {**positions, number: tuple(position)}  # a checkpoint holds no class of ours
            yield Batch(batch.images, batch.labels, batch.counts, batch.classes, batch.broken, positions)

    def order(self, epoch: int, slot: int) -> list[str]:
        """The shards of a slot in an epoch."""
        generator = generator_of(self.shape.seed, epoch, "shards")
        return [self.urls[i] for i in torch.randperm(len(self.urls), generator=generator)[slot :: self.slots].tolist()]


class _Stream(IterableDataset):
    """What one worker gives: batches of its slot, with its number and its position after each.

    The batch of step `start` is the turn of worker `start` % workers, so that the first process of a DataLoader, whose
    turn comes first, stands in for that one.
    """

    def __init__(self, source: ShardSource, first: int, positions: dict[int, tuple[int, ...]]):
        super().__init__()
        self.source, self.first, self.positions = source, first, positions

    def __iter__(self) -> Iterator[Batch]:
        info, source = get_worker_info(), self.source
        workers = 1 if info is None else info.num_workers
        number = ((0 if info is None else info.id) + self.first) % workers
        slot = source.share.rank * workers + number
        stands = Position(*self.positions.get(number, ()))
        pairs: list[tuple[Tensor, str]] = []
        broken = 0
        for sample, position in _samples(source, slot, stands):
            pair = None if sample is None else _decode(source, sample, slot, position)
            broken += pair is None
            pairs += [] if pair is None else [pair]
            if broken > MOST_BROKEN + 10 * len(pairs):
                raise ValueError(
                    f"path must name shards of images with texts, {broken} in a row of {source.data.path} are none"
                )
            if len(pairs) == sum(source.counts):
                yield batch_of(pairs, source.counts, broken, (number, position))
                pairs, broken = [], 0


def _samples(source: ShardSource, slot: int, position: Position) -> Iterator[tuple[Sample | None, Position]]:
    """The samples of a slot from a position on, each with the position after it; None where a shard was cut short."""
    given = position.given
    for start, block in _blocks(source, slot, position):
        generator = generator_of(source.shape.seed, slot, *start)
        order = torch.randperm(len(block), generator=generator).tolist()
        for place in range(given, len(block)):
            yield block[order[place]], start._replace(given=place + 1)
        given = 0


def _blocks(source: ShardSource, slot: int, position: Position) -> Iterator[tuple[Position, list[Sample | None]]]:
    """Blocks of samples as they lie, each with where it starts; an epoch ends its last one."""
    block: list[Sample | None] = []
    start = position._replace(given=0)
    for sample, here in _in_order(source, slot, start):
        if len(block) == source.data.shuffle or (block and here.epoch != start.epoch):
            yield start, block
            block = []
        start = start if block else here
        block.append(sample)


def _in_order(source: ShardSource, slot: int, start: Position) -> Iterator[tuple[Sample | None, Position]]:
    """The samples of a slot as they lie in its shards, epoch after epoch, each with its place."""
    epoch, first_shard, first_sample = start[:3]
    while True:
        found = 0
        for shard, url in enumerate(source.order(epoch, slot)):
            if shard < first_shard:
                continue
            for sample, content in enumerate(_shard(url)):
                found += content is not None
                if sample >= first_sample:
                    yield content, Position(epoch, shard, sample)
            first_sample = 0
        if not found and not first_shard:
            raise ValueError(f"path must name shards that hold samples, got none in {source.order(epoch, slot)}")
        epoch, first_shard = epoch + 1, 0


def _shard(url: str) -> Iterator[Sample | None]:
    """The samples of one tar file; None where it cannot be read further.

    webdataset's reader of streams never ends on some damaged files: what lies on a disk is read by its own offsets.
    """
    webdataset = require("webdataset.tariterators", "train")
    errors: list[Exception] = []

    def go_on(error: Exception) -> bool:
        errors.append(error)
        return True

    if os.path.isfile(url):
        yield from webdataset.group_by_keys(_until_damaged(_files(url), errors), handler=go_on)
    else:
        yield from webdataset.tarfile_samples([{"url": url}], handler=go_on)
    if errors:
        warnings.warn(f"skipped the rest of {url}: {errors[0]}", stacklevel=2)
        yield None


def _until_damaged(files: Iterator[Sample], errors: list[Exception]) -> Iterator[Sample]:
    """The files up to an error, which is noted: what came before it makes samples."""
    try:
        yield from files
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        errors.append(error)


def _files(path: str) -> Iterator[dict[str, Any]]:
    """The plain files of a tar file, as webdataset groups them to samples; its own notes, __name__, are left out."""
    with _open_tar(path) as archive:
        end = Path(path).stat().st_size if type(archive.fileobj) is io.BufferedReader else None
        for member in walk(archive, end):
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                if end is not None and member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} is cut short")
                content: Any = archive.extractfile(member)
                yield {"fname": member.name, "data": content.read(), "__url__": path}


def _open_tar(path: str) -> tarfile.TarFile:
    try:
        return open_shard(path)
    except tarfile.ReadError:
        return open_shard(path, "r:*")  # compressed


def _decode(source: ShardSource, sample: Sample, slot: int, position: Position) -> tuple[Tensor, str] | None:
    """Image and caption of a sample; None, with a warning, where one is missing or broken."""
    data = source.data
    with seeded(hash_seed(source.shape.seed, slot, *position)):
        try:
            image = next((sample[key] for key in data.image_key if key in sample), None)
            text = _text(sample, data.text_key)
            if image is None or not text:
                raise ValueError(f"no image ({', '.join(data.image_key)}) or no text ({data.text_key})")
            return source.reader(image), text
        except (ValueError, OSError) as error:
            warnings.warn(f"skipped {sample['__key__']} in {sample['__url__']}: {error}", stacklevel=2)
            return None


def _text(sample: Sample, key: str) -> str:
    suffix, _, field = key.partition(":")
    content = sample.get(suffix, b"").decode()
    if not field or not content:
        return content.strip()
    found = json.loads(content)
    return str(found.get(field) or "").strip() if isinstance(found, dict) else ""
