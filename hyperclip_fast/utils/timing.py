"""Fair timings on a noisy machine: the candidates take turns, and what is compared was measured side by side."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import trange

MIN_ROUNDS = 5


def wall_seconds(function: Callable[[], object]) -> float:
    """Seconds of one call, everything that it starts on an accelerator included."""
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class ColdClock:
    """Seconds of a call on a CUDA or ROCm device alone, its caches cold.

    A large buffer is cleared before each call. That empties the L2 cache, and takes longer than Python takes to launch
    what follows, so that the events around the call see the device's time and no waiting for Python.

    Args:
        device: a CUDA or ROCm device.
    """

    def __init__(self, device: torch.device):
        size = min(2**30, torch.cuda.get_device_properties(device).total_memory // 16)
        self.buffer = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.buffer.device)
        self.buffer.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def interleaved(
    candidates: dict[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 2,
    progress: bool = False,
    seconds: float = math.inf,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns, every other round in reverse order.

    Args:
        candidates: functions by name.
        repeats: timed calls of each.
        warmup: calls of each before the first that counts.
        progress: show a bar.
        seconds: begin no further round after this long, once there are five.
        clock: calls a function and returns its seconds.

    Returns:
        As many times in seconds by name, in the order of the rounds.
    """
    for _ in range(warmup):
        for function in candidates.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = trange(repeats, desc="timing", unit="round", disable=None if progress else True)
    begin = time.perf_counter()
    for i in rounds:
        if i >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for name in reversed(candidates) if i % 2 else candidates:
            times[name].append(clock(candidates[name]))
    return times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds by name."""
    return {name: statistics.median(values) for name, values in times.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of at least one value."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of theirs / ours, round by round: a machine that slows down slows both sides of a round.

    Above 1 we are faster.
    """
    return quartiles([b / a for a, b in zip(ours, theirs)])
