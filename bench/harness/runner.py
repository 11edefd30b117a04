"""The one runner: build what is compared, refuse what computes wrongly, time the rest in turns.

A case is one comparison: providers that do the same work on the same tensors. A provider is a name (stock, naive, ours,
...) on an engine (eager, compiled, ...); its ratio is to `stock` on the same engine, never across engines.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hyperclip_fast.bench.harness.machine import peak_bytes
from hyperclip_fast.utils.timing import interleaved, quartiles, speedup, wall_seconds

# Bound on the error of a whole result, by dtype: the worst of its rows (samples, or tasks), see `relative_error`.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
MOST_ALLOWED = 0.7  # a result of zeros is off by 1
BASELINE = "stock"
Run = Callable[[], Any]


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


@dataclass
class Provider:
    """Who computes it: `build` returns the function to time, or raises Unavailable."""

    name: str
    engine: str
    build: Callable[[], Run]
    work: dict[str, float] = field(default_factory=dict)  # "bytes" and "flops" of one call, the least possible

    @property
    def key(self) -> str:
        return f"{self.name} {self.engine}"


@dataclass
class Case:
    """One comparison.

    Args:
        labels: what is measured: operation or model, step, sizes, T, mix.
        providers: who is compared.
        check: (provider, run) -> relative error of what it computes, against a float64 reference.
        dtype: of the computation; chooses the tolerance.
        device: where it runs.
        clock: calls a function and returns its seconds.
        slack: how many tolerances are allowed, up to MOST_ALLOWED.
    """

    labels: dict[str, Any]
    providers: list[Provider]
    check: Callable[[Provider, Run], float]
    dtype: torch.dtype
    device: torch.device
    clock: Callable[[Run], float] = wall_seconds
    slack: float = 1.0


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst row's RMS error over the largest row's RMS; rows along the first dimension.

    One wrong row among many would vanish in a mean over all of them.
    """
    if ours.shape != exact.shape:
        raise ValueError(f"ours must have shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
    error = (ours.to(exact.device, exact.dtype) - exact).flatten(1 if exact.dim() > 1 else 0)
    size = exact.flatten(1 if exact.dim() > 1 else 0).square().mean(-1).max().sqrt()
    worst = (error.square().mean(-1).max().sqrt() / size.clamp_min(torch.finfo(exact.dtype).tiny)).item()
    return worst if worst == worst else float("inf")


def run_case(case: Case, seconds: float, repeats: int = 200) -> list[dict[str, Any]]:
    """Measure a case.

    Args:
        case: what to measure.
        seconds: about how long the timed rounds may take together; at least five are made.
        repeats: rounds at most.

    Returns:
        A row a provider: the case's labels, `provider`, `engine`, `status`, and

        - status "ok": `error`, `repeats`, `seconds` and `ratio` (lower quartile, median, upper quartile; ratio is None
          without a baseline on the same engine), `peak_bytes` (None where unknown), and the provider's work;
        - "unavailable", "failed" or "wrong": `reason`. What is wrong is not timed.
    """
    rows, runs = [], {}
    for provider in case.providers:
        row = {**case.labels, "provider": provider.name, "engine": provider.engine}
        run, verdict = _prepare(case, provider)
        rows.append({**row, **verdict})
        if run is not None:
            runs[provider.key] = run
    try:
        times = interleaved(runs, repeats, 1, seconds=seconds, clock=case.clock) if runs else {}
    except torch.OutOfMemoryError as error:
        times, runs = {}, {}
        rows = [_out_of_memory(row, error) if row["status"] == "ok" else row for row in rows]
    for provider, row in zip(case.providers, rows):
        if provider.key in runs:
            row |= _figures(times, provider) | provider.work
            is_private = provider.engine in PRIVATE_MEMORY
            row["peak_bytes"] = None if is_private else peak_bytes(runs[provider.key], case.device)
    return rows


PRIVATE_MEMORY = ("graph", "onnxruntime")  # engines that allocate nothing, or nothing that PyTorch sees, in a call


def _prepare(case: Case, provider: Provider) -> tuple[Run | None, dict[str, Any]]:
    """The function to time and status "ok", or None and why not. Any failure of one provider leaves the others be."""
    try:
        run = provider.build()
        error = case.check(provider, run)
    except Unavailable as reason:
        return None, {"status": "unavailable", "reason": str(reason)}
    except torch.OutOfMemoryError as reason:
        return None, _out_of_memory({}, reason)
    except Exception as reason:  # compilers and foreign libraries raise anything: it is reported, and fails the run
        text = str(reason).strip().partition("\n")[0][:200]
        return None, {"status": "failed", "reason": f"{type(reason).__name__}: {text}"}
    # cuDNN's convolutions are in TF32 unless PyTorch is told otherwise
    allowed = 1e-3 if case.dtype == torch.float32 and case.device.type == "cuda" else TOLERANCE[case.dtype]
    allowed = min(allowed * case.slack, MOST_ALLOWED)
    if error > allowed:
        reason = f"relative error {error:.1e}, allowed {allowed:.0e}"
        return None, {"status": "wrong", "error": error, "reason": reason}
    return run, {"status": "ok", "error": error}


def _out_of_memory(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    return {**row, "status": "unavailable", "reason": "out of memory: " + str(error).partition("\n")[0][:120]}


def _figures(times: dict[str, list[float]], provider: Provider) -> dict[str, Any]:
    mine, base = times[provider.key], times.get(f"{BASELINE} {provider.engine}")
    ratio = None if base is None else speedup(mine, base)
    return {"repeats": len(mine), "seconds": quartiles(mine), "ratio": ratio}
