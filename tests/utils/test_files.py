"""Files and folders: the old ones whole or the new ones, whatever happens on the way."""

import errno
import itertools
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from hyperclip_fast.utils import files
from hyperclip_fast.utils.files import remove_unfinished, write_file, written_file, written_folder

KILLED = 9


def write(out, text):
    write_file(out / "file", text)
    with written_folder(out / "folder", replace=True) as beside:
        for part in ("a", "b"):
            (beside / part).write_text(text)


def read(path):
    """What a file, or the files a and b of a folder, hold."""
    if path.is_file():
        return {path.read_text()}
    assert sorted(os.listdir(path)) == ["a", "b"]
    return {part.read_text() for part in path.iterdir()}


@pytest.fixture(params=["swap", "two renames"])
def is_swapped(request, monkeypatch):
    """A folder takes another one's place in one step; or in two, as where the system has no such step."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_swap", lambda one, other: False)
    return request.param == "swap" and sys.platform == "linux"


def test_a_file_is_written_whole_and_read_as_others_are(tmp_path):
    write_file(tmp_path / "a.txt", "größer")
    assert (tmp_path / "a.txt").read_bytes() == "größer".encode()
    (tmp_path / "b.txt").write_text("")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode
    with written_file(tmp_path / "c.onnx") as beside:
        assert beside.suffix == ".onnx" and beside.parent == tmp_path
        beside.write_text("c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "c.onnx"]


def test_a_failure_leaves_the_old_ones(tmp_path):
    write_file(tmp_path / "file", "old")
    with written_folder(tmp_path / "folder") as beside:
        (beside / "part").write_text("old")
    with pytest.raises(OSError, match="disk"), written_file(tmp_path / "file") as beside:
        beside.write_text("half")
        raise OSError("disk")
    with pytest.raises(OSError, match="disk"), written_folder(tmp_path / "folder", replace=True) as beside:
        (beside / "part").write_text("half")
        raise OSError("disk")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "part").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_with_files_is_replaced_only_where_that_is_asked(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"folder must be a new or an empty folder, got .*{name}"):  # noqa: SIM117
            with written_folder(tmp_path / name, "folder"):
                pytest.fail("it was begun")
    with written_folder(tmp_path / "full", replace=True) as beside:
        (beside / "new").write_text("new")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["new"]
    (tmp_path / "empty").mkdir()
    with written_folder(tmp_path / "empty") as beside, written_folder(tmp_path / "deep" / "er") as deeper:
        (beside / "a").write_text("a")
        (deeper / "a").write_text("a")
    assert (tmp_path / "empty" / "a").exists() and (tmp_path / "deep" / "er" / "a").exists()


def test_threads_do_not_meet(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_file(tmp_path / "file", str(i % 10) * 100_000), range(200)))
    content = (tmp_path / "file").read_text()
    assert len(content) == 100_000 and len(set(content)) == 1 and len(list(tmp_path.iterdir())) == 1


def write_and_die(out, moment):
    """The status of a process that writes, and is killed before the so many-th thing that it asks of the system."""
    if (child := os.fork()) == 0:
        try:
            left = itertools.count(moment, -1)
            sys.addaudithook(lambda event, args: None if next(left) else os._exit(KILLED))
            write(out, "new")
            os._exit(0)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_killed_at_any_moment_leaves_whole_ones(tmp_path, is_swapped):
    """It dies before the first, the second, ... thing that it asks of the system, until it comes to its end."""
    moment, missing, status = 0, 0, KILLED
    while status == KILLED:
        write(tmp_path, "old")
        status = write_and_die(tmp_path, moment)
        assert status in (0, KILLED) and read(tmp_path / "file") in ({"old"}, {"new"})
        if (tmp_path / "folder").exists():
            assert read(tmp_path / "folder") in ({"old"}, {"new"})
        else:
            missing += 1
        remove_unfinished(tmp_path)
        assert set(os.listdir(tmp_path)) <= {"file", "folder"}
        moment += 1
    assert moment > 10 and read(tmp_path / "file") == read(tmp_path / "folder") == {"new"}
    assert not missing if is_swapped else missing  # between two renames there is no folder


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=repr)
def test_an_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, error):
    write(tmp_path, "old")
    real = os.replace

    def failing(one, other):
        if other == tmp_path / "folder" and (one / "a").read_text() == "new":
            raise error
        real(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_swap", lambda one, other: False)
        patch.setattr(os, "replace", failing)
        with pytest.raises(type(error)):
            write(tmp_path, "new")
    assert read(tmp_path / "folder") == {"old"} and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_that_is_filled_meanwhile_is_left(tmp_path):
    with pytest.raises(ValueError, match="out must be a new or an empty folder"), written_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask_whatever_the_writer_does(tmp_path, umask):
    """safetensors' own writer makes a file that only its owner may read, as mkstemp does."""
    before = os.umask(umask)
    try:
        with written_file(tmp_path / "file") as beside:
            beside.unlink()
            save_file({"a": torch.zeros(1)}, beside)
            assert stat.S_IMODE(beside.stat().st_mode) == 0o600
        with written_folder(tmp_path / "folder") as beside:
            (beside / "deep").mkdir()
            save_file({"a": torch.zeros(1)}, beside / "deep" / "file")
        (tmp_path / "plain").touch()
        (tmp_path / "plain folder").mkdir()
    finally:
        os.umask(before)
    for one, other in (("file", "plain"), ("folder/deep/file", "plain"), ("folder", "plain folder")):
        assert (tmp_path / one).stat().st_mode == (tmp_path / other).stat().st_mode


def test_a_link_is_followed(tmp_path):
    write(tmp_path, "old")
    (tmp_path / "links").mkdir()
    for name in ("file", "folder"):
        (tmp_path / "links" / name).symlink_to(tmp_path / name)
    write(tmp_path / "links", "new")
    assert read(tmp_path / "file") == read(tmp_path / "folder") == {"new"}
    assert all(path.is_symlink() for path in (tmp_path / "links").iterdir())


def test_names_may_be_as_long_as_the_system_has_them(tmp_path):
    write_file(tmp_path / ("a" * 250 + ".json"), "{}")
    with written_folder(tmp_path / ("b" * 255)):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_name_what_was_asked_for(tmp_path, monkeypatch):
    missing = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError, match=f"directory: '{missing}'$"):
        write_file(missing, "")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match=f"directory: '{tmp_path / 'taken'}'$"):
        write_file(tmp_path / "taken", "")
    with pytest.raises(FileNotFoundError, match=f"directory: '{tmp_path / 'out' / 'deep' / 'part'}'$"):  # noqa: SIM117
        with written_folder(tmp_path / "out") as beside:
            (beside / "deep" / "part").write_text("")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", mock.Mock(side_effect=full))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'"):
        write_file(tmp_path / "file", "")
    assert os.listdir(tmp_path) == ["taken"]
