"""Plots of the conditioning runs: accuracy by arm, the swap test, gain against width, number of names, curves."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyperclip_fast.bench.conditioning.logs import Groups, Log, values
from hyperclip_fast.bench.conditioning.report import SWAPS, by_names, sizes_of
from hyperclip_fast.bench.conditioning.scores import SCENES, guessing, mean
from hyperclip_fast.bench.conditioning.width import draw_widths, widths
from hyperclip_fast.data.scenes import ATTRIBUTES
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import written_file

COLOURS = {"baseline": "#57606a", "cross": "#0969da", "mean": "#54aeff", "learned": "#bc4c00", "wide": "#8250df"}
COLOURS |= {"norms": "#1a7f37", "lora": "#cf222e", "adapters": "#bf8700"}
GUESSING = 100 * statistics.mean(guessing(attribute)[0] for attribute in ATTRIBUTES)


def draw(groups: Groups, folder: str | Path) -> list[str]:
    """Draw what there are figures for; returns the names of the files, <name>.png in `folder`."""
    require("matplotlib", "bench").use("Agg")
    plt = require("matplotlib.pyplot", "bench")
    plots: dict[str, Callable[[Any, Groups], bool]] = {
        "arms": _arms,
        "swap": _swap,
        "width": _width,
        "names": _names,
        "curves": _curves,
    }
    drawn = []
    for name, function in plots.items():
        across = len(groups) if function in PER_GROUP else 1
        figure, axes = plt.subplots(1, across, figsize=(1.5 + 5 * across, 4.2), squeeze=False, sharey=True)
        if function(axes[0], groups):
            figure.tight_layout()
            with written_file(Path(folder) / f"{name}.png") as beside:
                figure.savefig(beside, dpi=110, bbox_inches="tight")
            drawn.append(name)
        plt.close(figure)
    return drawn


def _colour(arm: str) -> str:
    return COLOURS.get(arm, "black")


def _ends(numbers: list[float]) -> tuple[float, list[list[float]]]:
    """Mean, and the distances to the least and the greatest as matplotlib takes them."""
    middle = statistics.mean(numbers)
    return middle, [[middle - min(numbers)], [max(numbers) - middle]]


def _arms(axes: Any, groups: Groups) -> bool:
    for axis, (group, arms) in zip(axes, groups.items()):
        for i, (arm, runs) in enumerate(arms.items()):
            middle, ends = _ends(list(values(runs).values()))
            axis.errorbar(i, middle, ends, fmt="o", color=_colour(arm), capsize=4, ms=7)
            for seed, value in values(runs).items():
                axis.plot(i + 0.15 + 0.05 * seed, value, ".", color=_colour(arm), alpha=0.5)
        axis.axhline(GUESSING, color="black", ls=":", lw=1)
        axis.annotate("guessing", (len(arms) - 0.25, GUESSING), ha="right", va="bottom", fontsize=8)
        axis.set_xticks(range(len(arms)), list(arms), rotation=30)
        axis.set_xlim(-0.6, len(arms) - 0.2)
        axis.set_title(f"{group}: mean, least and greatest over seeds", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("recall on held-out objects' scenes, %")
    return True


def _swap(axes: Any, groups: Groups) -> bool:
    found = False
    for axis, (group, arms) in zip(axes, groups.items()):
        able = {arm: runs for arm, runs in arms.items() if values(runs, "wrong")}
        for i, (arm, runs) in enumerate(able.items()):
            at = 0.8 * (i + 0.5) / len(able) - 0.4
            for j, row in enumerate(SWAPS):
                middle, ends = _ends(list(values(runs, row).values()))
                axis.bar(j + at, middle, 0.75 / len(able), color=_colour(arm))
                axis.errorbar(j + at, middle, ends, color="black", capsize=2, lw=1)
            axis.bar(0, 0, color=_colour(arm), label=arm)
            found = True
        if base := list(values(arms.get("baseline", {})).values()):
            axis.axhline(statistics.mean(base), color=COLOURS["baseline"], ls="--", lw=1, label="baseline")
        axis.axhline(GUESSING, color="black", ls=":", lw=1, label="guessing")
        axis.set_xticks(range(len(SWAPS)), list(SWAPS), rotation=30)
        axis.set_title(f"{group}: where the norm row comes from", fontsize=9)
        axis.legend(fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("recall, %")
    return found


def _width(axes: Any, groups: Groups) -> bool:
    if found := widths(groups):
        draw_widths(axes[0], found)
    return bool(found)


def _names(axes: Any, groups: Groups) -> bool:
    for axis, (group, arms) in zip(axes, groups.items()):
        sizes = sizes_of(arms)
        for arm, runs in arms.items():
            if logs := by_names(runs):
                ratio = [statistics.mean(one.get(str(size), 0.0) * size for one in logs) for size in sizes]
                axis.plot(sizes, ratio, marker="o", label=arm, color=_colour(arm))
        axis.axhline(1, color="black", lw=0.8)
        error = [2 * math.sqrt((size - 1) / SCENES) for size in sizes]
        low, high = [1 - one for one in error], [1 + one for one in error]
        axis.fill_between(sizes, low, high, color="black", alpha=0.08, label="guessing, two standard errors", lw=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, sizes)
        axis.set_xlabel("class names")
        axis.set_title(f"{group}: held-out objects", fontsize=9)
        if sizes:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy over guessing's, times")
    return any(sizes_of(arms) for arms in groups.values())


def _curves(axes: Any, groups: Groups) -> bool:
    for axis, (group, arms) in zip(axes, groups.items()):
        for arm, runs in arms.items():
            for key, style in (("held_out", {"marker": "."}), ("accuracy", {"ls": ":", "lw": 1})):
                if line := _line(runs, key):
                    label = arm if key == "accuracy" else None
                    axis.plot(list(line), list(line.values()), color=_colour(arm), label=label, **style)
        axis.set_xlabel("step")
        axis.set_title(f"{group}: training within batches (dotted), held out (solid)", fontsize=9)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    return True


def _line(runs: dict[int, Log], key: str) -> dict[int, float]:
    """By step: the mean over seeds of what the logs hold under `key`, in per cent."""
    found: dict[int, list[float]] = {}
    for log in runs.values():
        for line in log["lines"]:
            if key in line:
                value = line[key] if key == "accuracy" else mean(line[key])
                found.setdefault(line["step"], []).append(100 * value)
    return {step: statistics.mean(numbers) for step, numbers in found.items()}


PER_GROUP = (_arms, _swap, _names, _curves)
