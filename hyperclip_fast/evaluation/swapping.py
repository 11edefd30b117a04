"""Zero-shot accuracy of mixed batches, and the swap test: what the *right* class names are worth.

The same images are scored against their own classes with the encoder adapted to the right class set, to another
task's, to the right words dealt out anew among the names, to a generic name, or not at all (the base row). Only the
norm row differs: the drop from right to wrong is what conditioning does.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from hyperclip_fast.data.augmentation import normalize, resize, to_rgb
from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams

ROW_SOURCES = ("right", "base", "wrong", "shuffled", "generic")
GENERIC = "an object"
ELSEWHERE = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")  # wrong names for a task that stands alone


@torch.inference_mode()
def class_scores(
    model: HyperCLIP,
    tasks: Sequence[EvalTask],
    row: str = "right",
    batch_size: int = 128,
    progress: bool = False,
    change: Callable[[Tensor, int], Tensor] | None = None,
) -> list[Tensor]:
    """Similarity of every image of every task with the task's classes; batches mix the tasks.

    Args:
        model: in eval mode.
        tasks: what to classify.
        row: "base": the base row; else the row is made from the names of `row_names`.
        batch_size: images in a forward pass.
        progress: show a bar.
        change: applied to each batch of images (B, 3, S, S) in [-1, 1] and the index of its first one, such as a
            corruption.

    Returns:
        A tensor (M_t, K_t) for each task, on the CPU.

    Raises:
        ValueError: for another word in `row`.
    """
    if row not in ROW_SOURCES:
        raise ValueError(f"row must be one of {ROW_SOURCES}, got {row!r}")
    features, mask = model.stack_tasks([task.class_names for task in tasks])
    classes = model.project_text(features)
    params = _rows(model, tasks, row)
    task_ids = torch.cat([torch.full((len(task.images),), t) for t, task in enumerate(tasks)]).to(model.device)
    images = torch.cat([task.images for task in tasks])
    scores = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc=f"row: {row}", unit="batch", disable=None if progress else True):
        ids = task_ids[start : start + batch_size]
        batch = resize(to_rgb(images[start : start + batch_size]), model.image_size)
        batch = batch if change is None else change(batch, start)
        batch = normalize(batch, model.preprocessing).to(model.device)
        part = torch.einsum("be,bke->bk", model.encode_image(batch, params[ids]), classes[ids])
        scores.append(part.masked_fill(~mask[ids], -torch.inf).cpu())
    by_task = torch.cat(scores).split([len(task.images) for task in tasks])
    return [part[:, : len(task.class_names)] for task, part in zip(tasks, by_task)]


def predict(
    model: HyperCLIP,
    tasks: Sequence[EvalTask],
    row: str = "right",
    batch_size: int = 128,
    progress: bool = False,
) -> list[Tensor]:
    """Best class (M_t,) of every image of every task; arguments and errors as `class_scores`."""
    return [scores.argmax(1) for scores in class_scores(model, tasks, row, batch_size, progress)]


def _rows(model: HyperCLIP, tasks: Sequence[EvalTask], row: str) -> NormParams:
    if row != "base":
        return model.adapt(row_names(tasks, row))
    base = model.image.base_params
    return NormParams(base.spec, base.table.expand(len(tasks), -1))


def row_names(tasks: Sequence[EvalTask], row: str) -> list[tuple[str, ...]]:
    """The class names that each task's row is made from.

    Args:
        tasks: T of them.
        row: "right": the task's own; "wrong": those of the task half the list away, or of ELSEWHERE where there is no
            other; "shuffled": its own words dealt out anew among its names, each name as long as before, which may give
            the same set of names, and so the right row: see `shuffling_changes`; "generic": one name that says nothing.

    Raises:
        ValueError: for another row.
    """
    if row not in ROW_SOURCES or row == "base":
        raise ValueError(f"row must be one of {[name for name in ROW_SOURCES if name != 'base']}, got {row!r}")
    if row == "wrong" and len(tasks) == 1:
        return [ELSEWHERE]
    half = len(tasks) // 2
    chosen = [*tasks[-half:], *tasks[:-half]] if row == "wrong" else tasks
    if row == "generic":
        return [(GENERIC,)] * len(tasks)
    return [_shuffle_words(task.class_names) if row == "shuffled" else tuple(task.class_names) for task in chosen]


def shuffling_changes(names: Sequence[str]) -> bool:
    """Whether "shuffled" gives other names than these in another order: only then it may give another row."""
    return sorted(_shuffle_words(names)) != sorted(names)


def _shuffle_words(names: Sequence[str], seed: int = 0) -> tuple[str, ...]:
    words = [word for name in names for word in name.split()]
    random.Random(seed).shuffle(words)
    dealt = iter(words)
    return tuple(" ".join(next(dealt) for _ in name.split()) for name in names)


def accuracy(tasks: Sequence[EvalTask], predictions: Sequence[Tensor]) -> dict[str, float]:
    """Share of right predictions of each task."""
    return {
        task.name: float((task.labels == best).float().mean()) for task, best in zip(tasks, predictions, strict=True)
    }


def mean_accuracy(accuracies: Mapping[str, float]) -> float:
    """The mean over tasks, each counting the same."""
    return sum(accuracies.values()) / len(accuracies)


def swap_test(
    model: HyperCLIP,
    tasks: Sequence[EvalTask],
    batch_size: int = 128,
    progress: bool = False,
    rows: Sequence[str] = ROW_SOURCES,
) -> dict[str, dict[str, float]]:
    """Accuracy by task, for each of `rows`, some of ROW_SOURCES."""
    training = model.training
    model.eval()
    try:
        return {row: accuracy(tasks, predict(model, tasks, row, batch_size, progress)) for row in rows}
    finally:
        model.train(training)


def partition_table(results: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Swap tests of the same pictures, parted into tasks anew for each: mean, least and greatest, as lines of text.

    Args:
        results: of `swap_test`, one for each partition; all have the rows of the first, "right" among them.
    """
    means = {row: [mean_accuracy(result[row]) for result in results] for row in results[0]}
    lines = [f"{'row':<10}{'mean':>8}{'least':>8}{'most':>8}{'right minus it':>17}{'least':>8}{'most':>8}"]
    for row, values in means.items():
        ahead = [right - value for right, value in zip(means["right"], values)]
        shares = "".join(f"{value:>8.1%}" for value in _mean_and_range(values))
        mean, least, most = _mean_and_range([100 * value for value in ahead])
        lines.append(f"{row:<10}{shares}" + ("" if row == "right" else f"{mean:>+17.1f}{least:>+8.1f}{most:>+8.1f}"))
    return "\n".join(lines)


def _mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)
