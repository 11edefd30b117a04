"""Launching: the kernel that Triton would take, at a fraction of its host time. Launches do nothing here."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow  # a process of its own


@pytest.fixture(scope="module")
def found():
    """What host_time.py found, in a process in which Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.host_time"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_kernel_is_tritons_own_choice(found):
    """By dtype, alignment, strides and what is left out; with the arguments in the kernel's order."""
    assert found["wrong"] == []


def test_a_hook_hears_every_launch(found):
    assert found["heard"] == 3


def test_launches_of_a_forward_and_of_a_training_step(found):
    """12 blocks of two norms, and the final one: a launch each forward; a pass and a sum by task each backward."""
    assert found["launches"] == {"forward": 25, "training": 75}


def test_host_time_is_near_stock_timms(found):
    assert found["forward"] <= 1.5 and found["training"] <= 1.6, found
