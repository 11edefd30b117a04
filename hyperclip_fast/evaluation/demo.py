"""The demo: held-out pictures of many tasks in one batch, one forward pass, by the checkpoint shipped here."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.data.augmentation import resize, to_rgb, to_rgba
from hyperclip_fast.data.config import SETS
from hyperclip_fast.data.held_out import EvalTask, group_of
from hyperclip_fast.data.photos import photo_tasks
from hyperclip_fast.data.pictures import load_pictures
from hyperclip_fast.data.preprocessing import HALF, Preprocessing
from hyperclip_fast.data.scenes import ATTRIBUTES, evaluation_tasks
from hyperclip_fast.evaluation.swapping import accuracy, class_scores, mean_accuracy
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.timing import interleaved, medians

RIGHT, WRONG = "#1a7f37", "#cf222e"
CREDITS = "Photographs: scikit-image, scikit-learn, matplotlib; drawings: OpenMoji, CC BY-SA 4.0; digits: scikit-learn"


@dataclass(frozen=True)
class Section:
    """A part of the sheet.

    Args:
        title: over it.
        tasks: what it shows.
        lines: of images.
        columns: of images.
        height: relative to other sections'.
        each: images of a task, at most.
    """

    title: str
    tasks: list[EvalTask]
    lines: int
    columns: int
    height: float
    each: int


def choose_tasks(tasks: Sequence[EvalTask], per_task: int = 10, seed: int = 0) -> list[EvalTask]:
    """One task of each group, with at most `per_task` of its pictures, of as many classes as possible."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for task in tasks:
        group = group_of(task.name)
        if group not in chosen:
            order = torch.randperm(len(task.images), generator=generator)
            seen: dict[int, int] = {}
            rank = torch.tensor([_count(seen, int(task.labels[i])) for i in order])
            order = order[rank.argsort(stable=True)][:per_task]
            chosen[group] = EvalTask(group, task.class_names, task.images[order], task.labels[order])
    return list(chosen.values())


def _count(seen: dict[int, int], label: int) -> int:
    seen[label] = seen.get(label, -1) + 1
    return seen[label]


def table(tasks: Sequence[EvalTask], results: dict[str, dict[str, float]]) -> str:
    """Accuracy by task for each norm row, with the share that guessing would get."""
    lines = [f"{'task':<16}{'images':>7}{'classes':>9}{'guess':>8}{'right':>8}{'base':>8}{'wrong':>8}"]
    for task in tasks:
        shares = "".join(f"{results[row][task.name]:>8.0%}" for row in ("right", "base", "wrong"))
        classes = len(task.class_names)
        lines.append(f"{task.name:<16}{len(task.images):>7}{classes:>9}{1 / classes:>8.0%}{shares}")
    means = "".join(f"{mean_accuracy(results[row]):>8.1%}" for row in ("right", "base", "wrong"))
    guess = sum(1 / len(task.class_names) for task in tasks) / len(tasks)
    lines.append(f"{'mean over tasks':<16}{sum(len(t.images) for t in tasks):>7}{'':>9}{guess:>8.1%}{means}")
    return "\n".join(lines)


@torch.inference_mode()
def speeds(
    model: HyperCLIP, bank: TaskBank, images: Tensor, tasks: Sequence[str], repeats: int = 7
) -> dict[str, float]:
    """Images a second, encoder only: the mixed batch, the stock timm model, and one pass of it a task.

    The loop is what serving these tasks takes without per-sample norms: a specialised stock model for each, run on its
    own images.
    """
    ids = bank.task_ids(tasks)
    params = bank.params[ids]
    special = {task: model.specialize(bank.classes(task)) for task in dict.fromkeys(tasks)}
    stock = next(iter(special.values()))
    parts = [(special[task], images[[i for i, name in enumerate(tasks) if name == task]]) for task in special]
    candidates = {
        "mixed batch, every image its own task": lambda: model.image(images, params),
        "stock timm model, one task for all": lambda: stock(images),
        "stock timm models, one pass a task": lambda: [encoder(part) for encoder, part in parts],
    }
    return {
        name: len(images) / seconds
        for name, seconds in medians(interleaved(candidates, repeats, progress=True)).items()
    }


