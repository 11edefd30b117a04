"""The conditioning experiment on OpenMoji names and digits: what is scored, and its part of the report.

Training draws tasks of names from the colour pictures of the training names, and handwritten digits. Scored are names
that training never saw (each has one colour picture), digits of other hands, and what was shifted: line drawings, a
style that training never saw, corruptions, skin tones. Every score is a share of right answers; beside each stands that
of guessing.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from hyperclip_fast.data.held_out import EvalTask, group_of, held_out_tasks
from hyperclip_fast.data.openmoji import line_drawings
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.evaluation.corruptions import CORRUPTIONS, corrupt
from hyperclip_fast.evaluation.eval_sets import EvalSet
from hyperclip_fast.evaluation.swapping import ROWS, class_scores
from hyperclip_fast.evaluation.zero_shot import metrics
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.utils.extras import require

from .conditioning_plots import COLOURS
from .conditioning_report import DESCRIPTIONS, Log, Table, around, first_of, gains, markdown, spread, values, verdict
from .conditioning_scores import SET_SIZES, Scores, mean

SETS, PICTURE_SIZE = ("openmoji", "digits"), 64
PARTITIONS = 5  # of the held-out names into tasks; odd, so that "wrong" names are those of another group
SEVERITY = 3
DIGITS = "digits"  # the group of the digits, and the name of their task
Arms = dict[str, dict[int, Log]]


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
    rows = ROWS if model.hypernetwork is not None else ("right",)
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
        row: one of evaluation.ROWS.
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


def by_group(scores: Scores) -> Scores:
    """The mean over the tasks of each group."""
    groups = sorted({group_of(task) for task in scores})
    return {group: mean({task: s for task, s in scores.items() if group_of(task) == group}) for group in groups}


def _shares(runs: dict[int, Log], function: Callable[[dict], float]) -> dict[int, float]:
    """By seed: 100 times a function of the scores."""
    return {seed: 100 * function(log["scores"]) for seed, log in runs.items()}


def _cell(runs: dict[int, Log], function: Callable[[dict], float]) -> str:
    """Mean and standard deviation over seeds."""
    return around(list(_shares(runs, function).values()))


SHIFTS = {  # head of a column: (accuracy, guessing), both of a run's scores
    "digits": (lambda s: s[DIGITS]["right"], lambda s: s["chance"][DIGITS]),
    "line drawings": (lambda s: mean(s["drawings"]), lambda s: s["chance"]["drawings"]),
    "corrupted": (lambda s: mean(s["corrupted"]), lambda s: mean(s["chance"]["right"])),
    "worst group": (
        lambda s: min(by_group(s["right"]).values()),
        lambda s: min(by_group(s["chance"]["right"]).values()),
    ),
    "skin tones": (lambda s: mean(s["tones"]), lambda s: s["chance"]["tones"]),
    "worst tone": (lambda s: min(s["tones"].values()), lambda s: s["chance"]["tones"]),
}


def names_arms_table(arms: Arms) -> Table:
    """Held-out names, the gain over the baseline, and the shifts, by arm."""
    base = values(arms.get("baseline", {}))
    table = [["arm", "seeds", "parameters", "held-out names", "over baseline", *SHIFTS]]
    for arm, runs in arms.items():
        own = values(runs)
        gain = "" if arm == "baseline" else spread(gains(own, base), "+")
        cells = [str(len(runs)), f"{next(iter(runs.values()))['parameters']:,}", spread(list(own.values())), gain]
        cells += [_cell(runs, function) for function, _ in SHIFTS.values()]
        table.append([f"{arm}: {DESCRIPTIONS.get(arm, arm)}", *cells])
    scores = first_of(arms)["scores"]
    guess = [f"{100 * guessing(scores):.1f}" for _, guessing in SHIFTS.values()]
    return [*table, ["guessing", "", "", f"{100 * mean(scores['chance']['right']):.1f}", "", *guess]]


def names_swap_table(arms: Arms) -> Table:
    """Each HyperCLIP arm's accuracy by where its row comes from, names and digits."""
    table = [["arm, asked for", *ROWS, "right minus wrong", "right minus shuffled"]]
    for arm, runs in arms.items():
        if not values(runs, "wrong"):
            continue
        names = {row: values(runs, row) for row in ROWS}
        digits = {row: _shares(runs, lambda s, row=row: s[DIGITS][row]) for row in ROWS}
        for what, rows in (("held-out names", names), (DIGITS, digits)):
            cells = [f"{statistics.mean(rows[row].values()):.1f}" for row in ROWS]
            drops = [spread(gains(rows["right"], rows[other]), "+") for other in ("wrong", "shuffled")]
            table.append([f"{arm}, {what}", *cells, *drops])
    return table


def names_groups_table(arms: Arms) -> Table:
    """Accuracy on held-out names by group of names, right rows."""
    chance = by_group(first_of(arms)["scores"]["chance"]["right"])
    table = [["arm", *chance], ["guessing", *(f"{100 * value:.1f}" for value in chance.values())]]
    for arm, runs in arms.items():
        table.append([arm, *(_cell(runs, lambda s, group=group: by_group(s["right"])[group]) for group in chance)])
    return table


