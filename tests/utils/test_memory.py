"""keep_freed_memory: large tensors that come and go do not fault their pages anew."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from hyperclip_fast.utils.memory import keep_freed_memory
assert not {keep} or keep_freed_memory()
def touch(): torch.ones(16 << 20)  # 64 MiB: 16,384 pages
for _ in range(16): touch()  # the heap grows for some rounds
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8): touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is glibc's")
def test_large_blocks_are_kept():
    run = [sys.executable, "-c"]
    kept, usual = (
        int(subprocess.run([*run, FAULTS.format(keep=keep)], capture_output=True, text=True, check=True).stdout)
        for keep in (True, False)
    )
    assert kept < usual / 10, (kept, usual)
