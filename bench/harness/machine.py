"""The machine that is measured on: what it is, what it can copy and multiply, and what a call allocates."""

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hyperclip_fast
from hyperclip_fast.utils.timing import wall_seconds


def default_device() -> str:
    """The GPU if PyTorch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None for an installed package."""
    root = Path(hyperclip_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What a reader must know to judge the figures: device, versions, threads, allocator, and the two roofs."""
    packages = ("torch", "triton", "timm", "onnxruntime", "liger-kernel")
    environment = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_") or key == "LD_PRELOAD"}
    return {
        "device": device_name(device),
        "type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "versions": {
            "hyperclip_fast": hyperclip_fast.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in packages if _version(name)},
            **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
            **({"hip": torch.version.hip} if torch.version.hip else {}),
        },
        "allocator": environment,
        "copy_bytes_per_second": copy_rate(device),
        "product_flops_per_second": product_rate(device, dtype),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    size = 2**28 if device.type == "cpu" else 2**30
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large square product."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _median_seconds(lambda: a @ a)


def _median_seconds(function: Callable[[], object], repeats: int = 7) -> float:
    function()
    return statistics.median(wall_seconds(function) for _ in range(repeats))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that PyTorch holds at the height of a call, above what it held before; None where it does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        function()
    steps = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(steps, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ library greets on file descriptor 2, whatever its log level."""
    copy = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(copy, 2)
        os.close(copy)
