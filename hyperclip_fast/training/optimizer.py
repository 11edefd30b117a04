"""What is trained at which rate: parts of the model, AdamW's groups, schedules."""

import math
from typing import Any

import torch
from timm.models import group_parameters
from torch import Tensor

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.training.config import PARTS, TrainConfig
from hyperclip_fast.training.distributed import is_sharded, whole

PREFIXES = {"image": "image", "text": "text", "text_projection": "text", "hypernetwork": "hypernetwork"}


def part_of(name: str) -> str:
    """The part, one of PARTS, that a parameter of HyperCLIP belongs to."""
    return PREFIXES.get(name.partition(".")[0], "logit")


def freeze(model: HyperCLIP, parts: tuple[str, ...]) -> None:
    """Turn off the gradients of these parts; the norms' own weights, where rows start, are the image tower's."""
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def train_mode(model: HyperCLIP, frozen: tuple[str, ...]) -> None:
    """Train mode for what is trained: a frozen tower drops nothing."""
    model.train()
    for module, part in ((model.image, "image"), (model.text, "text"), (model.hypernetwork, "hypernetwork")):
        if part in frozen and module is not None:
            module.eval()


def create_optimizer(model: HyperCLIP, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a group for each pair of rate and weight decay, apart for what FSDP does not shard.

    Raises:
        ValueError: where every part is frozen.
    """
    spared = {f"image.{name}" for name in model.image.no_weight_decay()}
    scales = _layer_scales(model.image, config.image_layer_decay) if config.image_layer_decay < 1 else {}
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr, decay = _rates(part_of(name), config)
            lr *= scales.get(name, 1.0)
            decay = 0.0 if parameter.ndim <= 1 or name in spared else decay
            groups.setdefault((lr, decay, is_sharded(parameter)), []).append(parameter)
    if not groups:
        raise ValueError(f"freeze must leave a part to train, got {config.freeze}")
    settings: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "lr": lr, "lr_scale": lr / config.lr}
        for (lr, decay, _), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas)


def _layer_scales(image: Any, decay: float) -> dict[str, float]:
    """What each of the image tower's parameters has of its learning rate: all in the last of timm's layers.

    Raises:
        ValueError: for a tower whose layers timm does not know.
    """
    if not hasattr(image, "group_matcher"):
        raise ValueError(f"image_layer_decay must be 1, as timm knows no layers of {type(image).__name__}, got {decay}")
    layers = group_parameters(image, image.group_matcher(coarse=False), reverse=True)
    return {f"image.{name}": decay ** (max(layers.values()) - layer) for name, layer in layers.items()}


def _rates(part: str, config: TrainConfig) -> tuple[float, float]:
    """Peak learning rate and weight decay of a part."""
    own = {
        "image": (config.image_lr, config.image_weight_decay),
        "text": (config.text_lr, config.text_weight_decay),
        "hypernetwork": (config.hyper_lr, config.hyper_weight_decay),
    }
    lr, decay = own.get(part, (None, None))
    return config.lr if lr is None else lr, config.weight_decay if decay is None else decay


class Pull:
    """Draws a tower's parameters back to where they are when this is made (L2-SP, arXiv 1802.01483), decoupled.

    Args:
        tower: whose parameters.
        strength: times a parameter's learning rate, the share of the way that it goes back in a step.
    """

    def __init__(self, tower: torch.nn.Module, strength: float):
        self.starts = {parameter: parameter.detach().clone() for parameter in tower.parameters()}
        self.strength = strength

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called after the optimiser's step."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self.starts:
                    parameter.lerp_(self.starts[parameter], min(1.0, group["lr"] * self.strength))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then from lr to min_lr by the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the schedule's rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


@torch.no_grad()
def gradient_norms(model: HyperCLIP) -> dict[str, Tensor]:
    """The norm of the gradients of each part that has some."""
    by_part: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            by_part[part_of(name)].append(parameter.grad)
    norms = {part: torch.nn.utils.get_total_norm(grads) for part, grads in by_part.items() if grads}
    return {f"grad_norm_{part}": whole(norm) for part, norm in norms.items()}


@torch.no_grad()
def clip_gradients(model: HyperCLIP, largest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `largest` (0: leave them); returns the norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, largest or torch.inf)
    plain = [parameter for parameter in parameters if not is_sharded(parameter)]
    grads = [[p.grad for p in some if p.grad is not None] for some in (sharded, plain)]
    norms = [whole(torch.nn.utils.get_total_norm(some)) for some in grads if some]
    norm = torch.stack(norms).norm()
    for some in (sharded, plain):
        torch.nn.utils.clip_grads_with_norm_(some, largest or torch.inf, norm)
    return norm
