"""The gradients of a whole batch with a part of it in memory at a time (GradCache, arXiv 2101.06983).

Every image is compared with every class of its task, so a part's loss alone would not do. All images are embedded
without a graph, and the loss gives the gradient at each embedding. Each part is then run again with a graph that starts
from its share of that gradient. Rows are generated once; the parts' gradients at the rows add up and go through the
hypernetwork in one pass. A text tower that is trained runs in parts, too. Running statistics of BatchNorms move in the
second pass only, once a part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.training.objective import Inputs, Objective
from hyperclip_fast.utils.private_api import BatchNorm
from hyperclip_fast.utils.seeds import hash_seed


def backward_in_parts(
    objective: Objective, inputs: Inputs, parts: int, seed: int, scaled: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Loss and gradients of a batch, in parts; see the module's text.

    Args:
        objective: not wrapped; gradients are added to its parameters' own.
        inputs: the batch.
        parts: how many; at most one an image.
        seed: of dropout, drawn anew for each part and the same in both of its passes.
        scaled: what is done to the loss before backward.

    Returns:
        Loss and accuracy, without a graph.
    """
    parts = min(parts, len(inputs.images))
    texts = _split(inputs.texts, parts) if inputs.table is None else []
    images = list(zip(inputs.images.tensor_split(parts), inputs.task_ids.tensor_split(parts)))

    def encode(i: int) -> Tensor:
        torch.manual_seed(hash_seed(seed, i))
        return objective.text_features(texts[i])

    table = inputs.table
    if table is None:
        table = _without_graph([partial(encode, i) for i in range(len(texts))])
    features = objective.gather_text_features(table, inputs)
    leaf = features.detach().requires_grad_(features.requires_grad)
    params, classes = objective.rows_and_classes(leaf, inputs.mask)
    rows = params.table.detach().requires_grad_(params.table.requires_grad)

    def embed(i: int) -> Tensor:
        torch.manual_seed(hash_seed(seed, i))
        return objective.embed_images(images[i][0], NormParams(params.spec, rows, images[i][1]))

    with _statistics_kept(objective):
        embeddings = _without_graph([partial(embed, i) for i in range(parts)])
    loss, accuracy = objective.loss_and_accuracy(embeddings, classes, inputs)
    loss = loss + objective.row_loss(rows)
    scaled(loss).backward()
    assert embeddings.grad is not None  # backward has just written it
    for i, grad in enumerate(embeddings.grad.tensor_split(parts)):
        if (again := embed(i)).requires_grad:
            again.backward(grad)
    if rows.grad is not None:
        params.table.backward(rows.grad)
    if leaf.grad is not None:
        features.backward(leaf.grad)
        grads = () if table.grad is None else table.grad.split([len(part) for part in texts])
        for i, grad in enumerate(grads):
            encode(i).backward(grad)
    return loss.detach(), accuracy


def _split(texts: tuple[str, ...], parts: int) -> list[tuple[str, ...]]:
    size = -(-len(texts) // parts)
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _without_graph(parts: list[Callable[[], Tensor]]) -> Tensor:
    """The parts' results in one tensor, from which a new graph starts."""
    with torch.no_grad():
        return torch.cat([part() for part in parts]).requires_grad_()


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorms in training mode use the batch's statistics, and their running ones stay as they are."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm) and part.track_running_stats]
    norms = [norm for norm in norms if norm.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
