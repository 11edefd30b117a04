"""What conditioning gains against the size of the encoder: cross over the baseline of the same width, from the logs.

A pair is two logs of the same encoder, schedule and seed, whatever their groups: the control `wide` of one group is the
baseline of another whose encoder has its width. Logs without a partner are left out.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from hyperclip_fast.bench.conditioning.logs import Groups, Log, Table, around, gains, spread, values
from hyperclip_fast.training.config import TrainConfig

ENCODER = ("image_tower", "img_size", "patch_size", "width", "depth", "num_heads", "global_pool", "embed_dim")
BASELINES = ("baseline", "wide")
FAMILIES = {"vit_": "ViT", "mobilenetv3_small_": "MobileNetV3-Small"}
MARKERS = {"ViT": ("#0969da", "o"), "MobileNetV3-Small": ("#bc4c00", "s")}


@dataclass
class Width:
    """One encoder with a schedule: its logs by seed, of `cross` and of a baseline."""

    family: str
    encoder: str
    parameters: int
    steps: int
    cross: dict[int, Log] = field(default_factory=dict)
    baseline: dict[int, Log] = field(default_factory=dict)

    @property
    def gains(self) -> list[float]:
        """Points of recall of cross over the baseline, of the seeds that both have."""
        return gains(values(self.cross), values(self.baseline))


def schedule(model: dict[str, Any], train: dict[str, Any]) -> str:
    """What two runs must share to be a pair, their seed aside: encoder and training, as their logs or configs say.

    A log that is older than a setting of training has its default.
    """
    return json.dumps([[model[key] for key in ENCODER], {**asdict(TrainConfig()), **train, "seed": 0}], sort_keys=True)


def widths(groups: Groups) -> list[Width]:
    """Encoders with at least one pair, by family, then parameters."""
    found: dict[str, Width] = {}
    logs = [log for arms in groups.values() for runs in arms.values() for log in runs.values()]
    for log in logs:
        if log["arm"] in ("cross", *BASELINES):
            one = found.setdefault(schedule(log["model"], log["train"]), _width(log))
            (one.cross if log["arm"] == "cross" else one.baseline)[log["seed"]] = log
    return sorted((one for one in found.values() if one.gains), key=lambda one: (one.family, one.parameters))


def _width(log: Log) -> Width:
    tower, width = log["model"]["image_tower"], log["model"]["width"]
    family = next((family for prefix, family in FAMILIES.items() if tower.startswith(prefix)), tower)
    encoder = f"{tower}, width {width}" if width else tower
    return Width(family, encoder, log["image_parameters"], log["train"]["steps"])


def width_table(found: Iterable[Width]) -> Table:
    """Recall of both arms on the seeds that both have, and the gain, paired by seed."""
    table = [["encoder", "image parameters", "steps", "baseline", "cross", "gain", "seeds"]]
    for one in found:
        seeds = sorted(one.cross.keys() & one.baseline.keys())
        right = [[values(arm)[seed] for seed in seeds] for arm in (one.baseline, one.cross)]
        cells = [around(numbers) for numbers in right]
        count = str(len(seeds)) if len(seeds) > 1 else "1: no spread"
        table.append([one.encoder, f"{one.parameters:,}", f"{one.steps:,}", *cells, spread(one.gains, "+"), count])
    return table


def draw_widths(axis: Any, found: Iterable[Width]) -> None:
    """The gain over parameters: a line a family through the means, ± one standard deviation, a dot for each seed.

    A single seed has an open marker and no spread.
    """
    families = defaultdict(list)
    for one in found:
        families[one.family].append(one)
    ticks = {one.parameters: f"{one.parameters / 1e3:,.0f} k" for line in families.values() for one in line}
    for family, line in families.items():
        colour, marker = MARKERS.get(family, ("black", "^"))
        at, means = [one.parameters for one in line], [statistics.mean(one.gains) for one in line]
        errors = [statistics.stdev(one.gains) if len(one.gains) > 1 else 0.0 for one in line]
        axis.errorbar(at, means, errors, capsize=4, color=colour, label=family)
        for one, middle in zip(line, means):
            single = len(one.gains) == 1
            axis.plot(one.parameters, middle, marker, ms=7, color=colour, mfc="white" if single else colour)
            axis.plot([one.parameters] * len(one.gains), one.gains, ".", color=colour, alpha=0.45)
            side = (one.parameters, middle), (8, 4)
            name = one.encoder.split(", ")[-1].removeprefix("mobilenetv3_small_")
            axis.annotate(name, *side, textcoords="offset points", fontsize=7, color=colour)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xscale("log")
    axis.set_xticks(list(ticks), list(ticks.values()), rotation=30)
    axis.minorticks_off()
    axis.margins(x=0.25, y=0.1)
    axis.set(xlabel="parameters of the image encoder", ylabel="cross over the baseline, points of recall")
    axis.set_title("gain against width: mean ± standard deviation, seeds", fontsize=9)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
