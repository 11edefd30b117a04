"""Which patch holds which class: zero-shot segmentation by patches, from `forward_intermediates`.

A scene has four objects of one task, one in each quarter; or nine, where the patches a side are a multiple of 3 and no
even number. Every patch token is projected as the pooled token is, and compared with the class names. Two figures: mIoU
over the patches that are covered by an object, each given the nearest class; pointing accuracy, the share of objects
whose own name is nearest to a patch that the object covers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hyperclip_fast.data.augmentation import normalize, to_rgb
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.pictures import load_pictures
from hyperclip_fast.evaluation.swapping import row_names
from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams

ROW_SOURCES = ("right", "base", "wrong")
COVERED = 0.25  # of a patch, for it to count as an object's


def compose(
    task: EvalTask, scenes: int, size: int, generator: torch.Generator, side: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes of `side` x `side` objects of different classes.

    Returns:
        images (M, 3, S, S) in [-1, 1]; classes (M, side²), of the cells line by line; cover (M, S, S) in [0, 1].
    """
    names, count = len(task.class_names), side * side
    per_scene = torch.stack([torch.randperm(names, generator=generator)[:count] for _ in range(scenes)])
    wanted = per_scene.flatten()
    chance = torch.rand(len(wanted), len(task.labels), generator=generator)
    which = chance.masked_fill(wanted[:, None] != task.labels, -1).argmax(1)
    pictures = F.interpolate(task.images[which].float(), (size // side, size // side), mode="area").round().byte()
    rgba = rearrange(pictures, "(m i j) c h w -> m c (i h) (j w)", i=side, j=side)
    return to_rgb(rgba), per_scene, rgba[:, 3].float() / 255


def _vision_transformer(model: HyperCLIP) -> HyperViT:
    if not isinstance(model.image, HyperViT):
        raise ValueError(f"model must have a VisionTransformer for dense evaluation, got {type(model.image).__name__}")
    return model.image


def _objects_a_side(grid: tuple[int, int]) -> int:
    for side in (2, 3):
        if not any(patches % side for patches in grid):
            return side
    raise ValueError(f"model must have a multiple of 2 or 3 patches a side, got {grid}")


def patch_embeddings(model: HyperCLIP, images: Tensor, params: NormParams) -> Tensor:
    """(B, h, w, E) of length 1: every patch token of the last block, through final norm and head.

    Args:
        model: whose image tower is a HyperViT.
        images: (B, 3, S, S).
        params: rows, with task ids (B,).

    Raises:
        ValueError: for rows without task ids, or another image tower.
    """
    if params.task_ids is None:
        raise ValueError("params must have task ids, got none")
    image = _vision_transformer(model)
    (features,) = image.get_intermediate_layers(images, 1, reshape=True, norm=True, params=params)
    tokens = features.permute(0, 2, 3, 1)  # (B, h, w, D)
    alone = tokens.reshape(-1, 1, tokens.shape[-1]).expand(-1, 1 + image.num_prefix_tokens, -1)  # whatever the pooling
    ids = params.task_ids.repeat_interleave(tokens.shape[1] * tokens.shape[2])
    return F.normalize(image.forward_head(alone, params=params[ids]), dim=-1).view(*tokens.shape[:3], -1)


def patch_labels(classes: Tensor, cover: Tensor, grid: tuple[int, int]) -> Tensor:
    """(M, h, w) class of each patch, -1 where no object covers COVERED of it.

    Args:
        classes: (M, side²) of the scene's cells.
        cover: (M, S, S) in [0, 1].
        grid: h and w, multiples of side.
    """
    side = math.isqrt(classes.shape[1])
    labels = F.interpolate(classes.view(-1, 1, side, side).float(), grid, mode="nearest")[:, 0].long()
    return labels.masked_fill(F.adaptive_avg_pool2d(cover[:, None], grid)[:, 0] < COVERED, -1)


def figures(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """mIoU and pointing accuracy of one task.

    Args:
        scores: (M, h, w, K).
        labels: (M, h, w), -1 where nothing is asked.
    """
    asked = labels >= 0
    best, truth = scores.argmax(-1)[asked], labels[asked]
    shares = []
    for k in truth.unique():
        either = ((best == k) | (truth == k)).sum()
        shares.append(((best == k) & (truth == k)).sum() / either)
    hits = []
    for score, label in zip(scores.flatten(1, 2), labels.flatten(1)):
        present = label[label >= 0].unique()
        hits.append((label[score[:, present].argmax(0)] == present).float())
    return float(torch.stack(shares).mean()), float(torch.cat(hits).mean())


@torch.inference_mode()
def dense_scores(
    model: HyperCLIP, tasks: Sequence[EvalTask] | None = None, classes: int = 10, scenes: int = 24, seed: int = 0
) -> dict[str, Any]:
    """mIoU and pointing accuracy for each of ROW_SOURCES, averaged over tasks.

    Args:
        model: in eval mode.
        tasks: pictures and names; None: OpenMoji's held-out names.
        classes: names of a task, where `tasks` is None.
        scenes: M of each task.
        seed: of the scenes.

    Raises:
        ValueError: for an image tower that is no VisionTransformer, whose patches a side are a multiple of neither 2
            nor 3, or tasks without enough names.
    """
    grid = _vision_transformer(model).patch_embed.grid_size
    side = _objects_a_side(grid)
    if tasks is None:
        tasks = held_out_tasks(load_pictures(("openmoji",)), classes)
    tasks = [task for task in tasks if len(task.class_names) >= side * side]
    if not tasks:
        raise ValueError(f"tasks must have one of at least {side * side} names, got none")
    generator = torch.Generator().manual_seed(seed)
    drawn = [compose(task, scenes, model.image_size, generator, side) for task in tasks]
    result: dict[str, Any] = {"tasks": len(tasks), "scenes": scenes * len(tasks), "objects": side * side}
    result["guessing"] = _guessing(tasks, drawn, grid)
    base = model.image.base_params
    for row in ROW_SOURCES:
        params = base if row == "base" else model.adapt(row_names(tasks, row))
        found = []
        for t, (task, (images, which, cover)) in enumerate(zip(tasks, drawn)):
            ids = torch.full((len(images),), 0 if row == "base" else t)
            images = normalize(images, model.preprocessing).to(model.device)
            patches = patch_embeddings(model, images, params[ids])
            labels = patch_labels(which, cover, grid)
            found.append(figures((patches @ model.encode_text(task.class_names).T).cpu(), labels))
        miou, pointing = (sum(values) / len(values) for values in zip(*found))
        result[row] = {"miou": miou, "pointing": pointing}
    return result


def _guessing(tasks: Sequence[EvalTask], drawn: Sequence[tuple[Tensor, Tensor, Tensor]], grid) -> dict[str, float]:
    """The figures of random scores, the mean of five draws."""
    generator, found = torch.Generator().manual_seed(0), []
    for task, (_, which, cover) in list(zip(tasks, drawn)) * 5:
        labels = patch_labels(which, cover, grid)
        found.append(figures(torch.rand(*labels.shape, len(task.class_names), generator=generator), labels))
    miou, pointing = (sum(values) / len(values) for values in zip(*found))
    return {"miou": miou, "pointing": pointing}


def dense_table(result: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [
        f"{result['scenes']} scenes of {result['objects']} objects, {result['tasks']} tasks",
        f"{'row':<10}{'mIoU':>8}{'pointing':>10}",
    ]
    lines += [f"{row:<10}{result[row]['miou']:>8.1%}{result[row]['pointing']:>10.1%}" for row in ROW_SOURCES]
    lines += [f"{'guessing':<10}{result['guessing']['miou']:>8.1%}{result['guessing']['pointing']:>10.1%}"]
    return "\n".join(lines)
