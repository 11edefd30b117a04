"""One task, baked into files that need nothing but timm and safetensors."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.utils.files import save_safetensors, written_folder


def save_specialized(model: HyperCLIP, class_names: Sequence[str], out: str | Path) -> Path:
    """Write the encoder adapted to `class_names` as a timm model folder, with its text classifier.

    The folder holds timm's config.json and model.safetensors, labels.json, and classes.safetensors with the class
    embeddings (K, E) of length 1 under "class_embeddings", "logit_scale" and "logit_bias". An image's logits are the
    products of its normalised embedding with the class embeddings, times the scale, plus the bias.

    Args:
        model: what to specialise.
        class_names: the task.
        out: a folder that does not exist or is empty; written beside, then renamed.

    Raises:
        ValueError: for no class names, or a folder with files in it.
    """
    out = Path(out)
    with written_folder(out) as beside:
        encoder = _specialized(model, class_names)
        save_for_hf(encoder, str(beside), model_args=_model_args(model), safe_serialization=True)
        _save_classes(model, class_names, beside)
    return out


def push_specialized(
    model: HyperCLIP, class_names: Sequence[str], repo_id: str, private: bool = False, token: str | None = None
) -> None:
    """Upload what `save_specialized` writes: the tower by timm's own `push_to_hf_hub`, then the classifier.

    Args:
        model: what to specialise.
        class_names: the task.
        repo_id: "owner/name", created where it does not exist.
        private: who may see a new one.
        token: of the Hugging Face hub; None: the one that is logged in.

    Raises:
        ValueError: for no class names.
    """
    encoder = _specialized(model, class_names)
    card = {
        "tags": ["zero-shot-image-classification", "timm", "hyperclip"],
        "license": "apache-2.0",
        "description": "An image encoder whose norm weights a HyperCLIP wrote for these classes: "
        + ", ".join(class_names)
        + ". Its output, normalised, times `class_embeddings` of classes.safetensors ranks them.",
    }
    with tempfile.TemporaryDirectory() as folder:
        _save_classes(model, class_names, Path(folder))
        push_to_hf_hub(
            encoder,
            repo_id,
            token=token,
            private=private,
            model_card=card,
            model_args=_model_args(model),
            safe_serialization=True,
        )
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Add class embeddings and labels"
        )


def _specialized(model: HyperCLIP, class_names: Sequence[str]) -> nn.Module:
    encoder: Any = model.specialize(class_names)  # timm's attributes are not nn.Module's
    encoder.pretrained_cfg = {
        **encoder.pretrained_cfg,
        **model.preprocessing.timm_config(),
        "num_classes": model.config.embed_dim,
    }
    return encoder


def _model_args(model: HyperCLIP) -> dict[str, Any]:
    kwargs = model.config.timm_kwargs()
    kwargs.pop("num_classes")  # timm keeps it apart
    return kwargs


@torch.inference_mode()
def _save_classes(model: HyperCLIP, class_names: Sequence[str], folder: Path) -> None:
    classes = {
        "class_embeddings": model.encode_text(class_names).cpu(),
        "logit_scale": model.logit_scale.exp().cpu(),
        "logit_bias": model.logit_bias.detach().cpu(),
    }
    save_safetensors(classes, folder / "classes.safetensors", {"format": "pt"})
    (folder / "labels.json").write_text(json.dumps(list(class_names), ensure_ascii=False), encoding="utf-8")
