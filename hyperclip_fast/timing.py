"""Fair timings on a noisy machine: the candidates take turns, and medians of one run are compared."""

import statistics
import time
from collections.abc import Callable

import torch

from hyperclip_fast.extras import require


def interleaved(
    candidates: dict[str, Callable[[], object]], repeats: int = 20, warmup: int = 2, progress: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns.

    Args:
        candidates: functions by name; on CUDA each call is synchronised.
        repeats: timed calls of each.
        warmup: calls of each before the first that counts.
        progress: show a bar.

    Returns:
        `repeats` times in seconds by name.
    """
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        for function in candidates.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = require("tqdm", "train").trange(repeats, desc="timing", unit="round") if progress else range(repeats)
    for _ in rounds:
        for name, function in candidates.items():
            sync()
            start = time.perf_counter()
            function()
            sync()
            times[name].append(time.perf_counter() - start)
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds by name."""
    return {name: statistics.median(values) for name, values in times.items()}