def contact_sheet(sections: Sequence[Section], scores: Sequence[Tensor], scale: float, path: str | Path) -> None:
    """A picture of the batch on one screen: each image over the best name and its probability, green where it is right.

    Args:
        sections: what is shown, from the top; their tasks follow one another in `scores`.
        scores: (M_t, K_t) of each task.
        scale: of the scores, for their softmax.
        path: PNG file.
    """
    plt = require("matplotlib.pyplot", "demo")
    figure = plt.figure(figsize=(16, 9))
    parts = figure.subfigures(len(sections), 1, height_ratios=[section.height for section in sections], hspace=0)
    waiting = iter(scores)
    for section, part in zip(sections, parts):
        part.suptitle(section.title, x=0.01, y=0.99, ha="left", va="top", fontsize=11, fontweight="bold")
        axes = part.subplots(section.lines, section.columns, squeeze=False).flatten()
        size = 8 if section.columns < 12 else 7
        top, bottom = 1 - 0.35 / section.height, 0.62 / section.height
        part.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, wspace=0.08, hspace=0.5)
        answers = [one for task in section.tasks for one in _answers(task, next(waiting), scale, section)]
        for axis in axes:
            axis.axis("off")
        for axis, (pixels, text, colour) in zip(axes, answers):
            axis.imshow(pixels)
            axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=size, color=colour)
    legend = "One batch, one forward pass. Green is right, red is wrong (truth in brackets)."
    figure.text(0.99, 0.99, legend, ha="right", va="top", fontsize=9)
    figure.text(0.99, 0.004, CREDITS, ha="right", fontsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _answers(task: EvalTask, scores: Tensor, scale: float, section: Section) -> Iterator[tuple[Any, str, str]]:
    """Pixels (S, S, 3), the best name with its probability, and a colour, of each of a task's first images."""
    chances, best = (scale * scores[: section.each]).softmax(1).max(1)
    pixels = (to_rgb(task.images[: section.each]).permute(0, 2, 3, 1) * 0.5 + 0.5).clamp(0, 1)
    width = 200 // section.columns  # letters
    for image, label, guess, chance in zip(pixels, task.labels.tolist(), best.tolist(), chances.tolist()):
        text = textwrap.fill(f"{task.class_names[guess]} {chance:.0%}", width)
        if guess != label:
            text += "\n" + textwrap.fill(f"({task.class_names[label]})", width)
        yield image.numpy(), text, RIGHT if guess == label else WRONG


def sections_of(preprocessing: Preprocessing) -> list[Section]:
    """Photographs, held-out drawings and digits, and scenes made of such drawings."""
    names = choose_tasks(evaluation_tasks(load_pictures(), SETS))
    questions = [task for task in names if task.name in ATTRIBUTES]
    drawings = [task for task in names if task.name not in ATTRIBUTES]
    return [
        Section("Photographs", photo_tasks(preprocessing), 2, 9, 3.5, 5),
        Section("Drawings with names that training never saw, and digits", drawings, 2, 12, 3.4, 2),
        Section(
            "Scenes: the object, the ground, the number, the size, the turn or the place?",
            questions,
            1,
            12,
            1.8,
            2,
        ),
    ]


def run(out: str | Path = "demo.png", model: str | Path | None = None, device: str = "cpu") -> None:
    """Classify a mixed batch of photographs and held-out pictures, print accuracies and speeds, save the sheet."""
    clip = load_model(model, device)
    sections = sections_of(replace(clip.preprocessing, mean=HALF, std=HALF))
    tasks = [_at_side(task, clip.image_size) for section in sections for task in section.tasks]
    bank = TaskBank(clip)
    bank.add_many({task.name: task.class_names for task in tasks})
    names = [task.name for task in tasks for _ in task.images]
    count, classes = len(names), sum(len(task.class_names) for task in tasks)
    print(f"\n{count} pictures that no training step saw, {len(tasks)} tasks, {classes} class names, one forward pass.")
    print("The encoder's norm row comes from the right class names, is the base row, or another task's (wrong).\n")
    scores = {row: class_scores(clip, tasks, row, batch_size=count) for row in ("right", "base", "wrong")}
    results = {row: accuracy(tasks, [one.argmax(1) for one in found]) for row, found in scores.items()}
    print(table(tasks, results))
    contact_sheet(sections, scores["right"], clip.logit_scale.exp().item(), out)
    some = slice(None, None, 4)  # of every task
    images = to_rgb(torch.cat([task.images for task in tasks])[some]).to(device)
    print(f"\nimages/s of the encoder, batch of {len(images)}, {torch.get_num_threads()} threads, {device}:")
    for name, value in speeds(clip, bank, images, names[some]).items():
        print(f"  {name:<40}{value:>9.0f}")
    print(f"\nThe batch with its predicted names: {out}")


def _at_side(task: EvalTask, size: int) -> EvalTask:
    """The same task, of pictures that fit into one batch with others."""
    return replace(task, images=to_rgba(resize(to_rgb(task.images), size)))
