"""The experiment's logs, grouped and summarised over seeds."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hyperclip_fast.bench.conditioning.scores import mean

Log = dict[str, Any]


Table = list[list[str]]


Groups = dict[str, dict[str, dict[int, Log]]]  # by group, arm and seed


DESCRIPTIONS = {
    "baseline": "SigLIP, no hypernetwork",
    "cross": "HyperCLIP, cross-attention read-out",
    "mean": "HyperCLIP, the paper's mean read-out",
    "learned": "control: learned tokens in place of the names",
    "wide": "control: baseline with as many parameters",
    "norms": "rival: baseline's norms tuned for each attribute",
    "lora": "rival: LoRA on the baseline for each attribute",
    "adapters": "rival: bottleneck adapters on the baseline for each attribute",
}


def read_logs(folder: str | Path) -> list[Log]:
    """The logs of finished runs: what the run is, its lines, and its last line's scores.

    Raises:
        ValueError: for a folder without logs.
    """
    logs = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        first, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        logs.append({**first, "lines": lines[:-1], "last": lines[-1], "scores": lines[-1]["scores"]})
    if not logs:
        raise ValueError(f"results must be a folder with logs, {folder} has none")
    return logs


def grouped(logs: Iterable[Log]) -> Groups:
    """Logs by group, arm and seed; groups of more runs first."""
    groups: Groups = defaultdict(lambda: defaultdict(dict))
    for log in logs:
        groups[log["group"]][log["arm"]][log["seed"]] = log
    order = {arm: i for i, arm in enumerate(DESCRIPTIONS)}
    return {
        group: dict(sorted(arms.items(), key=lambda item: order.get(item[0], len(order))))
        for group, arms in sorted(groups.items(), key=lambda item: -sum(map(len, item[1].values())))
    }


def values(arm: dict[int, Log], row: str = "right", attribute: str | None = None) -> dict[int, float]:
    """By seed: percentage points of an arm, averaged over attributes or of one; empty where it has no such row."""
    found = {seed: log["scores"][row] for seed, log in arm.items() if row in log["scores"]}
    return {seed: 100 * (mean(scores) if attribute is None else scores[attribute]) for seed, scores in found.items()}


def gains(arm: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences of the seeds that both have."""
    return [arm[seed] - other[seed] for seed in sorted(arm.keys() & other.keys())]


def spread(numbers: Sequence[float], sign: str = "") -> str:
    """ "mean ± standard deviation (least to greatest)"; a single number stands alone."""
    if not numbers:
        return ""
    ends = f" ({min(numbers):{sign}.1f} to {max(numbers):{sign}.1f})" if len(numbers) > 1 else ""
    return around(numbers, sign) + ends


def around(numbers: Sequence[float], sign: str = "") -> str:
    """ "mean ± standard deviation"; a single number stands alone."""
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):{sign}.1f}{deviation}"


def markdown(table: Table) -> str:
    """A Markdown table whose first line is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def verdict(numbers: Sequence[float], what: str) -> str:
    """One sentence on paired differences: what they are, and whether all seeds agree in sign."""
    if not numbers:
        return ""
    signs = {(number > 1e-6) - (number < -1e-6) for number in numbers}
    agree = f"all {len(numbers)} seeds agree in sign" if len(signs) == 1 else "the seeds disagree in sign"
    agree = "no difference in any seed" if signs == {0} else agree
    agree = "one seed only: no statement" if len(numbers) == 1 else agree
    return f"- {what}: {spread(numbers, '+')} points; {agree}."


def first_of(arms: dict[str, dict[int, Log]]) -> Log:
    """A log of the group's first arm."""
    return next(iter(next(iter(arms.values())).values()))