def corruptions_table(arms: Arms) -> Table:
    """Accuracy on held-out names by corruption, right rows."""
    chance = 100 * mean(first_of(arms)["scores"]["chance"]["right"])
    table = [["arm", *CORRUPTIONS], ["guessing", *[f"{chance:.1f}"] * len(CORRUPTIONS)]]
    for arm, runs in arms.items():
        table.append([arm, *(_cell(runs, lambda s, name=name: s["corrupted"][name]) for name in CORRUPTIONS)])
    return table


def numbers_table(arms: Arms) -> Table:
    """Accuracy among more and more held-out names of all groups, right rows."""
    sizes = list(first_of(arms)["scores"]["by_names"])
    table = [["arm", *(f"{size} names" for size in sizes)], ["guessing", *(f"{100 / int(size):.1f}" for size in sizes)]]
    for arm, runs in arms.items():
        table.append([arm, *(_cell(runs, lambda s, size=size: s["by_names"][size]) for size in sizes)])
    return table


def names_findings(arms: Arms) -> str:
    """What the numbers say, paired by seed."""
    names = {arm: values(runs) for arm, runs in arms.items()}
    base, learned, own = names.get("baseline", {}), names.get("learned", {}), names.get("cross", {})
    runs = arms.get("cross", {})
    lines = [
        verdict(gains(own, base), "cross over the baseline"),
        verdict(gains(own, learned), "cross over the learned-token control"),
        verdict(gains(own, values(runs, "wrong")), "cross, right names over another task's"),
        verdict(gains(own, values(runs, "shuffled")), "cross, right names over the same words dealt anew"),
        verdict(gains(learned, base), "learned tokens over the baseline"),
    ]
    for what, (function, _) in SHIFTS.items():
        pairs = gains(_shares(runs, function), _shares(arms.get("baseline", {}), function))
        lines.append(verdict(pairs, f"cross over the baseline, {what}"))
    return "\n".join(line for line in lines if line)


def draw_numbers(group: str, arms: Arms, folder: str | Path) -> str:
    """Plot accuracy over guessing's against the number of names; returns the file's name, in `folder`."""
    require("matplotlib", "bench").use("Agg")
    plt = require("matplotlib.pyplot", "bench")
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for arm, runs in arms.items():
        found = [log["scores"]["by_names"] for log in runs.values()]
        line = {int(size): 100 * statistics.mean(one[size] for one in found) for size in found[0]}
        axis.plot(list(line), list(line.values()), marker="o", label=arm, color=COLOURS.get(arm, "black"))
    axis.plot(list(line), [100 / size for size in line], color="black", ls=":", lw=1, label="guessing")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(list(line), list(line))
    axis.set(xlabel="class names", ylabel="accuracy, %", title=f"{group}: held-out names, mean over seeds")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(folder) / f"{group}-numbers.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f"{group}-numbers.png"


ABOUT = """{tower}, {size} pixels, embedding {embed}; {steps} steps of {tasks} tasks with {classes} names, one picture
each: colour pictures of OpenMoji's training names, and handwritten digits. Figures are accuracy in per cent, averaged
over tasks of at most 10 names of one group and over {partitions} partitions of the {held_out} held-out names into such
tasks; every name has one colour picture. ± is the standard deviation over seeds, which share the held-out names: these
leave a standard error of their own, {error:.1f} points where a model guesses.

*Digits*: pictures that training never saw, of names that it knows. *Line drawings* are of held-out names,
a style that training never saw. *Corrupted*: five corruptions of severity {severity}. *Worst group*: the least among
groups of names, chosen after the fact and so below their mean by chance alone. *Skin tones*: {hands} hands in five
tones, all names in one task, of training names too, but training saw them in yellow only. Norm rows: *wrong* is made
from another group's names, *shuffled* from the same words dealt out anew among the names (the
right row where all names have one word), *generic* from "an object", *base* is the encoder's own."""


def names_section(group: str, arms: Arms, folder: str | Path) -> str:
    """The report on one group of runs on names, in Markdown; draws its plot in `folder`."""
    log = first_of(arms)
    model, train, scores = log["model"], log["train"], log["scores"]
    chance = mean(scores["chance"]["right"])
    about = ABOUT.format(
        tower=model["image_tower"],
        size=model["img_size"],
        embed=model["embed_dim"],
        steps=train["steps"],
        tasks=train["tasks_per_batch"],
        classes=train["classes_per_task"],
        partitions=PARTITIONS,
        held_out=scores["held_out"],
        error=100 * (chance * (1 - chance) / scores["held_out"]) ** 0.5,
        severity=SEVERITY,
        hands=round(1 / scores["chance"]["tones"]),
    )
    parts = [f"## Group {group}: OpenMoji names and digits", about, names_findings(arms)]
    parts.append(markdown(names_arms_table(arms)))
    if any(values(runs, "wrong") for runs in arms.values()):
        parts += ["The swap test:", markdown(names_swap_table(arms))]
    parts += ["By group of names:", markdown(names_groups_table(arms))]
    parts += [f"By corruption, severity {SEVERITY}:", markdown(corruptions_table(arms))]
    parts += ["Held-out names of all groups, among more and more names:", markdown(numbers_table(arms))]
    parts.append(f"![numbers of names]({Path(folder).name}/{draw_numbers(group, arms, folder)})")
    return "\n\n".join(part for part in parts if part) + "\n"
