"""One training step's forward pass: class names -> rows -> images -> loss.

`Objective.forward` runs its stages one after the other; `grad_cache` runs the same stages in parts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperclip_fast.data.batch import Batch, Share
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.training.distributed import gather_texts
from hyperclip_fast.training.losses import siglip_loss

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """A batch on the device. Texts that occur twice are encoded once: `index` says which text a class is.

    Args:
        images: (B, 3, S, S).
        task_ids: (B,) int64.
        counts: images of each task.
        sizes: classes of each task.
        labels: (B,) int64, class of each image among its task's.
        paired: image k of every task shows class k, and there are no others.
        index: (G, K) int64, index into the texts; anything on padding.
        mask: (G, K) bool, False on padding; None: there is none.
        texts: what to encode, for a text tower that is trained; else empty.
        table: (U, E_text) what the texts are encoded to, for one that is not.
    """

    images: Tensor
    task_ids: Tensor
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    labels: Tensor
    paired: bool
    index: Tensor
    mask: Tensor | None
    texts: tuple[str, ...] = ()
    table: Tensor | None = None

    @classmethod
    def make(cls, batch: Batch, places: dict[str, int], device: torch.device, table: Tensor | None = None) -> "Inputs":
        """The inputs of a batch.

        Args:
            batch: of a source.
            places: the index of every text.
            device: where the model is.
            table: (U, E_text) the texts' features; None: the objective encodes them.
        """
        sizes = tuple(len(task) for task in batch.classes)
        index = torch.zeros(len(sizes), max(sizes), dtype=torch.long)
        for row, task in zip(index, batch.classes):
            row[: len(task)] = torch.tensor([places[text] for text in task])
        padded = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        paired = sizes == batch.counts and torch.equal(batch.labels, torch.cat([torch.arange(n) for n in sizes]))
        move: dict[str, Any] = {"device": device, "non_blocking": True}
        return cls(
            images=batch.images.to(**move),
            task_ids=batch.task_ids.to(**move),
            counts=batch.counts,
            sizes=sizes,
            labels=batch.labels.to(**move),
            paired=paired,
            index=index.to(**move),
            mask=None if min(sizes) == max(sizes) else padded.to(**move),
            texts=() if table is not None else tuple(places),
            table=table,
        )


class Objective(nn.Module):
    """A model with its loss: what DDP and FSDP wrap.

    Args:
        model: what is trained.
        share: of this process.
        spans: every batch is one task, whose pairs lie on all processes: texts are brought together.
        chunk: see `siglip_loss`.
        precision: "float32", or a dtype of autocast.
        row_penalty: factor of the rows' distance from the base row, see TrainConfig.
    """

    def __init__(
        self,
        model: HyperCLIP,
        share: Share,
        spans: bool = False,
        chunk: int = 0,
        precision: str = "float32",
        row_penalty: float = 0.0,
    ):
        super().__init__()
        self.model, self.share, self.spans, self.chunk, self.precision = model, share, spans, chunk, precision
        self.row_penalty = row_penalty

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Loss of a batch and its accuracy within the tasks."""
        table = self.text_features(inputs.texts) if inputs.table is None else inputs.table
        params, classes = self.rows_and_classes(self.gather_text_features(table, inputs), inputs.mask)
        images = self.embed_images(inputs.images, params[inputs.task_ids])
        loss, accuracy = self.loss_and_accuracy(images, classes, inputs)
        return loss + self.row_loss(params.table), accuracy

    def _autocast(self) -> AbstractContextManager:
        """The precision of the towers."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.model.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts to features (U, E_text)."""
        with self._autocast():
            return self.model.text_features(texts)

    def rows_and_classes(self, features: Tensor, mask: Tensor | None) -> tuple[NormParams, Tensor]:
        """Features (G, K, E_text) of the tasks' classes to a row a task and class embeddings (G, K, E)."""
        with self._autocast():
            return self.model.rows(features, mask), self.model.project_text(features)

    def row_loss(self, table: Tensor) -> Tensor | float:
        """What rows (G, P) cost: their squared distance from the base row, which itself is free to move."""
        if not self.row_penalty:
            return 0.0
        return self.row_penalty * (table - self.model.image.base_params.table).square().sum(1).mean()

    def embed_images(self, images: Tensor, params: NormParams) -> Tensor:
        """Images (B, 3, S, S), each with its row, to embeddings (B, E)."""
        with self._autocast():
            return self.model.encode_image(images, params)

    def gather_text_features(self, table: Tensor, inputs: Inputs) -> Tensor:
        """Features (U, E_text) of texts to those of the tasks' classes (G, K, E_text), all processes' if it spans."""
        features = table[inputs.index]
        return gather_texts(features) if self.spans else features

    def loss_and_accuracy(self, images: Tensor, classes: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of image embeddings (B, E) and class embeddings (G, K, E), in float32."""
        with torch.autocast(images.device.type, enabled=False):
            pictures, classes = images.float().split(inputs.counts), classes.float()
            sizes = (classes.shape[1],) if self.spans else inputs.sizes
            texts = [task[:size] for task, size in zip(classes, sizes)]
            labels = (inputs.labels + self.share.rank * inputs.sizes[0] * self.spans).split(inputs.counts)
            known = None if inputs.paired and not self.spans else labels
            scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
            loss = siglip_loss(pictures, texts, scale, bias, known, self.chunk)
            return loss, _accuracy(pictures, texts, labels, self.chunk)


@torch.no_grad()
def _accuracy(images: tuple[Tensor, ...], texts: list[Tensor], labels: tuple[Tensor, ...], chunk: int) -> Tensor:
    """Share of images whose own class is the most similar one of its task, averaged over tasks."""
    shares = []
    for task, classes, shown in zip(images, texts, labels):
        best = [(rows @ classes.T).argmax(1) for rows in task.split(chunk or len(task))]
        shares.append((torch.cat(best) == shown).float().mean())
    return torch.stack(shares).mean()
