"""clip_benchmark with the model type "hyperclip": specialised for each data set's class names, in its prompts.

clip_benchmark's loaders see neither. They meet the model in `zeroshot_classification.evaluate(model, dataloader,
tokenizer, classnames, templates, ...)`, so `register` wraps that one function: a model of ours is specialised there,
from the arguments, and handed on. All else is clip_benchmark's own, its command line included. (To guess the task from
the first calls of `encode_text` would need no wrapper, but a state that no caller sees, and is wrong on captions.)

    --model hyperclip         the row of the data set's class names
    --model hyperclip-base    the base row, whatever the names: what conditioning is measured against
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hyperclip_fast.hyperclip import DEMO, HyperCLIP, load_model
from hyperclip_fast.integrations.open_clip import to_open_clip
from hyperclip_fast.utils.extras import require

MODELS = ("hyperclip", "hyperclip-base")


class Unspecialized(nn.Module):
    """A HyperCLIP that waits for class names, in clip_benchmark's hands until `evaluate`."""

    def __init__(self, clip: HyperCLIP):
        super().__init__()
        self.clip = clip

    def encode_image(self, image: Tensor) -> Tensor:
        """Refuse: the score would be the unadapted model's."""
        raise ValueError(f"--task must be zeroshot_classification for --model {MODELS[0]}; {MODELS[1]} does all")

    encode_text = encode_image


def load(model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu"):
    """clip_benchmark's loader: (model, transform, tokenizer).

    Args:
        model_name: one of MODELS.
        pretrained: a trained model's folder or hub id, or "demo" for the checkpoint of this package.
        cache_dir: unused; the hub has its own.
        device: where to run.

    Raises:
        ValueError: for another name, or no such model.
    """
    if model_name not in MODELS:
        raise ValueError(f"--model must be one of {', '.join(MODELS)} for --model_type hyperclip, got {model_name!r}")
    clip = load_model(pretrained, device)
    adapter, transform, tokenizer = to_open_clip(clip, None)
    return (Unspecialized(clip) if model_name == MODELS[0] else adapter), transform, tokenizer


def register() -> None:
    """Make "hyperclip" a model type of clip_benchmark, in this process; again: nothing changes.

    Raises:
        ImportError: where clip_benchmark is missing.
    """
    models = require("clip_benchmark.models", "clip_benchmark")
    if "hyperclip" in models.TYPE2FUNC:
        return
    models.TYPE2FUNC["hyperclip"] = load
    models.MODEL_TYPES.append("hyperclip")
    metrics: Any = require("clip_benchmark.metrics.zeroshot_classification", "clip_benchmark")
    metrics.evaluate = _specializing(metrics.evaluate)
    try:
        metrics.accuracy(torch.eye(2), torch.arange(2))
    except TypeError:  # clip_benchmark 1.6 makes a float of an array of one number, which NumPy 2.4 refuses
        metrics.accuracy = _accuracy


def _accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """clip_benchmark's: the share of targets (N,) among the k highest of the logits (N, C), for each k."""
    hits = output.topk(max(topk), dim=1).indices == target[:, None]
    return [hits[:, :k].any(1).double().mean().item() for k in topk]


def _specializing(evaluate):
    @functools.wraps(evaluate)
    def wrapped(model, dataloader, tokenizer, classnames, templates, device, **options):
        if isinstance(model, Unspecialized):
            model, _, tokenizer = to_open_clip(model.clip, classnames, templates)
        return evaluate(model, dataloader, tokenizer, classnames, templates, device, **options)

    return wrapped


def run(arguments: Sequence[str]) -> None:
    """clip_benchmark's command line with our model type as the default.

    Args:
        arguments: as after `clip_benchmark` on a command line.
    """
    register()
    cli = require("clip_benchmark.cli", "clip_benchmark")
    arguments = list(arguments)
    given = {argument.partition("=")[0] for argument in arguments}
    if arguments[:1] == ["eval"] and "--model_type" not in given:
        arguments += ["--model_type", "hyperclip"]
        for option, value in (("--model", MODELS[0]), ("--pretrained", DEMO)):
            arguments += [] if option in given else [option, value]
    before, sys.argv = sys.argv, ["clip_benchmark", *arguments]
    try:
        cli.main()
    finally:
        sys.argv = before
