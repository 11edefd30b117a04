"""SigLIP's sigmoid loss (arXiv 2303.15343) over the tasks of a mixed batch.

    loss = mean over tasks of 1/N sum over images i, classes j of softplus(-z_ij (s x_i . y_j + b))

with z_ij = 1 where image i shows class j, else -1.

Whole, it keeps (N, K) matrices for backward. In chunks, loss and gradients are computed together, a few rows at a time,
and only the gradients are kept: (N + K) E numbers, whatever the batch.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyperclip_fast.utils.extras import require


def siglip_loss(
    image_features: Tensor | Sequence[Tensor],
    text_features: Tensor | Sequence[Tensor],
    logit_scale: Tensor,
    logit_bias: Tensor,
    labels: Sequence[Tensor] | None = None,
    chunk: int = 0,
) -> Tensor:
    """The loss within each task, averaged over the tasks; open_clip's SigLipLoss where there is an image a class.

    An image is adapted to its own task and will be scored against that task's classes only, so other tasks' classes are
    no negatives: some of them may even carry its name.

    Args:
        image_features: (G, N, E) or G of (N_t, E), of length 1.
        text_features: (G, K, E) or G of (K_t, E), of length 1.
        logit_scale: the factor.
        logit_bias: added to the scaled similarities.
        labels: (N_t,) for each task, the class of each image; None: image k of a task shows class k.
        chunk: images of a task whose similarities are held at once; 0: all.

    Returns:
        The mean over tasks of the loss summed over classes and averaged over images, as open_clip does.

    Raises:
        ValueError: for other shapes.
    """
    tasks = [labels] if labels is None else list(labels)
    _check(image_features, text_features, labels)
    if labels is None and not chunk:
        loss = require("open_clip.loss", "clip").SigLipLoss()
        pairs = zip(image_features, text_features)
        return sum(loss(images, texts, logit_scale, logit_bias) for images, texts in pairs) / len(image_features)
    if labels is None:
        tasks = [torch.arange(len(images), device=images.device) for images in image_features]
    parts = [
        _ChunkedSigLip.apply(images, texts, logit_scale, logit_bias, shown, chunk or len(images))
        for images, texts, shown in zip(image_features, text_features, tasks)
    ]
    return sum(parts) / len(parts)


def _check(image_features, text_features, labels) -> None:
    images, texts = ([tuple(task.shape) for task in features] for features in (image_features, text_features))
    shown = [task[:1] for task in (texts if labels is None else images)]
    wanted = [tuple(task.shape) for task in labels] if labels is not None else [task[:1] for task in images]
    if (
        not images
        or len(images) != len(texts)
        or shown != wanted
        or any(len(x) != 2 or len(y) != 2 or x[1] != y[1] for x, y in zip(images, texts))
    ):
        raise ValueError(
            "image_features and text_features must be (G, K, E), or one (N, E) and (K, E) a task with labels (N,), got "
            f"{images}, {texts}, {None if labels is None else wanted}"
        )


class _ChunkedSigLip(torch.autograd.Function):
    """Loss of images (N, E) against texts (K, E), with its gradients, `chunk` images at a time."""

    @staticmethod
    def forward(ctx, images, texts, scale, bias, labels, chunk):
        grad_images, grad_texts = torch.empty_like(images), torch.zeros_like(texts)
        loss, grad_bias = (torch.zeros((), dtype=images.dtype, device=images.device) for _ in range(2))
        for start in range(0, len(images), chunk):
            rows, shown = images[start : start + chunk], labels[start : start + chunk, None]
            logits = (rows @ texts.T).mul_(scale).add_(bias)
            logits.scatter_(1, shown, -logits.gather(1, shown))
            loss -= F.logsigmoid(-logits).sum()
            grad = logits.sigmoid_()
            grad.scatter_(1, shown, -grad.gather(1, shown))
            torch.mm(grad, texts, out=grad_images[start : start + chunk])
            grad_texts.addmm_(grad.T, rows)
            grad_bias += grad.sum()
        grad_scale = (grad_images * images).sum()
        grads = (grad_images.mul_(scale), grad_texts.mul_(scale), grad_scale, grad_bias)
        ctx.save_for_backward(*(grad.div_(len(images)) for grad in grads))
        return loss / len(images)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return (*(grad * grad_loss for grad in ctx.saved_tensors), None, None)


def balanced_bias(classes: float) -> float:
    """The logit bias at which a new model's loss pulls the bias neither way: -log(K - 1).

    A new model's similarities are near 0, so every logit is b. An image then pulls with -sigmoid(-b) for its own class
    and sigmoid(b) for each of the K - 1 others: in sum 0 where sigmoid(b) = 1 / K. The loss starts near 1 + log K. For
    the paper's 32k pairs this is -10.4, near its -10; at K = 16 it is -2.7.

    Args:
        classes: K, or its mean over tasks.
    """
    return -math.log(classes - 1)
