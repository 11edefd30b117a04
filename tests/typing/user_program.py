"""What a user's program looks like to a type checker; `make types` reads it, nobody runs it.

A line with `type: ignore` is wrong, and mypy must say so: it refuses an `ignore` that nothing needs.
"""

import torch
from torch import Tensor

from hyperclip_fast import HyperCLIP, HyperViT, NormParams, NormSpec, TaskBank
from hyperclip_fast.kernels.layer_norm import layer_norm


def mixed_batch(images: Tensor, table: Tensor, task_ids: Tensor) -> Tensor:
    vit = HyperViT.from_timm("vit_tiny_patch16_224", num_classes=0)
    spec: NormSpec = vit.norm_spec
    params = NormParams(spec, table, task_ids)
    weight, bias = params.layer(0)
    assert bias is not None
    out: Tensor = layer_norm(torch.zeros(2, 3, weight.shape[1]), weight, bias, task_ids)
    return vit(images, params) + out.mean()


def classify(images: Tensor, folder: str) -> list[str]:
    model = HyperCLIP.from_pretrained(folder)
    bank = TaskBank(model)
    bank.add("pets", ["cat", "dog"])
    bank.save(folder)
    return [prediction.names[0] for prediction in TaskBank.load(folder, model).classify(images, ["pets"], topk=1)]


def mistakes(vit: HyperViT, model: HyperCLIP, images: Tensor) -> None:
    NormParams(images, images)  # type: ignore[arg-type]
    vit.forward(images, images)  # type: ignore[arg-type]
    layer_norm(images, images)  # type: ignore[call-arg]
    TaskBank(model).add("pets", 3)  # type: ignore[arg-type]
    model.adapt(7)  # type: ignore[arg-type]
    NormParams.from_state_dict(vit, spec=vit.base_params)  # type: ignore[arg-type]
