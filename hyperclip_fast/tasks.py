"""Adapted tasks as values, and a mixed batch classified by them: what a TaskBank and a server are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.hypernetwork import pad_classes
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.utils.class_names import check_task

# Class names, best first, with their probabilities within the task, and their scores: the logit's sigmoid, which says
# how well a name fits by itself where the model was trained with the sigmoid loss.
Ranked = list[tuple[str, float, float]]


@dataclass(frozen=True, eq=False)
class AdaptedTask:
    """What adapting to a task made, apart from any bank; never changed, so that threads and processes may share it.

    Args:
        classes: class names.
        embeddings: (K, E), the class names'.
        row: (P,), norm parameters.
    """

    classes: tuple[str, ...]
    embeddings: Tensor
    row: Tensor


@torch.inference_mode(False)  # what is made in inference mode could not be changed outside it
@torch.no_grad()
def adapt_tasks(model: HyperCLIP, tasks: Sequence[Sequence[str]]) -> list[AdaptedTask]:
    """Adapt a model to tasks: one pass of text tower and hypernetwork.

    Args:
        model: in eval mode.
        tasks: class names of each.

    Raises:
        ValueError: for no task, or class names that `check_task` refuses.
    """
    for class_names in tasks:
        check_task(class_names)
    features, mask = model.stack_tasks(tasks)
    embeddings, table = model.project_text(features), model.rows(features, mask).table
    return [
        AdaptedTask(tuple(names), kept[real].clone(), row)
        for names, kept, real, row in zip(tasks, embeddings, mask, table)
    ]


@torch.no_grad()
def classify_tasks(model: HyperCLIP, images: Tensor, tasks: Sequence[AdaptedTask], topk: Sequence[int]) -> list[Ranked]:
    """Classify a mixed batch in one forward pass, each image against its own task's classes.

    Args:
        model: the model that made the tasks.
        images: (B, 3, S, S).
        tasks: each image's; the same one may come many times.
        topk: classes to report of each image, at most.
    """
    used, params, ids = _params(model, tasks)
    embeddings = [task.embeddings.to(model.device) for task in used]
    logits = class_logits(model, images, params, embeddings, ids)
    return rank(logits, [task.classes for task in tasks], topk)


@torch.no_grad()
def embed_tasks(model: HyperCLIP, images: Tensor, tasks: Sequence[AdaptedTask]) -> Tensor:
    """Image embeddings (B, E) of length 1 of a mixed batch (B, 3, S, S), each by its own task's row."""
    model.check_images(images)
    return model.encode_image(images, _params(model, tasks)[1])


def _params(model: HyperCLIP, tasks: Sequence[AdaptedTask]) -> tuple[list[AdaptedTask], NormParams, Tensor]:
    """The different tasks of a batch, their rows, and each image's place (B,) among them."""
    used = list(dict.fromkeys(tasks))
    places = {task: i for i, task in enumerate(used)}
    ids = torch.tensor([places[task] for task in tasks], device=model.device)
    table = torch.stack([task.row for task in used]).to(model.device)
    return used, NormParams(model.image.norm_spec, table, ids), ids


def class_logits(
    model: HyperCLIP, images: Tensor, params: NormParams, embeddings: Sequence[Tensor], places: Tensor
) -> Tensor:
    """Scaled similarities (B, K) of each image with its own task's classes, -inf beyond a smaller task's classes.

    Args:
        model: the model.
        images: (B, 3, S, S).
        params: each image's row.
        embeddings: (K_t, E) class embeddings of the tasks in the batch.
        places: (B,) each image's task among them.
    """
    features = model.encode_image(images, params)
    classes, mask = pad_classes(embeddings)
    scores = torch.einsum("be,bke->bk", features, classes[places].to(features.dtype))
    return (model.logit_scale.exp() * scores + model.logit_bias).masked_fill(~mask[places], -torch.inf)


def rank(logits: Tensor, classes: Sequence[tuple[str, ...]], topk: Sequence[int]) -> list[Ranked]:
    """The best classes of each image, from logits (B, K) with -inf beyond its task's classes."""
    best, order = logits.topk(min(max(topk), logits.shape[1]), dim=-1)  # probabilities may be 0, as beyond a task
    parts = order.tolist(), logits.softmax(-1).gather(-1, order).tolist(), best.sigmoid().tolist()
    return [
        [(names[i], share, score) for i, share, score in zip(*(column[: min(k, len(names))] for column in columns))]
        for names, k, columns in zip(classes, topk, zip(*parts))
    ]
