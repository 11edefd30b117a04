"""The report's section on held-out names."""

import statistics
from collections.abc import Callable
from pathlib import Path

from hyperclip_fast.bench.conditioning.logs import (
    DESCRIPTIONS,
    Log,
    Table,
    around,
    first_of,
    gains,
    markdown,
    spread,
    values,
    verdict,
)
from hyperclip_fast.bench.conditioning.names import DIGITS, PARTITIONS, SEVERITY
from hyperclip_fast.bench.conditioning.plots import COLOURS
from hyperclip_fast.bench.conditioning.scores import Scores, mean
from hyperclip_fast.data.held_out import group_of
from hyperclip_fast.evaluation.corruptions import CORRUPTIONS
from hyperclip_fast.evaluation.swapping import ROW_SOURCES
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import written_file

Arms = dict[str, dict[int, Log]]


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
    table = [["arm, asked for", *ROW_SOURCES, "right minus wrong", "right minus shuffled"]]
    for arm, runs in arms.items():
        if not values(runs, "wrong"):
            continue
        names = {row: values(runs, row) for row in ROW_SOURCES}
        digits = {row: _shares(runs, lambda s, row=row: s[DIGITS][row]) for row in ROW_SOURCES}
        for what, rows in (("held-out names", names), (DIGITS, digits)):
            cells = [f"{statistics.mean(rows[row].values()):.1f}" for row in ROW_SOURCES]
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
    with written_file(Path(folder) / f"{group}-numbers.png") as beside:
        figure.savefig(beside, dpi=110, bbox_inches="tight")
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
