"""The image towers that are compared: stock timm, naive modulation, ours, and one pass of the stock model a task.

Naive and ours take (images, table (T, P), task_ids (B,)); the others hold their rows and take images alone.
"""

import copy

import torch
from torch import Tensor, nn

from hyperclip_fast.hyper_encoder import HyperEncoder
from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.modulated_norms import ROW_NORMS
from hyperclip_fast.norm_params import NormParams, NormSpec


class StockTower(nn.Module):
    """timm's model as it is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class OurTower(nn.Module):
    """HyperViT or HyperEncoder with rows as plain tensors, which is what exporters and ONNX Runtime take."""

    def __init__(self, model: HyperViT | HyperEncoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, table: Tensor, task_ids: Tensor) -> Tensor:
        return self.model(images, NormParams(self.model.norm_spec, table, task_ids))


class NaiveTower(nn.Module):
    """Per-sample norms as one writes them first: every norm gathers its rows, multiplies and adds.

    Args:
        model: a stock model; all weights but the norms' are shared with it.
        spec: the norms.
    """

    def __init__(self, model: nn.Module, spec: NormSpec):
        super().__init__()
        self.model, self.spec = _copy_sharing(model), spec
        self.norms = [NaiveNorm(self.model.get_submodule(name)) for name in spec.names]
        for name, norm in zip(spec.names, self.norms):
            self.model.set_submodule(name, norm)

    def forward(self, images: Tensor, table: Tensor, task_ids: Tensor) -> Tensor:
        for norm, (weight, bias) in zip(self.norms, NormParams(self.spec, table).layers()):
            norm.rows = (weight[task_ids], None if bias is None else bias[task_ids])
        out = self.model(images)
        for norm in self.norms:  # rows that stayed would keep the table's autograd graph, which no CUDA graph may meet
            norm.rows = norm.own
        return out


class NaiveNorm(nn.Module):
    """A norm without weight and bias, then each sample's own, then what timm keeps behind it in the same module.

    Its weight is what it was, for models that look at it.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.first = norm.weight, ROW_NORMS[type(norm)].channels_first
        self.behind = nn.Sequential(*(getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)))
        for name in ("drop", "act"):
            if hasattr(norm, name):
                setattr(norm, name, nn.Identity())
        self.norm = norm
        norm.weight = None
        if hasattr(norm, "bias"):
            norm.bias = None
        self.own: tuple[Tensor, Tensor | None] = (self.weight.detach().unsqueeze(0), None)
        self.rows = self.own

    def forward(self, x: Tensor) -> Tensor:
        rows = (None if row is None else row.repeat_interleave(len(x) // len(row), 0) for row in self.rows)
        shape = [len(x)] + [1] * (x.dim() - 1)
        shape[1 if self.first else -1] = len(self.weight)
        weight, bias = (0 if row is None else row.view(shape) for row in rows)
        return self.behind(self.norm(x) * weight + bias)


def _copy_sharing(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are the model's."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class LoopTower(nn.Module):
    """One pass a task: a model of its own for each task in the batch, run on that task's images.

    The models share all weights but the norms', which are views of the table: a thousand of them fit, and gradients
    reach the table.
    """

    def __init__(self, model: nn.Module, spec: NormSpec, table: Tensor, task_ids: Tensor):
        super().__init__()
        self.spec, tasks = spec, task_ids.unique().tolist()
        self.places = [torch.nonzero(task_ids == task).squeeze(1) for task in tasks]
        self.order = torch.cat(self.places).argsort()
        self.twins = [self._twin(model, table[task]) for task in tasks]

    def _twin(self, model: nn.Module, row: Tensor) -> nn.Module:
        twin = _copy_sharing(model)
        for key, piece in zip(self.spec.keys, row.split(self.spec.sizes)):
            name, _, kind = key.rpartition(".")
            module = twin.get_submodule(name)
            delattr(module, kind)
            setattr(module, kind, piece)
        return twin

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([twin(images[place]) for twin, place in zip(self.twins, self.places)])[self.order]
