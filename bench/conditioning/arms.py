"""The runs of the conditioning experiment, read from bench/conditioning/queue.yaml: groups x arms x seeds, in order.

A group fixes data, encoder and schedule; an arm changes one thing in it (a rival that tunes the trained baseline has
steps of its own); runs of a group and a seed see the same batches. The queue is interleaved by seed: where time ends
early, every arm of a group has as many seeds as another.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hyperclip_fast.hyperclip_config import HyperCLIPConfig, config_from_dict
from hyperclip_fast.training.config import TrainConfig
from hyperclip_fast.utils.typed_config import from_dict

DATA = ("scenes", "names")  # composed scenes; OpenMoji's colour pictures by name, and digits
SECTIONS = {"model", "position_scale", "train", "arms", "groups"}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        group: its group's name.
        arm: its arm's name.
        model: what is trained.
        train: how; `train.seed` is the run's.
        tune: per-task tuning of the group's baseline in place of a training of its own: of conditioning_tuning.METHODS;
            "": none.
        position_scale: of the first position embeddings, over timm's.
        data: what is trained and scored on, one of DATA.
    """

    group: str
    arm: str
    model: HyperCLIPConfig
    train: TrainConfig
    tune: str = ""
    position_scale: float = 1.0
    data: str = "scenes"

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.train.seed

    @property
    def name(self) -> str:
        """Also the name of its log."""
        return f"{self.group}-{self.arm}-{self.seed}"


@dataclass
class GroupConfig:
    """One group of runs.

    Args:
        arms: names of arms, in the order of running.
        seeds: of the runs.
        model: changes to the shared model.
        train: changes to the shared training.
        overrides: by arm: changes to the model for this group only.
        group: to which these runs belong, where it is not the entry's own name.
        data: one of DATA; rivals that tune for each attribute need scenes.
    """

    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    data: str = "scenes"


def load_plan(path: str | Path) -> dict[str, Any]:
    """A file with SECTIONS.

    Raises:
        ValueError: for another file, or a position_scale that is no positive number.
    """
    import yaml

    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML, {path} is not: {error}") from error
    if not isinstance(plan, dict) or set(plan) != SECTIONS:
        raise ValueError(f"config must have the sections {sorted(SECTIONS)}, got {plan if plan else 'nothing'}")
    scale = plan["position_scale"]
    if not isinstance(scale, float) or scale <= 0:
        raise ValueError(f"position_scale must be a positive number with a point, got {scale!r}")
    return plan


def load_runs(path: str | Path) -> list[Run]:
    """All runs of a plan, in the order of running.

    Raises:
        ValueError: as `load_plan`; for an arm that is not described, keys that are no fields, unknown data, or a rival
            that tunes for each attribute where there are none.
    """
    plan = load_plan(path)
    runs = []
    for name, values in plan["groups"].items():
        group = from_dict(GroupConfig, values, f"group {name}")
        if unknown := set(group.arms) - set(plan["arms"]):
            raise ValueError(f"group {name} has unknown arms {sorted(unknown)}, expected some of {list(plan['arms'])}")
        if group.data not in DATA:
            raise ValueError(f"data of group {name} must be one of {DATA}, got {group.data!r}")
        rivals = [arm for arm in group.arms if "tune" in plan["arms"][arm]]
        if rivals and group.data != "scenes":
            raise ValueError(f"arms of group {name} must not tune for attributes with data {group.data}, got {rivals}")
        runs += [_run(plan, group.group or name, group, arm, seed) for seed in group.seeds for arm in group.arms]
    return runs


def _run(plan: dict[str, Any], name: str, group: GroupConfig, arm: str, seed: int) -> Run:
    changes = {**plan["arms"][arm], **group.overrides.get(arm, {})}
    tune, steps = changes.pop("tune", ""), changes.pop("steps", None)
    model = config_from_dict({**plan["model"], **group.model, **changes})
    train = from_dict(TrainConfig, {**plan["train"], **group.train, "seed": seed}, "train")
    train = train if steps is None else replace(train, steps=steps)
    return Run(name, arm, model, train, tune, plan["position_scale"], group.data)
