"""A real `hyperclip serve` process with a tiny model, for tests."""

import contextlib
import sys
from pathlib import Path

from hyperclip_fast.bench.serving import address_of, server_process

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = """
import sys, time, pytest
sys.path.insert(0, sys.argv[1])
import hyperclip_fast.batching as batching
from tests.towers import patch_text_tower
from hyperclip_fast.cli import main

real, slow = batching.classify_mixed, float(sys.argv[2])
batching.classify_mixed = lambda *args: time.sleep(slow) or real(*args)
patch_text_tower(pytest.MonkeyPatch())
sys.exit(main(sys.argv[3:]))
"""


@contextlib.contextmanager
def serving(model: str, bank: Path, *options: str, slow: float = 0.0):
    """The process with its address and the file of its messages; it is stopped where the test has not.

    Args:
        model: a folder.
        bank: the file of tasks; messages go beside it.
        options: more arguments of `hyperclip serve`.
        slow: seconds that each batch takes longer.
    """
    log = bank.with_suffix(".log")
    command = (sys.executable, "-c", LAUNCH, str(ROOT), str(slow))
    arguments = ["--model", model, "--bank", str(bank), "--threads", "1", *options]
    with log.open("w") as file, server_process(arguments, command, file) as process:
        process.address, process.log = address_of(process), log
        yield process
