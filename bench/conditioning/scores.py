"""What a model gets right on scenes, by attribute, when its norm row comes from the right class names, and from others.

Every scene is embedded once for each source of rows: the class names of each attribute, those with their words dealt
out anew, a generic name, the base row. Each embedding is then scored against the class names of every attribute: the
matrix "row made for" x "asked for". Recall is averaged over classes, so that rare values count as much as frequent.
Which of more and more names an object has is plain accuracy.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hyperclip_fast.data.augmentation import to_rgb
from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.data.scenes import ATTRIBUTES, CHANCES, COMBINATIONS, VALUES, class_names
from hyperclip_fast.evaluation.swapping import row_names, shuffling_changes
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams

BATCH = 192
SET_SIZES = (2, 4, 8, 16, 32, 64, 128)
SCENES, OBJECTS = 960, 8  # scenes that are scored, names of an object task
# Where dealing the words out anew gives other names: one-word names stay the same set, and so does the row.
SHUFFLED = ("object", *(attribute for attribute in VALUES if shuffling_changes(class_names(attribute, ()))))
Scores = dict[str, float]


class SceneTasks:
    """The tasks of `scenes.scene_tasks`, by attribute.

    Args:
        tasks: as scene_tasks returns them: object tasks on parts of the scenes, then every other attribute on all.
    """

    def __init__(self, tasks: Sequence[EvalTask]):
        others = len(ATTRIBUTES) - 1
        self.images = to_rgb(tasks[-1].images)
        self.tasks = {"object": list(tasks[:-others]), **{task.name: [task] for task in tasks[-others:]}}

    def names(self, attribute: str, row: str = "right") -> list[tuple[str, ...]]:
        """Class names of an attribute's tasks; with a `row` of ROW_SOURCES, those that the row is made from."""
        return row_names(self.tasks[attribute], row)

    def set_ids(self, attribute: str) -> Tensor:
        """(M,) which of the attribute's tasks a scene belongs to."""
        sizes = torch.tensor([len(task.images) for task in self.tasks[attribute]])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def recall(self, attribute: str, features: Tensor, classes: Tensor) -> float:
        """Mean recall over the classes of an attribute.

        Args:
            attribute: what is asked for.
            features: (M, E) of the scenes.
            classes: (T, K, E) class embeddings of the attribute's tasks.
        """
        ids, labels = self.set_ids(attribute), torch.cat([task.labels for task in self.tasks[attribute]])
        best = torch.einsum("me,mke->mk", features, classes[ids]).argmax(1)
        member = ids * classes.shape[1] + labels
        right = torch.bincount(member, (best == labels).double())
        count = torch.bincount(member)
        return float((right[count > 0] / count[count > 0]).mean())


def guessing(attribute: str) -> tuple[float, float]:
    """Recall of guessing, and the standard error that SCENES scenes leave: rare values make it larger."""
    classes = OBJECTS if attribute == "object" else len(VALUES[attribute])
    shares = torch.full((classes,), 1 / classes)
    if attribute in (fits := ("count", "size", "place")):
        shares = torch.bincount(COMBINATIONS[:, fits.index(attribute)], CHANCES)
        shares = shares / shares.sum()
    chance = 1 / classes
    return chance, math.sqrt(chance * (1 - chance) / SCENES * float((1 / shares).mean()) / classes)


def mean(scores: Scores) -> float:
    """The mean over attributes."""
    return sum(scores.values()) / len(scores)


@torch.inference_mode()
def embed(model: HyperCLIP, images: Tensor, table: Tensor | None, ids: Tensor) -> Tensor:
    """(M, E) embeddings of images (M, 3, S, S), scene m with row ids[m] of table (T, P); None: no rows at all."""
    if table is None:
        return embed_with(model.encode_image, images)
    parts = zip(images.split(BATCH), ids.split(BATCH))
    spec = model.image.norm_spec
    return torch.cat([model.encode_image(part, NormParams(spec, table, rows)) for part, rows in parts])


