"""The costly rivals: the trained baseline tuned for each attribute by gradient steps on its own labelled scenes.

HyperCLIP adapts to a task by one pass over its class names; these train: all norm parameters ("norms"), LoRA of rank 4
on every product of the blocks ("lora", peft), or a bottleneck behind every block ("adapters", Houlsby et al. 2019; one
a block as in Pfeiffer et al. 2021; peft has none for a timm model). Text side, temperature and bias stay the
baseline's, and so do BatchNorm's statistics: the encoder is in evaluation mode throughout. What is tuned is a plain
timm model, one for each attribute, so its steps count six times.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperclip_fast.bench.conditioning.arms import Run
from hyperclip_fast.bench.conditioning.scores import SceneTasks, embed_with
from hyperclip_fast.data.batch import Share
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.data.scenes import ATTRIBUTES, scene_source
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.training.config import RunConfig
from hyperclip_fast.training.trainer import Trainer
from hyperclip_fast.utils.extras import require

RANK = 4
BOTTLENECK = 32  # of an adapter; half the block's width where that is less. At width 64: as many parameters as LoRA's


class Adapter(nn.Module):
    """y + up(GELU(down(y))), y (B, N, D) or (B, D, H, W) as a block returns it; starts as the identity.

    Args:
        width: D.
        dims: of y, 3 or 4.
    """

    def __init__(self, width: int, dims: int):
        super().__init__()
        layer = nn.Linear if dims == 3 else partial(nn.Conv2d, kernel_size=1)
        inner = min(BOTTLENECK, width // 2)
        self.down, self.up = layer(width, inner), layer(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:
        """The same shape as y's."""
        return y + self.up(F.gelu(self.down(y)))


def _norms(encoder: nn.Module, model: HyperCLIP) -> nn.Module:
    encoder.requires_grad_(False)
    for name in model.image.norm_spec.names:
        encoder.get_submodule(name).requires_grad_(True)
    return encoder


def _lora(encoder: nn.Module, model: HyperCLIP) -> nn.Module:
    peft = require("peft", "peft")
    names = [name for name, part in encoder.named_modules() if name.startswith("blocks.") and _is_product(part)]
    return peft.get_peft_model(encoder, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names))


def _is_product(part: nn.Module) -> bool:
    """A linear layer, or a convolution that is one for each pixel."""
    return type(part) is nn.Linear or (type(part) is nn.Conv2d and part.groups == 1 and part.kernel_size == (1, 1))


def _adapters(encoder: nn.Module, model: HyperCLIP) -> nn.Module:
    encoder.requires_grad_(False)
    stages = ([*stage] if type(stage) is nn.Sequential else [stage] for stage in encoder.blocks)
    blocks = [block for stage in stages for block in stage]
    shapes: list[torch.Size] = []
    probes = [block.register_forward_hook(lambda _, inputs, y: shapes.append(y.shape)) for block in blocks]
    with torch.no_grad():
        encoder(torch.zeros(1, 3, model.image_size, model.image_size))
    for probe in probes:
        probe.remove()
    encoder.adapters = nn.ModuleList(Adapter(shape[-1 if len(shape) == 3 else 1], len(shape)) for shape in shapes)
    for block, adapter in zip(blocks, encoder.adapters, strict=True):
        block.register_forward_hook(lambda _, inputs, y, adapter=adapter: adapter(y))
    return encoder


METHODS: dict[str, Callable[[nn.Module, HyperCLIP], nn.Module]] = {
    "norms": _norms,
    "lora": _lora,
    "adapters": _adapters,
}


