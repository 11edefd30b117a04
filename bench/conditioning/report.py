"""bench/results/conditioning.md and its plots, from the logs of the conditioning runs alone.

A gain is paired: an arm minus the baseline of the same group and seed, which saw the same batches. Spread is the
standard deviation over seeds, with the least and the greatest value beside it. All figures are percentage points of
recall, averaged over classes, then over the six attributes. Where an arm guesses, a star
marks its recall, and there is no verdict on what its rows are worth.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from hyperclip_fast.bench.conditioning.logs import (
    DESCRIPTIONS,
    Groups,
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
from hyperclip_fast.bench.conditioning.scores import SCENES, SHUFFLED, guessing
from hyperclip_fast.data.scenes import ATTRIBUTES

SWAPS = ("right", "reworded", "wrong", "generic", "base")
GUESSES = "guesses"  # in the place of a difference of two guesses


def arms_table(arms: dict[str, dict[int, Log]]) -> Table:
    """Accuracy, gain over the baseline, parameters, steps and seconds of every arm; rivals' come on top."""
    base = values(arms.get("baseline", {}))
    head = ["arm", "seeds", "parameters", "of the encoder", "a task adds", "recall", "over baseline"]
    table = [[*head, "steps", "seconds"]]
    for arm, runs in arms.items():
        one, found = next(iter(runs.values())), values(runs)
        gain = "" if arm == "baseline" else spread(gains(found, values(runs, "before") or base), "+")
        steps, extra = one["last"]["step"], one["last"].get("parameters_per_task", 0)
        sizes = [f"{one[key]:,}" for key in ("parameters", "image_parameters")]
        cells = [
            str(len(runs)),
            *sizes,
            f"{extra:,}",
            spread(list(found.values())),
            gain,
            f"{'+' if extra else ''}{steps:,}",
            f"+{least_seconds(runs):,.0f}" if extra else "",
        ]
        table.append([f"{arm}: {DESCRIPTIONS.get(arm, arm)}", *cells])
    chance = statistics.mean(guessing(attribute)[0] for attribute in ATTRIBUTES)
    return [*table, ["guessing", *[""] * 4, f"{100 * chance:.1f}", *[""] * 3]]


def least_seconds(runs: dict[int, Log]) -> float:
    """A rival's time of tuning, of the quickest seed, as other work on the machine slows a run."""
    return min(log["last"]["seconds"] for log in runs.values())


def guesses(runs: dict[int, Log], attribute: str) -> bool:
    """Whether an arm's recall is at most two standard errors above guessing's."""
    chance, error = guessing(attribute)
    return statistics.mean(values(runs, "right", attribute).values()) <= 100 * (chance + 2 * error)


def attributes_table(arms: dict[str, dict[int, Log]]) -> Table:
    """Mean and standard deviation by attribute; guessing with the standard error that this many scenes leave."""
    chances = [guessing(attribute) for attribute in ATTRIBUTES]
    table = [
        ["arm", *ATTRIBUTES],
        ["guessing", *(f"{100 * chance:.1f} ± {100 * error:.1f}" for chance, error in chances)],
    ]
    for arm, runs in arms.items():
        cells = []
        for attribute in ATTRIBUTES:
            found = list(values(runs, "right", attribute).values())
            cells.append(around(found) + " \\*" * guesses(runs, attribute))
        table.append([arm, *cells])
    return table


def swap_table(arms: dict[str, dict[int, Log]]) -> Table:
    """Each HyperCLIP arm with its row from right, reworded, wrong and generic names, and the base row."""
    without = ", ".join(attribute for attribute in ATTRIBUTES if attribute not in SHUFFLED)
    objects = "object: its own names minus other objects'"
    table = [["arm", *SWAPS, "right minus wrong", f"right minus shuffled, without {without}", objects]]
    for arm, runs in arms.items():
        if not values(runs, "wrong"):
            continue
        right = values(runs)
        cells = [f"{statistics.mean(values(runs, row).values()):.1f}" for row in SWAPS]
        drop = spread(gains(right, values(runs, "wrong")), "+")
        sibling = gains(values(runs, "right", "object"), values(runs, "sibling", "object"))
        objects = GUESSES if guesses(runs, "object") else spread(sibling, "+")
        table.append([arm, *cells, drop, spread(shuffling(runs), "+"), objects])
    return table


def shuffling(runs: dict[int, Log]) -> list[float]:
    """Right minus shuffled by seed, over the attributes whose names shuffling changes."""
    by_attribute = [gains(values(runs, "right", a), values(runs, "shuffled", a)) for a in SHUFFLED]
    return [statistics.mean(numbers) for numbers in zip(*by_attribute)]


