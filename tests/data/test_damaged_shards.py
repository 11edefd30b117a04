"""Shards that were damaged, cut or made to mislead a reader: they end in an error or a warning, and they end."""

import io
import random
import tarfile
import time
import warnings

import pytest

from hyperclip_fast.data.shard_source import _shard
from hyperclip_fast.data.tar_items import members
from tests.image_data import jpeg

SIZES = (b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"\xff" * 9 + b"\xfc\0\0")
KINDS = b"xgLKSV1256"  # extended headers, long names, sparse files, links, devices
SECONDS = 4  # of fuzzing


def shard(samples: int = 4) -> bytearray:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for i in range(samples):
            for suffix, data in (("png", b"p" * 700), ("txt", b"a cat")):
                member = tarfile.TarInfo(f"{'d' * (60 * i + 1)}/{i:03}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return bytearray(content.getvalue())


def damage(content: bytearray, chance: random.Random) -> None:
    """Bytes, sizes and kinds of members, the latter two with a checksum that fits; or the end is cut off."""
    for _ in range(chance.randint(1, 3)):
        header = 512 * chance.randrange(len(content) // 512)
        if (kind := chance.random()) < 0.4:
            content[header + 124 : header + 136] = chance.choice(SIZES)
        elif kind < 0.6:
            content[header + 156] = chance.choice(KINDS)
        else:
            content[chance.randrange(len(content))] = chance.randrange(256)
            continue
        fields = content[header : header + 148] + b" " * 8 + content[header + 156 : header + 512]
        content[header + 148 : header + 156] = b"%06o\0 " % sum(fields)
    if chance.random() < 0.2:
        del content[chance.randrange(len(content)) :]


@pytest.mark.slow
def test_damaged_shards_end(tmp_path):
    """webdataset's own reader went round in one of fifty of these, for ever."""
    path, chance, whole, counts = tmp_path / "a.tar", random.Random(0), shard(), []
    start = time.monotonic()
    while time.monotonic() - start < SECONDS:
        content = bytearray(whole)
        damage(content, chance)
        path.write_bytes(content)
        begin = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            samples = list(_shard(str(path)))
        counts.append(len(samples))
        assert len(samples) <= 10 and (samples.count(None) == 1) == bool(caught)
        assert all(str(path) in str(warning.message) for warning in caught)
        try:
            assert len(members(path)) <= 10
        except ValueError as error:
            assert str(path) in str(error)
        assert time.monotonic() - begin < 20
    assert len(counts) > 50 and {0, 4} & set(counts) and any(0 < count < 4 for count in counts)


@pytest.mark.parametrize("cut", [100, 512, 700])
def test_a_shard_that_ends_inside_is_refused(cut, tmp_path):
    """Inside a header, where tarfile sees an end, and inside a picture."""
    path, content = tmp_path / "a.tar", shard()
    third = 2 * (512 + 1024 + 512 + 512)  # two samples: a header and a picture in two blocks, a header and a text
    path.write_bytes(content[: third + cut])
    if cut == 512:
        path.write_bytes(content[: third + 511])
    with pytest.raises(ValueError, match=r"whole uncompressed .tar files, .*a.tar.*(cut short|empty header)"):
        members(path)
    with pytest.warns(UserWarning, match="skipped the rest of"):
        assert [sample is None for sample in _shard(str(path))] == [False, False, True]  # the two that are whole


def test_a_shard_without_blocks_of_zeros_at_its_end_is_whole(tmp_path):
    path, content = tmp_path / "a.tar", shard()
    path.write_bytes(bytes(content).rstrip(b"\0") + b"\0" * (-len(bytes(content).rstrip(b"\0")) % 512))
    assert len(members(path)) == 4 and len(list(_shard(str(path)))) == 4


def test_compressed_shards_train_and_are_refused_in_place(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (("a.jpg", jpeg(0)), ("a.txt", b"a cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert [sample and sample["txt"] for sample in _shard(str(path))] == [b"a cat"]
    with pytest.raises(ValueError, match="whole uncompressed"):
        members(path)


def test_what_macos_and_jupyter_leave_behind_is_no_picture(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.png", "._a.png", "__MACOSX/a.png", "x/.ipynb_checkpoints/a.png", "b.jfif"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    assert [item.name for item in members(path)] == [f"{path}/a.png", f"{path}/b.jfif"]
