"""A real `hyperclip serve` process with a tiny model, for tests."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = """
import sys, time, pytest
import hyperclip_fast.batching as batching
from tests.towers import patch_text_tower
from hyperclip_fast.cli import main

real, slow = batching.classify_mixed, float(sys.argv[1])
batching.classify_mixed = lambda *args: time.sleep(slow) or real(*args)
patch_text_tower(pytest.MonkeyPatch())
sys.exit(main(sys.argv[2:]))
"""


@contextlib.contextmanager
def serving(model: str, bank: Path, *options: str, slow: float = 0.0):
    """The process and its address; the process is ended where the test has not.

    Args:
        model: a folder.
        bank: the file of tasks.
        options: more arguments of `hyperclip serve`.
        slow: seconds that each batch takes longer.
    """
    arguments = ["serve", "--model", model, "--bank", str(bank), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(slow), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)
    reader.start()
    try:
        first = process.stdout.readline()
        process.address = re.search(r"http://\S+", first).group() if first else None
        process.log = log
        yield process
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
