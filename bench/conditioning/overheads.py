"""What conditioning costs: training images/s of each arm against the baseline's, the hypernetwork alone, and inference.

The arms take turns in one process, so that what slows the machine slows all of them; a ratio is the median over rounds
of baseline's time over theirs, with its quartiles. Memory is what autograd keeps of a forward pass for the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.bench.harness.machine import device_name
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.hyperclip_config import HyperCLIPConfig
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.training.losses import siglip_loss
from hyperclip_fast.utils.timing import interleaved, medians, quartiles, speedup

TASKS, CLASSES, TEXT_DIM = 8, 16, 384
ARMS = {
    "baseline": {"conditioned": False},
    "cross": {},
    "mean": {"hyper_pool": "mean"},
    "learned": {"learned_tokens": 6},
}
TOWERS = {
    "ViT-Ti/16, 96 pixels": {"image_tower": "vit_tiny_patch16_224", "img_size": 96, "hyper_width": 128},
    "the experiment's, width 64": {
        "image_tower": "vit_tiny_r_s16_p8_224",
        "img_size": 48,
        "patch_size": 4,
        "width": 64,
        "depth": 4,
        "num_heads": 4,
        "global_pool": "avg",
        "embed_dim": 64,
        "hyper_width": 64,
        "hyper_depth": 1,
        "hyper_bottleneck": 32,
    },
}


def _model(options: dict[str, Any]) -> HyperCLIP:
    torch.manual_seed(0)
    return HyperCLIP(HyperCLIPConfig(text_dim=TEXT_DIM, **options))


def _inputs(model: HyperCLIP) -> tuple[Tensor, Tensor, Tensor]:
    """Images, text features and task ids of a batch."""
    images = torch.randn(TASKS * CLASSES, 3, model.image_size, model.image_size)
    return images, torch.randn(TASKS, CLASSES, TEXT_DIM), torch.arange(TASKS).repeat_interleave(CLASSES)


def training_step(model: HyperCLIP) -> Callable[[], None]:
    """A function that makes one training step with random data: forward, loss, backward, AdamW."""
    images, features, task_ids = _inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()

    def step() -> None:
        loss = loss_of(model, images, features, task_ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def loss_of(model: HyperCLIP, images: Tensor, features: Tensor, task_ids: Tensor) -> Tensor:
    """The loss of a batch, as training computes it."""
    out = model(images, features, task_ids)
    embeddings = out["image_features"].unflatten(0, features.shape[:2])
    return siglip_loss(embeddings, out["text_features"], out["logit_scale"], out["logit_bias"])


def saved_bytes(model: HyperCLIP) -> int:
    """Bytes that autograd keeps of a forward pass, parameters left out."""
    kept: dict[int, int] = {}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model.train(), *_inputs(model))
    del loss
    return sum(kept.values())


def _training(options: dict[str, Any], seconds: float) -> dict[str, Any]:
    models = {arm: _model({**options, **changes}) for arm, changes in ARMS.items()}
    times = interleaved({arm: training_step(model) for arm, model in models.items()}, 200, 2, True, seconds)
    return {
        arm: {
            "images_per_second": round(TASKS * CLASSES / quartiles(times[arm])[1], 1),
            "ratio": [round(value, 3) for value in speedup(times[arm], times["baseline"])],
            "saved_megabytes": round(saved_bytes(model) / 1e6, 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        for arm, model in models.items()
    }


@torch.inference_mode()
def _inference(options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the hypernetwork for 16 and for 1,000 names, and of a batch adapted, mixed and unadapted."""
    model = _model(options).eval()
    images, features, task_ids = _inputs(model)
    many = torch.randn(1, 1000, TEXT_DIM)
    mixed = model.rows(features)
    one = NormParams(mixed.spec, mixed.table[:1])
    candidates = {
        "hypernetwork, one task of 16 names": lambda: model.rows(features[:1]),
        "hypernetwork, one task of 1,000 names": lambda: model.rows(many),
        "encoder, unadapted": lambda: model.encode_image(images),
        "encoder, one task's row": lambda: model.encode_image(images, one),
        "encoder, mixed batch of 8 tasks": lambda: model.encode_image(images, mixed[task_ids]),
    }
    times = medians(interleaved(candidates, 40, 2, seconds=10))
    return {name: round(1000 * value, 2) for name, value in times.items()}


def measure_overheads(seconds: float) -> dict[str, Any]:
    """All figures, by tower."""
    towers = {
        name: {"training": _training(options, seconds / len(TOWERS)), "milliseconds": _inference(options)}
        for name, options in TOWERS.items()
    }
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return {"machine": machine, "tasks": TASKS, "classes": CLASSES, "towers": towers}


def overheads_table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = [f"{figures['machine']}; batches of {figures['tasks']} tasks with {figures['classes']} images each."]
    for name, tower in figures["towers"].items():
        lines = [f"| {name} | images/s in training | of the baseline's | kept for backward, MB | parameters |"]
        lines.append("|---|---|---|---|---|")
        for arm, one in tower["training"].items():
            low, middle, high = one["ratio"]
            cells = f"{one['images_per_second']:.0f} | {middle:.3f} ({low:.3f} to {high:.3f})"
            lines.append(f"| {arm} | {cells} | {one['saved_megabytes']} | {one['parameters']:,} |")
        parts.append("\n".join(lines))
        lines = [f"| {name} | milliseconds |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in tower["milliseconds"].items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
