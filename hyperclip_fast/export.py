"""One task, baked into files that need nothing but timm and safetensors."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import save_for_hf

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import save_safetensors


@torch.inference_mode()
def save_specialized(model: HyperCLIP, class_names: Sequence[str], out: str | Path) -> Path:
    """Write the encoder adapted to `class_names` as a timm model folder, with its text classifier.

    The folder holds timm's config.json and model.safetensors, `classes.safetensors` with the class embeddings (K, E) of
    length 1 under "class_embeddings", and labels.json. An image's class is the largest product of its normalised
    embedding with the class embeddings.

    Args:
        model: what to specialise.
        class_names: the task.
        out: a folder that does not exist or is empty; written beside, then renamed.

    Raises:
        ValueError: for no class names, or a folder with files in it.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, got {out}")
    encoder = model.specialize(class_names)
    encoder.pretrained_cfg = {
        **encoder.pretrained_cfg,
        "input_size": (3, *encoder.patch_embed.img_size),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "num_classes": model.config.embed_dim,
    }
    kwargs = model.config.timm_kwargs()
    kwargs.pop("num_classes")
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        save_for_hf(encoder, beside, model_args=kwargs, safe_serialization=True)
        classes = {"class_embeddings": model.encode_text(class_names).cpu()}
        save_safetensors(classes, beside / "classes.safetensors", {"format": "pt"})
        (beside / "model.safetensors").chmod(0o644)  # safetensors' own writer lets only us read it
        (beside / "labels.json").write_text(json.dumps(list(class_names), ensure_ascii=False), encoding="utf-8")
        if out.exists():
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out
