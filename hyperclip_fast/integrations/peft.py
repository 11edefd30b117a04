"""Norm rows from and to peft's LN-tuning adapters: folders with adapter_config.json and adapter_model.safetensors.

A layer that an adapter does not tune keeps the base row's weight and bias. Only safetensors is read, never the pickle
adapter_model.bin.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from hyperclip_fast.integrations.transformers_names import timm_name
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import load_safetensors, save_safetensors, written_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(r"base_model\.model\.(.+)\.ln_tuning_layers\.(weight|bias)")


def load_ln_adapters(folders: Sequence[str | Path], base: NormParams) -> NormParams:
    """One row of each adapter.

    Args:
        folders: what `PeftModel.save_pretrained` wrote for LNTuningConfig on a timm or transformers encoder.
        base: the encoder's `base_params` (T = 1).

    Raises:
        ValueError: for something else than such a folder, or an adapter that tunes a layer beyond the rows.
    """
    if isinstance(folders, (str, Path)) or not len(folders):
        raise ValueError(f"folders must be a non-empty list of adapters' folders, got {folders!r}")
    kept = base.state_dict()
    rows = [base.spec.row({**kept, **_tuned(Path(folder), kept)}) for folder in folders]
    return NormParams(base.spec, torch.stack(rows))


def _tuned(folder: Path, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights and biases of the tuned layers, by the encoder's names."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"folders must hold {CONFIG} and {WEIGHTS}, {folder} lacks {name}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("peft_type") != "LN_TUNING":
        raise ValueError(f"folders must hold adapters of LN tuning, {folder} has {str(config)[:80]}")
    tuned = {}
    for key, tensor in load_safetensors(folder / WEIGHTS)[0].items():
        match = KEY.fullmatch(key)
        name = f"{timm_name(match[1])}.{match[2]}" if match else key
        if name not in kept:
            raise ValueError(f"folders must hold adapters that tune the rows' layers only, {folder} has {key}")
        tuned[name] = tensor.to(kept[name])
    return tuned


def save_ln_adapter(params: NormParams, folder: str | Path, task: int = 0, base_model: str | None = None) -> Path:
    """Write a row as an LN-tuning adapter that `PeftModel.from_pretrained(stock_timm_model, folder)` loads.

    Args:
        params: the rows.
        folder: a folder that does not exist or is empty; written beside, then renamed.
        task: which row.
        base_model: name of the model it belongs to, for the adapter's config.

    Raises:
        ValueError: for a folder with files in it.
        ImportError: where peft is missing.
    """
    peft, folder = require("peft", "peft"), Path(folder)
    config = peft.LNTuningConfig(target_modules=_pattern(params.spec.names), base_model_name_or_path=base_model)
    config.inference_mode = True
    tensors = {_key(name): tensor.cpu() for name, tensor in params.state_dict(task).items()}
    with written_folder(folder, "folder") as beside:
        config.save_pretrained(beside)
        save_safetensors(tensors, beside / WEIGHTS, {"format": "pt"})
    return folder


def _pattern(names: Sequence[str]) -> str:
    """A regular expression for exactly these modules: a list of names would match their endings, too."""
    return "|".join(re.escape(name) for name in names)


def _key(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"base_model.model.{layer}.ln_tuning_layers.{kind}"
