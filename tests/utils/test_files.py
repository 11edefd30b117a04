"""Files and folders: the old ones whole or the new ones, whatever happens on the way."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hyperclip_fast.utils.files import UNFINISHED, remove_unfinished, write_file, written_file, written_folder

KILLED = """
import sys
from pathlib import Path
from hyperclip_fast.utils.files import write_file, written_folder
out = Path(sys.argv[1])
for i in range(10**9):
    write_file(out / "file", str(i) * 50_000)
    with written_folder(out / "folder", replace=True) as beside:
        for part in ("a", "b"):
            (beside / part).write_text(str(i))
"""


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


@pytest.mark.parametrize("seed", range(4))
def test_a_process_killed_at_any_moment_leaves_whole_ones(tmp_path, seed):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)]) as run:
        while not (tmp_path / "folder").exists():
            assert run.poll() is None
            time.sleep(0.02)
        time.sleep(0.05 + 0.037 * seed)
        run.kill()
    content = (tmp_path / "file").read_text()
    number = content[: len(content) // 50_000]
    assert content == number * 50_000
    if (tmp_path / "folder").exists():  # between two renames there is none, and its parts lie beside
        parts = {path.read_text() for path in (tmp_path / "folder").iterdir()}
        assert len(parts) == 1
    remove_unfinished(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(UNFINISHED)]