def embed_with(encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(M, E) embeddings of images (M, 3, S, S) by any encoder, in batches."""
    return torch.cat([encode(part) for part in images.split(BATCH)])


@torch.inference_mode()
def right_scores(model: HyperCLIP, scenes: SceneTasks) -> Scores:
    """Recall by attribute with the right rows only; the model is left in eval mode."""
    model.eval()
    return {a: scenes.recall(a, _features(model, scenes, a), _classes(model, scenes, a)) for a in ATTRIBUTES}


def _classes(model: HyperCLIP, scenes: SceneTasks, attribute: str) -> Tensor:
    return torch.stack([model.encode_text(names) for names in scenes.names(attribute)])


def _features(model: HyperCLIP, scenes: SceneTasks, attribute: str, row: str = "right") -> Tensor:
    """Embeddings with rows made from an attribute's class names, or from what `row` makes of them."""
    names = scenes.names(attribute, row) if row != "base" else [("",)]
    table = None if model.hypernetwork is None or row == "base" else model.adapt(names).table
    ids = scenes.set_ids(attribute) if len(names) > 1 else torch.zeros(len(scenes.images), dtype=torch.long)
    return embed(model, scenes.images, table, ids)


@torch.inference_mode()
def all_scores(model: HyperCLIP, scenes: SceneTasks, reworded: SceneTasks) -> dict:
    """Every figure of a run.

    Args:
        model: a trained one.
        scenes: with the wording of training.
        reworded: the same scenes with the wording that training never saw.

    Returns:
        right: recall by attribute; reworded: the same, the names in the other wording; objects_by_names: accuracy on
        the held-out objects among 2, 4, ... names. For a model with a hypernetwork also matrix (row made for x asked
        for), wrong (mean over the other attributes' rows), sibling (object: the row of other objects' names), shuffled
        (the attributes of SHUFFLED), generic, base.
    """
    scores = {
        "right": right_scores(model, scenes),
        "reworded": right_scores(model, reworded),
        "objects_by_names": {
            str(size): value
            for size, value in ((k, object_accuracy(model, scenes, k)) for k in SET_SIZES)
            if value is not None
        },
    }
    return scores if model.hypernetwork is None else {**scores, **swap_scores(model, scenes)}


def swap_scores(model: HyperCLIP, scenes: SceneTasks) -> dict:
    """The swap test of a model with a hypernetwork; see `all_scores`."""
    classes = {a: _classes(model, scenes, a) for a in ATTRIBUTES}

    def recalls(features: Tensor) -> Scores:
        return {a: scenes.recall(a, features, classes[a]) for a in ATTRIBUTES}

    matrix = {a: recalls(_features(model, scenes, a)) for a in ATTRIBUTES}
    others = {a: [matrix[source][a] for source in ATTRIBUTES if source != a] for a in ATTRIBUTES}
    return {
        "matrix": matrix,
        "wrong": {a: sum(values) / len(values) for a, values in others.items()},
        "sibling": {"object": recalls(_features(model, scenes, "object", "wrong"))["object"]},
        "shuffled": {a: scenes.recall(a, _features(model, scenes, a, "shuffled"), classes[a]) for a in SHUFFLED},
        "generic": recalls(_features(model, scenes, "object", "generic")),
        "base": recalls(_features(model, scenes, "object", "base")),
    }


@torch.inference_mode()
def object_accuracy(model: HyperCLIP, scenes: SceneTasks, size: int) -> float | None:
    """Share of scenes whose object is found when a task has `size` of the names; None where there are fewer."""
    tasks = scenes.tasks["object"]
    names = [name for task in tasks for name in task.class_names]
    per_task = len(tasks[0].class_names)
    labels = torch.cat([task.labels + i * per_task for i, task in enumerate(tasks)])
    sets = len(names) // size
    if not sets:
        return None
    groups = [names[i * size : (i + 1) * size] for i in range(sets)]
    kept = labels < sets * size
    table = None if model.hypernetwork is None else model.adapt(groups).table
    features = embed(model, scenes.images[kept], table, labels[kept] // size)
    classes = torch.stack([model.encode_text(group) for group in groups])[labels[kept] // size]
    best = torch.einsum("me,mke->mk", features, classes).argmax(1)
    return float((best == labels[kept] % size).double().mean())
