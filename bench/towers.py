"""The image towers that are compared: stock timm, naive modulation, ours, and one pass of the stock model a task.

Naive and ours take (images, table (T, P), task_ids (B,)); the others hold their rows and take images alone.
"""

import copy

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.norm_params import NormParams, NormSpec


class StockTower(nn.Module):
    """timm's model as it is."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class OurTower(nn.Module):
    """HyperViT with rows as plain tensors, which is what exporters and ONNX Runtime take."""

    def __init__(self, model: HyperViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, table: Tensor, task_ids: Tensor) -> Tensor:
        return self.model(images, NormParams(self.model.norm_spec, table, task_ids))


class NaiveTower(nn.Module):
    """Per-sample norms as one writes them first: every norm gathers its rows, multiplies and adds."""

    def __init__(self, model: VisionTransformer, spec: NormSpec):
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, images: Tensor, table: Tensor, task_ids: Tensor) -> Tensor:
        model, pieces = self.model, table.split(self.spec.sizes, dim=1)
        rows = dict(zip(self.spec.names, zip(pieces[::2], pieces[1::2])))

        def norm(name: str, module: nn.Module, x: Tensor) -> Tensor:
            if name not in rows:
                return module(x)
            weight, bias = rows[name]
            shape = (-1,) + (1,) * (x.dim() - 2) + (x.shape[-1],)
            normed = F.layer_norm(x, x.shape[-1:], eps=module.eps)
            return normed * weight[task_ids].view(shape) + bias[task_ids].view(shape)

        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for i, block in enumerate(model.blocks):
            x = x + block.drop_path1(block.ls1(block.attn(norm(f"blocks.{i}.norm1", block.norm1, x))))
            x = x + block.drop_path2(block.ls2(block.mlp(norm(f"blocks.{i}.norm2", block.norm2, x))))
        x = model.pool(norm("norm", model.norm, x))
        return model.head(model.head_drop(norm("fc_norm", model.fc_norm, x)))


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
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        pieces = iter(row.split(self.spec.sizes))
        for name in self.spec.names:
            module = twin.get_submodule(name)
            del module.weight, module.bias
            module.weight, module.bias = next(pieces), next(pieces)
        return twin

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([twin(images[place]) for twin, place in zip(self.twins, self.places)])[self.order]