def drops_table(arms: dict[str, dict[int, Log]]) -> Table:
    """Right minus wrong by attribute, paired by seed; also with none of the wrong rows made for the colour."""
    table = [["arm", *ATTRIBUTES]]
    for arm, runs in arms.items():
        if values(runs, "wrong"):
            table.append([arm, *_drops(runs, lambda a, runs=runs: values(runs, "wrong", a))])
            without = _drops(runs, lambda a, runs=runs: _wrong_without_colour(runs, a))
            table.append([f"{arm}, without colour's row", *without])
    return table


def _drops(runs: dict[int, Log], wrong: Callable[[str], dict[int, float]]) -> list[str]:
    return [GUESSES if guesses(runs, a) else spread(gains(values(runs, "right", a), wrong(a)), "+") for a in ATTRIBUTES]


def _wrong_without_colour(runs: dict[int, Log], attribute: str) -> dict[int, float]:
    sources = [source for source in ATTRIBUTES if source not in (attribute, "colour")]
    found = {seed: [log["scores"]["matrix"][source][attribute] for source in sources] for seed, log in runs.items()}
    return {seed: 100 * statistics.mean(numbers) for seed, numbers in found.items()}


def matrix_table(runs: dict[int, Log]) -> Table:
    """Row made for one attribute's names x attribute asked for, mean over seeds."""
    table = [["row from \\ asked for", *ATTRIBUTES]]
    for source in ATTRIBUTES:
        cells = [statistics.mean(100 * log["scores"]["matrix"][source][a] for log in runs.values()) for a in ATTRIBUTES]
        table.append([source, *(f"{cell:.1f}" for cell in cells)])
    return table


def names_table(arms: dict[str, dict[int, Log]]) -> Table:
    """Accuracy on held-out objects among more and more names; guessing with the standard error of this many scenes."""
    sizes = sizes_of(arms)
    chances = [f"{100 / size:.1f} ± {100 * math.sqrt((size - 1) / SCENES) / size:.1f}" for size in sizes]
    table = [["arm", *(f"{size} names" for size in sizes)], ["guessing", *chances]]
    for arm, runs in arms.items():
        if found := by_names(runs):
            cells = [around([100 * one.get(str(size), 0.0) for one in found]) for size in sizes]
            table.append([arm, *cells])
    return table


def by_names(runs: dict[int, Log]) -> list[dict[str, float]]:
    """Accuracies by number of names, of each run that has them; old logs leave out those that were zero."""
    return [log["scores"]["objects_by_names"] for log in runs.values() if "objects_by_names" in log["scores"]]


def sizes_of(arms: dict[str, dict[int, Log]]) -> list[int]:
    """The numbers of names that some run of the arms was scored with."""
    return sorted({int(size) for runs in arms.values() for found in by_names(runs) for size in found})


def findings(arms: dict[str, dict[int, Log]]) -> str:
    """What a group's numbers say, controls first; nothing of the rows of objects that an arm guesses."""
    right = {arm: values(runs) for arm, runs in arms.items()}
    base, learned = right.get("baseline", {}), right.get("learned", {})
    at_chance = {a: [arm for arm, runs in arms.items() if guesses(runs, a)] for a in ATTRIBUTES}
    guessed = [f"{attribute} ({', '.join(found)})" for attribute, found in at_chance.items() if found]
    lines = [f"- At guessing, and part of every mean: {', '.join(guessed)}."] if guessed else []
    for arm in ("cross", "mean"):
        runs, own = arms.get(arm, {}), right.get(arm, {})
        objects = gains(values(runs, "right", "object"), values(runs, "sibling", "object"))
        lines += [
            verdict(gains(own, base), f"{arm} over the baseline"),
            verdict(gains(own, learned), f"{arm} over the learned-token control"),
            verdict(gains(own, right.get("wide", {})), f"{arm} over a baseline with as many parameters"),
            verdict(gains(own, values(runs, "wrong")), f"{arm}, right names over another attribute's"),
            verdict(shuffling(runs), f"{arm}, right names over the same words dealt anew"),
            ""
            if arm in at_chance["object"]
            else verdict(objects, f"{arm}, held-out objects: own names over other objects'"),
        ]
    lines.append(verdict(gains(learned, base), "learned tokens over the baseline"))
    for arm, runs in arms.items():
        before = values(runs, "before")
        lines.append(verdict(gains(right[arm], before), f"{arm} over the model that it tuned"))
        if any(abs(number) > 0.05 for number in gains(before, base)):
            again = f"it tuned baselines trained again, {spread(list(before.values()))} before tuning"
            lines.append(f'- {arm}: {again}; "over baseline" below is over these.')
    return "\n".join(line for line in lines if line)


