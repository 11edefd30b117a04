"""Zero-shot figures of a model on a data set, in the shape of CLIP_benchmark's JSON.

For each norm row (see `evaluation.ROW_SOURCES`) and each corruption: top-1 and top-5 accuracy, mean recall of the
classes, and where images have groups the accuracy of the worst, as DataComp reports it. Figures are averaged over a
set's tasks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.evaluation.corruptions import SEVERITIES, corrupt
from hyperclip_fast.evaluation.eval_sets import EvalSet
from hyperclip_fast.evaluation.swapping import class_scores
from hyperclip_fast.hyperclip import HyperCLIP


def metrics(scores: Sequence[Tensor], tasks: Sequence[EvalTask], groups: Sequence[Sequence[str]] | None) -> dict:
    """acc1, acc5, mean_per_class_recall, and with groups worst_group, its accuracy, and group_accuracy of all.

    Args:
        scores: (M_t, K_t) of each task.
        tasks: T of them.
        groups: by task, the group of each image.
    """
    found: dict[str, list[float]] = {"acc1": [], "acc5": [], "mean_per_class_recall": []}
    for score, task in zip(scores, tasks, strict=True):
        ranks = score.topk(min(5, score.shape[1]), dim=1).indices == task.labels[:, None]
        right = ranks[:, 0].double()
        found["acc1"].append(float(right.mean()))
        found["acc5"].append(float(ranks.any(1).double().mean()))
        recalls = _recalls(right, task.labels)
        found["mean_per_class_recall"].append(sum(recalls) / len(recalls))
    result: dict[str, Any] = {name: sum(values) / len(values) for name, values in found.items()}
    return result if groups is None else result | _worst_group(scores, tasks, groups)


def _recalls(right: Tensor, labels: Tensor) -> list[float]:
    """Share that is right, of each label that there is."""
    counts = torch.bincount(labels)
    return (torch.bincount(labels, right.double())[counts > 0] / counts[counts > 0]).tolist()


def _worst_group(scores: Sequence[Tensor], tasks: Sequence[EvalTask], groups: Sequence[Sequence[str]]) -> dict:
    right = torch.cat([score.argmax(1) == task.labels for score, task in zip(scores, tasks)])
    names = [name for task in groups for name in task]
    by_group = {
        name: float(right[torch.tensor([other == name for other in names])].double().mean())
        for name in sorted(set(names))
    }
    return {"worst_group_acc1": min(by_group.values()), "group_acc1": by_group}


def evaluate(
    model: HyperCLIP,
    data: EvalSet,
    rows: Sequence[str] = ("right",),
    corruptions: Sequence[str] = (),
    batch_size: int = 128,
    name: str = "",
) -> list[dict[str, Any]]:
    """One record for each row, clean, and one for each corruption, averaged over its severities.

    Args:
        model: in eval mode.
        data: what to classify.
        rows: some of evaluation.ROW_SOURCES.
        corruptions: some of corruptions.CORRUPTIONS.
        batch_size: images in a forward pass.
        name: of the model, for the records.

    Raises:
        ValueError: for an unknown row or corruption.
    """
    records = []
    for row in rows:
        for change in (None, *corruptions):
            severities = SEVERITIES if change else (0,)
            found = []
            for severity in severities:
                apply = _corruption(change, severity) if change else None
                scores = class_scores(model, data.tasks, row, batch_size, True, apply)
                found.append(metrics(scores, data.tasks, data.groups))
            records.append(_record(model, data, name, row, change, _average(found)))
    return records


def _corruption(name: str, severity: int) -> Callable[[Tensor, int], Tensor]:
    return lambda images, first: corrupt(images, name, severity, first)


def _average(found: Sequence[dict]) -> dict:
    """The mean of figures, also of those inside dictionaries."""
    first = found[0]
    return {
        key: _average([one[key] for one in found])
        if isinstance(value, dict)
        else sum(one[key] for one in found) / len(found)
        for key, value in first.items()
    }


def _record(model: HyperCLIP, data: EvalSet, name: str, row: str, change: str | None, figures: dict) -> dict[str, Any]:
    return {
        "dataset": data.name if change is None else f"{data.name}-{change}",
        "model": model.config.image_tower,
        "pretrained": name,
        "task": "zeroshot_classification",
        "language": "en",
        "row": row,
        "tasks": len(data.tasks),
        "metrics": figures,
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as lines of text."""
    lines = [f"{'data':<24}{'row':<10}{'acc1':>8}{'acc5':>8}{'recall':>8}{'worst group':>13}"]
    for record in records:
        found = record["metrics"]
        shares = "".join(f"{found[key]:>8.1%}" for key in ("acc1", "acc5", "mean_per_class_recall"))
        worst = f"{found['worst_group_acc1']:>13.1%}" if "worst_group_acc1" in found else ""
        lines.append(f"{record['dataset']:<24}{record['row']:<10}{shares}{worst}")
    return "\n".join(lines)
