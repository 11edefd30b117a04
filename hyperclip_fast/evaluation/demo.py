"""The demo: held-out pictures of many tasks in one batch, one forward pass, by the checkpoint shipped here."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyperclip_fast.data.augmentation import resize, to_rgb
from hyperclip_fast.data.config import SETS
from hyperclip_fast.data.held_out import EvalTask, group_of
from hyperclip_fast.data.pictures import load_pictures
from hyperclip_fast.data.scenes import evaluation_tasks
from hyperclip_fast.evaluation.swapping import accuracy, mean_accuracy, predict
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.timing import interleaved, medians


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
    model: HyperCLIP, bank: TaskBank, images: Tensor, tasks: Sequence[str], repeats: int = 20
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


def contact_sheet(
    tasks: Sequence[EvalTask], predictions: Sequence[Tensor], path: str | Path, columns: int = 10
) -> None:
    """A picture of the batch: a line a task, each image with the predicted name, red with the true one where wrong."""
    plt = require("matplotlib.pyplot", "demo")
    figure, axes = plt.subplots(len(tasks), columns, figsize=(1.35 * columns, 1.8 * len(tasks)), squeeze=False)
    for task, best, line in zip(tasks, predictions, axes):
        for axis in line:
            axis.axis("off")
        pixels = (to_rgb(task.images[:columns]).permute(0, 2, 3, 1) * 0.5 + 0.5).clamp(0, 1)
        for axis, image, label, guess in zip(line, pixels, task.labels.tolist(), best.tolist()):
            axis.imshow(image.numpy())
            text, colour = _wrap(task.class_names[guess]), "#1a7f37"
            if guess != label:
                text, colour = f"{text}\n({_wrap(task.class_names[label])})", "#cf222e"
            axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=6.5, color=colour)
        line[0].set_title(f"task: {task.name}", fontsize=9, loc="left", fontweight="bold")
    figure.suptitle("One batch, one forward pass: green is right, red is wrong (truth in brackets)", fontsize=10)
    figure.text(0.99, 0.003, "Pictures: OpenMoji, CC BY-SA 4.0; digits: scikit-learn", ha="right", fontsize=6)
    figure.tight_layout(rect=(0, 0.008, 1, 0.985), h_pad=1.6, w_pad=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _wrap(name: str, width: int = 22) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def run(out: str | Path = "demo.png", model: str | Path | None = None, device: str = "cpu") -> None:
    """Classify a mixed batch of held-out pictures, print accuracies and speeds, save the contact sheet."""
    clip = load_model(model, device)
    tasks = choose_tasks(evaluation_tasks(load_pictures(), SETS))
    bank = TaskBank(clip)
    bank.add_many({task.name: task.class_names for task in tasks})
    names = [task.name for task in tasks for _ in task.images]
    count, classes = len(names), sum(len(task.class_names) for task in tasks)
    print(f"\n{count} pictures that no training step saw, {len(tasks)} tasks, {classes} class names, one forward pass.")
    print("The encoder's norm row comes from the right class names, is the base row, or another task's (wrong).\n")
    predictions = {row: predict(clip, tasks, row, batch_size=count) for row in ("right", "base", "wrong")}
    print(table(tasks, {row: accuracy(tasks, best) for row, best in predictions.items()}))
    contact_sheet(tasks, predictions["right"], out)
    images = resize(to_rgb(torch.cat([task.images for task in tasks])), clip.image_size).to(device)
    print(f"\nimages/s of the encoder, batch of {count}, {torch.get_num_threads()} threads, {device}:")
    for name, value in speeds(clip, bank, images, names).items():
        print(f"  {name:<40}{value:>9.0f}")
    print(f"\nThe batch with its predicted names: {out}")