HEAD = """# What conditioning on class names is worth

Made by `python -m hyperclip_fast.bench.conditioning report` from the logs in `{folder}`, which
`python -m hyperclip_fast.bench.conditioning run` wrote; the queue is `bench/conditioning/queue.yaml`.
Trained on: {machine}.

A scene shows one to six copies of an OpenMoji picture; a task asks for the object, the ground's colour, the number, the
size, the turn or the place, by its class names alone. Objects of the scenes below were held out from training, and so
was the wording "reworded". An arm's runs see the same batches as the baseline's of the same seed. Figures are recall in
per cent, averaged over classes, then over attributes (among more and more names: plain accuracy); ± is the standard
deviation over seeds, with least and greatest. All seeds are scored on the same {scenes} scenes, which leave a standard
error of their own: beside "guessing" it is that of a model that guesses. A star marks what is at most two of these
above guessing; "guesses" stands where a difference would be one of two guesses.

Norm rows: *right*, from the task's own class names; *reworded*, names and row in a wording that training never saw;
*shuffled*, the same words dealt out anew among the names, which changes nothing for one-word names, as the hypernetwork
reads a set: given for the other attributes only; *wrong*, from another attribute's names, averaged over the other five;
*generic*, from "an object"; *base*, the encoder's own. Class embeddings are the right ones throughout.

A rival is compared with the very model that it tuned. Its seconds, of the quickest seed, as other work ran on the
machine beside these runs, are those of tuning for all six attributes, a sixth for each, on top of its baseline's
training. What conditioning costs in training is timed under "Overheads", the arms taking turns.

In every arm position embeddings, where the encoder has them, start at {scale} times timm's scale. What was looked at
before: this, stem, patch, learning rate, number of steps, on seeds 100 and up and scenes of training objects. The seeds
and scenes below were scored once, when a run had ended; the curves' scenes are others.
"""

WIDTHS = """Arm cross and a baseline of the same encoder, schedule and seed; the control "wide" of one group is the
baseline of its width. Gains are paired, on the seeds that both arms have."""


def report(
    folder: str | Path,
    groups: Groups,
    plots: Sequence[str],
    position_scale: float,
    overheads: str = "",
    conclusion: str = "",
    widths: str = "",
) -> str:
    """The whole report in Markdown.

    Args:
        folder: of the logs.
        groups: logs by group, arm and seed.
        plots: names of the plots in `folder`.
        position_scale: of runs whose logs do not say it.
        overheads: the table of overheads; empty: not measured.
        conclusion: what somebody wrote of these figures.
        widths: the table of gains against width; empty: no pair of runs.
    """
    logs = [log for arms in groups.values() for runs in arms.values() for log in runs.values()]
    scale = " or ".join(f"{scale:g}" for scale in sorted({log.get("position_scale", position_scale) for log in logs}))
    parts = [HEAD.format(folder=_shown(folder), machine=logs[0]["machine"], scenes=SCENES, scale=scale)]
    parts += ["## Conclusion", conclusion.strip()] if conclusion else []
    parts += [f"![{name}]({Path(folder).name}/{name}.png)" for name in plots]
    for group, arms in groups.items():
        model, train = first_of(arms)["model"], first_of(arms)["train"]
        sizes = f"width {model['width']}, depth {model['depth']}, " if model["width"] else ""
        parts += [
            f"## Group {group}",
            f"{model['image_tower']}, {sizes}{model['img_size']} pixels, embedding {model['embed_dim']}; "
            f"{train['steps']} steps of {train['tasks_per_batch']} tasks with {train['classes_per_task']} images.",
            findings(arms),
            markdown(arms_table(arms)),
            "By attribute:",
            markdown(attributes_table(arms)),
        ]
        if any(values(runs, "wrong") for runs in arms.values()):
            parts += ["The swap test, mean over attributes:", markdown(swap_table(arms))]
            parts += ["Right minus wrong, by attribute:", markdown(drops_table(arms))]
        if "cross" in arms:
            parts += ["Row made for (line) and attribute asked for (column), arm cross:"]
            parts += [markdown(matrix_table(arms["cross"]))]
        if "baseline" in arms:
            parts += ["Held-out objects among more and more names:", markdown(names_table(arms))]
    if widths:
        parts += ["## Gain against width", WIDTHS, widths]
    if overheads:
        parts += ["## Overheads", "`python -m hyperclip_fast.bench.conditioning overheads`. " + overheads]
    return "\n\n".join(parts) + "\n"


def _shown(folder: str | Path) -> str:
    """The folder from the current one, where commands run; its name where it is elsewhere."""
    path, here = Path(folder).resolve(), Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name
