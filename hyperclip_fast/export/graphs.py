"""What is exported: the three parts of a HyperCLIP as modules on plain tensors, which any exporter takes.

    specialized   images (B, 3, S, S) -> logits (B, K): a stock timm model with one task baked in, and its classifier
    mixed         images (B, 3, S, S), table (T, P), task_ids (B,) -> embeddings (B, E): one file for every task
    text          tokens (K, M, L) of K class names in M templates -> row (P,), class_embeddings (K, E)

A task made by `text` is a row of `mixed`'s table; an image's logits are logit_scale * embedding @ class_embeddings.T +
logit_bias, with the two numbers in the file's metadata. Tokenizers stay outside: `TextTower.fill` and `tokenize` show
what goes in. All is float32 on the CPU, where each operation is its plain PyTorch reference.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperclip_fast.hyper_encoder import HyperEncoder
from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.version import __version__


@dataclass(frozen=True)
class Graph:
    """One part, ready for an exporter.

    Args:
        module: what is exported, in eval mode.
        axes: names of the inputs in order, each with its dynamic axes: {"images": {0: "B"}}.
        outputs: names of the outputs.
        inputs: n -> example inputs of a size that grows with n; no two n give a dynamic axis the same length.
        metadata: what a user of the file needs to know, as strings.
        largest: lengths that an axis cannot exceed, by its name.
    """

    module: nn.Module
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    inputs: Callable[[int], tuple[Tensor, ...]]
    metadata: dict[str, str]
    largest: dict[str, int] = field(default_factory=dict)


class SpecializedTower(nn.Module):
    """Images (B, 3, S, S) to the logits (B, K) of one task.

    Args:
        encoder: a timm model that holds the task's row; its output is (B, E).
        class_embeddings: (K, E), of length 1.
        logit_scale: the factor, a scalar.
        logit_bias: a scalar.
    """

    classifier: Tensor
    bias: Tensor

    def __init__(self, encoder: nn.Module, class_embeddings: Tensor, logit_scale: Tensor, logit_bias: Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("classifier", (logit_scale * class_embeddings).clone())  # (K, E)
        self.register_buffer("bias", logit_bias.clone())

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(F.normalize(self.encoder(images), dim=-1), self.classifier) + self.bias


class MixedTower(nn.Module):
    """Images (B, 3, S, S), table (T, P) and task_ids (B,) to embeddings (B, E) of length 1."""

    def __init__(self, encoder: HyperViT | HyperEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, table: Tensor, task_ids: Tensor) -> Tensor:
        return F.normalize(self.encoder(images, NormParams(self.encoder.norm_spec, table, task_ids)), dim=-1)


class TaskMaker(nn.Module):
    """Tokens (K, M, L) of a task's class names to its row (P,) and class embeddings (K, E)."""

    def __init__(self, model: HyperCLIP):
        super().__init__()
        self.model, self.text_tower = model, model.text_tower

    def forward(self, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        each = self.text_tower(*(part.flatten(0, 1) for part in tokens))
        features = self.text_tower.average(each.unflatten(0, tokens[0].shape[:2]))
        return self.model.rows(features.unsqueeze(0)).table[0], self.model.project_text(features)


@torch.no_grad()
def specialized_graph(model: HyperCLIP, class_names: Sequence[str]) -> Graph:
    """The encoder with one task's row and classifier.

    Args:
        model: what to specialise.
        class_names: the task.

    Raises:
        ValueError: for no class names, or a model that is not float32 on the CPU.
    """
    _check(model)
    tower = SpecializedTower(
        model.specialize(class_names), model.encode_text(class_names), model.logit_scale.exp(), model.logit_bias
    )
    return Graph(
        tower.eval(),
        {"images": {0: "B"}},
        ("logits",),
        lambda n: (_images(model, n + 1),),
        {**_about_images(model), "labels": json.dumps(list(class_names), ensure_ascii=False)},
    )


def mixed_graph(model: HyperCLIP) -> Graph:
    """The encoder that takes rows and task ids as inputs.

    Args:
        model: put in eval mode.

    Raises:
        ValueError: for a model that is not float32 on the CPU.
    """
    _check(model)
    base = model.image.base_params.table.detach()

    def inputs(n: int) -> tuple[Tensor, ...]:
        noise = torch.randn(2 * n + 3, base.shape[1], generator=torch.Generator().manual_seed(n))
        return _images(model, n + 1), base + 0.1 * noise, torch.arange(n + 1).flip(0)

    return Graph(
        MixedTower(model.image).eval(),
        {"images": {0: "B"}, "table": {0: "T"}, "task_ids": {0: "B"}},
        ("embeddings",),
        inputs,
        {**_about_images(model), **_about_scores(model), "norm_spec": model.image.norm_spec.to_json()},
    )


def text_graph(model: HyperCLIP) -> Graph:
    """Text tower, hypernetwork and projection: from the tokens of class names to a task.

    Args:
        model: put in eval mode.

    Raises:
        ValueError: for a model that is not float32 on the CPU.
    """
    _check(model)
    tower = model.text_tower

    def inputs(n: int) -> tuple[Tensor, ...]:
        names = ["word " * (2 * n + i) for i in range(n + 1)]
        tokens = tower.tokenize(tower.fill(names))
        return tuple(part.unflatten(0, (len(names), -1)) for part in tokens.values())

    names = list(tower.tokenize(["word"]))
    lengths = [{part.shape[2] for part in inputs(n)} for n in (1, 2)]
    axes = {0: "K", 2: "L"} if lengths[0] != lengths[1] else {0: "K"}  # CLIP's tokenizer pads to one length
    about = {
        "text_tower": model.config.text_tower,
        "templates": json.dumps(list(tower.templates), ensure_ascii=False),
        "norm_spec": model.image.norm_spec.to_json(),
    }
    return Graph(
        TaskMaker(model).eval(),
        dict.fromkeys(names, axes),
        ("row", "class_embeddings"),
        inputs,
        {**_about_scores(model), **about},
        {"L": tower.context_length} if 2 in axes else {},
    )


def _check(model: HyperCLIP) -> None:
    weight = model.logit_scale
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError(f"model must be float32 on the CPU to be exported, got {weight.dtype} on {weight.device}")


def _images(model: HyperCLIP, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, model.image_size, model.image_size, generator=generator) * 2 - 1


def _about_images(model: HyperCLIP) -> dict[str, str]:
    return {
        "hyperclip_fast": __version__,
        "image_tower": model.config.image_tower,
        "image_size": str(model.image_size),
        "mean": json.dumps(model.config.mean),
        "std": json.dumps(model.config.std),
    }


def _about_scores(model: HyperCLIP) -> dict[str, str]:
    return {
        "hyperclip_fast": __version__,
        "logit_scale": repr(model.logit_scale.exp().item()),
        "logit_bias": repr(model.logit_bias.item()),
    }