class TunedEncoder(nn.Module):
    """A plain timm encoder in the place of a HyperCLIP's image tower. It takes no rows, and stays in evaluation mode.

    Args:
        encoder: what is tuned.
        tower: the image tower that it was made of, whose row it gives for every task.
    """

    def __init__(self, encoder: nn.Module, tower: nn.Module):
        super().__init__()
        self.encoder, self.norm_spec, self.pretrained_cfg = encoder, tower.norm_spec, tower.pretrained_cfg
        self.base_params = NormParams(tower.norm_spec, tower.base_params.table.detach())

    def forward(self, images: Tensor, params: NormParams | None = None) -> Tensor:
        """Images (B, 3, S, S) to (B, E)."""
        return self.encoder(images)

    def train(self, mode: bool = True) -> "TunedEncoder":
        """Evaluation mode, whatever is asked for."""
        return super().train(False)

    def no_weight_decay(self) -> set[str]:
        """Nothing, as nothing decays."""
        return set()


def finish(trainer: Trainer) -> None:
    """Train to the end.

    Raises:
        KeyboardInterrupt: for a run that a signal stopped; its checkpoint is written.
    """
    trainer.train()
    if trainer.stopped is not None:
        raise KeyboardInterrupt


def tuner(model: HyperCLIP, run: Run, attribute: str, pictures: Pictures, out: str | Path) -> Trainer:
    """What tunes an encoder for one attribute; a run that was stopped goes on.

    The encoder is `trainer.model.image.encoder`. What the folder's model/ holds is no HyperCLIP to load.

    Args:
        model: the trained baseline, in eval mode; it stays as it is.
        run: `tune` says how, `train` how long, with what learning rate and seed.
        attribute: what its tasks ask for.
        pictures: what scenes are made of.
        out: the folder.

    Raises:
        ValueError: for a `tune` that is none of METHODS.
    """
    if run.tune not in METHODS:
        raise ValueError(f"tune must be one of {list(METHODS)}, got {run.tune!r}")
    torch.manual_seed(run.train.seed)
    encoder = METHODS[run.tune](model.specialize(["any"]), model)
    tuned = copy.deepcopy(model)
    tuned.image = TunedEncoder(encoder, model.image)
    train = replace(run.train, warmup=0, min_lr=0.0, weight_decay=0.0, freeze=("text", "logit"))
    source = scene_source(pictures, train.batch_shape, model.preprocessing, Share(), (attribute,))
    return Trainer(RunConfig(model.config, train), out, source=source, model=tuned)


def tune(model: HyperCLIP, run: Run, attribute: str, pictures: Pictures, out: str | Path) -> tuple[nn.Module, int]:
    """An encoder tuned for one attribute, and how many parameters that took; see `tuner`."""
    trainer, start = tuner(model, run, attribute, pictures, out), time.perf_counter()
    try:
        finish(trainer)
    finally:
        trainer.log({"seconds": round(time.perf_counter() - start, 2)})
    encoder = trainer.model.image.encoder
    return encoder, sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)


@torch.no_grad()
def _recalls(encode: Callable[[Tensor], Tensor], model: HyperCLIP, attribute: str, *tasks: SceneTasks) -> list[float]:
    features = embed_with(encode, tasks[0].images)
    return [
        scenes.recall(attribute, features, torch.stack([model.encode_text(n) for n in scenes.names(attribute)]))
        for scenes in tasks
    ]


def tune_all(
    model: HyperCLIP, run: Run, pictures: Pictures, scenes: SceneTasks, reworded: SceneTasks, out: str | Path
) -> dict[str, Any]:
    """Recall by attribute of the encoder tuned for it, the extra parameters of one task, and the seconds of tuning."""
    seconds, right, other, extra = 0.0, {}, {}, 0
    for attribute in ATTRIBUTES:
        encoder, extra = tune(model, run, attribute, pictures, Path(out) / attribute)
        lines = (Path(out) / attribute / "log.jsonl").read_text(encoding="utf-8").splitlines()
        seconds += sum(json.loads(line).get("seconds", 0.0) for line in lines)

        def encode(images: Tensor, encoder: nn.Module = encoder) -> Tensor:
            return F.normalize(encoder(images), dim=-1)

        right[attribute], other[attribute] = _recalls(encode, model, attribute, scenes, reworded)
    scores = {"right": right, "reworded": other}
    return {"scores": scores, "parameters_per_task": extra, "seconds": round(seconds, 1)}
