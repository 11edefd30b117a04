"""A text tower from its name, or from a folder that `TextTower.save` wrote."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from hyperclip_fast.text.hf_tower import HFTextTower, minilm_folder
from hyperclip_fast.text.open_clip_tower import OpenCLIPTextTower
from hyperclip_fast.text.scratch_tower import ScratchTextTower, TextTransformerConfig
from hyperclip_fast.text.tower import WEIGHTS, TextTower
from hyperclip_fast.utils.files import load_safetensors

FORMS = (
    "minilm",
    "hf:<hub id or folder>",
    "open_clip:<model>",
    "open_clip:<model>/<pretrained>",
    "transformer",
    "transformer:width=256,depth=4,heads=4,dim=256,context_length=32",
)


def create_text_tower(name: str, *, trainable: bool = False, templates: Sequence[str] = ()) -> TextTower:
    """Build a text tower from its name.

    Args:
        name: one of the forms above. Random weights that are frozen come from a fixed seed: built again, they are the
            same.
        trainable: False: no gradients, always in eval mode.
        templates: prompt templates such as "a photo of a {}."; see `TextTower`.

    Raises:
        ValueError: for another name, or a model that does not exist.
        ImportError: where a package of the extra `clip` is missing.
    """
    kind, _, rest = name.partition(":")
    if name != "minilm" and kind != "transformer" and not (kind in ("hf", "open_clip") and rest):
        raise ValueError(f"name must be one of {', '.join(FORMS)}, got {name!r}")
    with nullcontext() if trainable else torch.random.fork_rng(devices=[]):
        if not trainable:
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reset the GPUs' generators, too
        tower = _build(kind, rest, trainable, templates)
    return tower.requires_grad_(trainable).train(trainable)


def _build(kind: str, rest: str, trainable: bool, templates: Sequence[str]) -> TextTower:
    """The tower of a name that was taken apart."""
    if kind == "minilm":
        return HFTextTower(minilm_folder(), trainable, templates, local_only=True)
    if kind == "hf":
        return HFTextTower(rest, trainable, templates)
    if kind == "transformer":
        return ScratchTextTower(TextTransformerConfig.parse(rest), trainable, templates)
    model, _, pretrained = (rest, "", "") if ":" in rest else rest.partition("/")
    return OpenCLIPTextTower(model, pretrained or None, trainable, templates)


def load_text_tower(
    name: str, folder: str | Path, *, trainable: bool = False, templates: Sequence[str] = ()
) -> TextTower:
    """The tower that `TextTower.save` wrote: nothing is asked of the hub.

    Args:
        name: what `create_text_tower` made it of.
        folder: where it was saved.
        trainable: see `create_text_tower`.
        templates: likewise.

    Raises:
        ValueError: for a folder that does not hold such a tower.
    """
    kind = name.partition(":")[0]
    try:
        if kind in ("minilm", "hf"):
            tower: TextTower = HFTextTower.load(folder, trainable, templates)
        elif kind == "open_clip":
            tower = OpenCLIPTextTower.load(folder, trainable, templates)
        else:
            tower = create_text_tower(name, trainable=trainable, templates=templates)
            tower.load_state_dict(load_safetensors(Path(folder) / WEIGHTS)[0])
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"folder must hold the text tower {name}, {folder}: {error}") from error
    return tower.requires_grad_(trainable).train(trainable)
