"""Where the Triton kernels of this test run execute; decided before triton is imported.

A GPU if there is one; else Triton's interpreter. With the optional proof tools on PYTHONPATH, HYPERCLIP_PTXSIM=sm_80
(or sm_90) runs the compiled kernels on a PTX simulator, and HYPERCLIP_GUARD=1 the interpreter under a guard against
races and wild memory accesses.
"""

import gc
import os

import hypothesis
import pytest
import torch

from tests.helpers import MODE, set_mode_environment

set_mode_environment()

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=8)
hypothesis.settings.register_profile("explore", deadline=None, derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPERCLIP_HYPOTHESIS", "ci"))


def pytest_report_header(config):
    return f"triton kernels: {MODE}; torch {torch.__version__}"


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Slow tests come first, so that no process is left with one at the end; `quick` is a case of every other test."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    quick = {item.nodeid.partition("[")[0]: item for item in reversed(items) if "slow" not in item.keywords}
    for item in quick.values():
        item.add_marker("quick")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish(session):
    """Tracing makes many objects: for every few hundred the collector would go through those of all imports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def triton_backend():
    """Every operation runs its Triton kernel, CPU tensors included."""
    from hyperclip_fast import set_backend

    set_backend("triton")
    yield
    set_backend("auto")
