"""The conditioning experiment on OpenMoji names and digits: what is scored, and its part of the report.

Training draws tasks of names from the colour pictures of the training names, and handwritten digits. Scored are names
that training never saw (each has one colour picture), digits of other hands, and what was shifted: line drawings, a
style that training never saw, corruptions, skin tones. Every score is a share of right answers; beside each stands that
of guessing.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from hyperclip_fast.bench.conditioning.scores import SET_SIZES, Scores, mean
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.openmoji import line_drawings
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.evaluation.corruptions import CORRUPTIONS, corrupt
from hyperclip_fast.evaluation.eval_sets import EvalSet
from hyperclip_fast.evaluation.swapping import ROW_SOURCES, class_scores
from hyperclip_fast.evaluation.zero_shot import metrics
from hyperclip_fast.hyperclip import HyperCLIP

SETS, PICTURE_SIZE = ("openmoji", "digits"), 64
PARTITIONS = 5  # of the held-out names into tasks; odd, so that "wrong" names are those of another group
SEVERITY = 3
DIGITS = "digits"  # the group of the digits, and the name of their task


@dataclass(frozen=True)
class NameData:
    """Pictures of a run on names.

    Args:
        pictures: colour pictures and digits; training takes those that are not held out.
        drawings: line drawings, of the same names.
        tones: hands in five skin tones.
    """

    pictures: Pictures
    drawings: Pictures
    tones: EvalSet

    @classmethod
    def make(cls, pictures: Pictures, tones: EvalSet) -> "NameData":
        """Part what `load_pictures` gave into colour pictures with digits, and line drawings."""
        drawn = line_drawings(pictures.labels) & ~_is_digit(pictures)
        return cls(pictures.subset(~drawn), pictures.subset(drawn), tones)

    @property
    def openmoji(self) -> Pictures:
        """The colour pictures without the digits."""
        return self.pictures.subset(~_is_digit(self.pictures))


def _is_digit(pictures: Pictures) -> torch.Tensor:
    return torch.tensor([group == DIGITS for group in pictures.groups])[pictures.labels]


def held_out_scores(model: HyperCLIP, data: NameData) -> Scores:
    """Accuracy by task of held-out names with the right rows, one partition; the model is left in eval mode."""
    model.eval()
    return task_accuracies(model, held_out_tasks(data.openmoji))


@torch.inference_mode()
def name_scores(model: HyperCLIP, data: NameData) -> dict:
    """Every figure of a run on names; the model is left in eval mode.

    Returns:
        right, and for a model with a hypernetwork base, wrong, shuffled, generic: accuracy by task of held-out names,
        averaged over PARTITIONS; digits: by row; drawings: by task; corrupted: by corruption; tones: by skin tone;
        by_names: by number of names; all but the first two with right rows. chance: what guessing gives of each.
        held_out: the number of held-out names.
    """
    model.eval()
    openmoji, tasks = data.openmoji, partitions(data.pictures)
    rows = ROW_SOURCES if model.hypernetwork is not None else ("right",)
    found = {row: task_accuracies(model, tasks, row) for row in rows}
    guessing = _guessing(tasks)
    drawings, tones = partitions(data.drawings), data.tones
    shares = metrics(class_scores(model, tones.tasks), tones.tasks, tones.groups)
    return {
        **{row: {name: value for name, value in found[row].items() if name != DIGITS} for row in rows},
        DIGITS: {row: found[row][DIGITS] for row in rows},
        "drawings": task_accuracies(model, drawings),
        "corrupted": {name: mean(task_accuracies(model, partitions(openmoji), change=name)) for name in CORRUPTIONS},
        "tones": shares["group_acc1"],
        "by_names": {str(k): value for k in SET_SIZES if (value := by_names(model, openmoji, k)) is not None},
        "chance": {
            "right": {name: value for name, value in guessing.items() if name != DIGITS},
            DIGITS: guessing[DIGITS],
            "drawings": mean(_guessing(drawings)),
            "tones": mean(_guessing(tones.tasks)),
        },
        "held_out": int(openmoji.held_out.sum()),
    }


def partitions(pictures: Pictures) -> list[EvalTask]:
    """PARTITIONS times the held-out names in tasks of one group; a task has the same name in every partition."""
    return [task for seed in range(PARTITIONS) for task in held_out_tasks(pictures, seed=seed)]


def task_accuracies(model: HyperCLIP, tasks: Sequence[EvalTask], row: str = "right", change: str = "") -> Scores:
    """Accuracy by task name, the mean over tasks of one name.

    Args:
        model: in eval mode.
        tasks: what to classify.
        row: one of evaluation.ROW_SOURCES.
        change: one of CORRUPTIONS, at SEVERITY; empty: none.
    """
    scores = class_scores(model, tasks, row, change=partial(_corrupt, change) if change else None)
    found: dict[str, list[float]] = {}
    for task, score in zip(tasks, scores, strict=True):
        found.setdefault(task.name, []).append(float((score.argmax(1) == task.labels).double().mean()))
    return {name: statistics.mean(shares) for name, shares in found.items()}


def _guessing(tasks: Sequence[EvalTask]) -> Scores:
    return {task.name: 1 / len(task.class_names) for task in tasks}


def _corrupt(name: str, images: torch.Tensor, first: int) -> torch.Tensor:
    return corrupt(images, name, SEVERITY, first)


def sized_tasks(pictures: Pictures, size: int, seed: int = 0) -> list[EvalTask]:
    """Held-out names of all groups in tasks of exactly `size` names, as many as there are; the rest is left out."""
    ids = pictures.labels[pictures.held_out].unique()
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    kept = ids[order[: len(ids) // size * size]]
    part = pictures.subset(pictures.held_out & torch.isin(pictures.labels, kept))
    return held_out_tasks(replace(part, groups=("all",) * len(part.names)), size, size, seed)


def by_names(model: HyperCLIP, pictures: Pictures, size: int) -> float | None:
    """Accuracy among `size` held-out names, right rows, averaged over PARTITIONS; None where there are fewer names."""
    tasks = [task for seed in range(PARTITIONS) for task in sized_tasks(pictures, size, seed)]
    return mean(task_accuracies(model, tasks)) if tasks else None
