"""The text tower of an open_clip model, with its tokenizer."""

import difflib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hyperclip_fast.text.tower import WEIGHTS, TextTower
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import load_safetensors, save_safetensors, write_file

CONFIG = "open_clip_config.json"
NO_IMAGES = {"layers": 1, "width": 64, "image_size": 32, "patch_size": 32}  # an image tower that is let go at once


class OpenCLIPTextTower(TextTower):
    """The text tower of an open_clip model, as its `encode_text`; the image tower is let go.

    Args:
        model: one of `open_clip.list_models()`, or hf-hub:<hub id>, or local-dir:<folder>.
        pretrained: tag or checkpoint file; None: random weights, nothing is downloaded.
        trainable: see TextTower.
        templates: see TextTower.
        text: such a model's `text` module, in place of a new one.

    Raises:
        ValueError: for an unknown model or tag.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        trainable: bool = False,
        templates: Sequence[str] = (),
        text: Any = None,
    ):
        if text is None:
            text = create_open_clip(model, pretrained).text
        super().__init__(text.output_dim, trainable, templates)
        self.source, self.text = model, text
        self.context_length = model_config(model)["text_cfg"].get("context_length", 77)

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's; made at its first use, for some come from the hub."""
        return require("open_clip", "clip").get_tokenizer(self.source)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(texts).to(self.device)}

    def save(self, folder: str | Path) -> None:
        config = model_config(self.source)
        kept = {key: config[key] for key in ("embed_dim", "text_cfg", "quick_gelu") if key in config}
        write_file(Path(folder) / CONFIG, json.dumps({"model_cfg": {**kept, "vision_cfg": NO_IMAGES}}, indent=2))
        save_safetensors(self.text.state_dict(), Path(folder) / WEIGHTS, {"format": "pt"})
        if hasattr(self.tokenizer, "save_pretrained"):  # the others lie in open_clip's package
            self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path, trainable: bool = False, templates: Sequence[str] = ()) -> "OpenCLIPTextTower":
        """The tower that `save` wrote."""
        clip = require("open_clip", "clip").CustomTextCLIP(**model_config(f"local-dir:{folder}"))
        clip.text.load_state_dict(load_safetensors(Path(folder) / WEIGHTS)[0])
        return cls(f"local-dir:{folder}", None, trainable, templates, clip.text)

    def set_grad_checkpointing(self) -> None:
        """Run the blocks again in backward instead of keeping what is in them."""
        self.text.set_grad_checkpointing()

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.text(input_ids)
        return out[0] if isinstance(out, tuple) else out  # CoCa's gives its tokens, too


def create_open_clip(model: str, pretrained: str | None = None) -> Any:
    """A new open_clip model with a text tower of its own, `text`, and `visual`.

    Raises:
        ValueError: for an unknown model or tag, or a tag whose weights want another activation than the model has.
    """
    open_clip = require("open_clip", "clip")
    if ":" not in model:
        _check_open_clip(open_clip, model, pretrained)
    has_weights = pretrained is not None or ":" in model
    return open_clip.create_model(model, pretrained, force_custom_text=True, pretrained_text=has_weights)


def model_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model: embed_dim, vision_cfg, text_cfg, ..."""
    schema, _, folder = model.partition(":")
    if schema == "local-dir":
        return json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    if schema == "hf-hub":
        file = require("huggingface_hub", "clip").hf_hub_download(folder, CONFIG)
        return json.loads(Path(file).read_text(encoding="utf-8"))["model_cfg"]
    return require("open_clip", "clip").get_model_config(model)


def _check_open_clip(open_clip, model: str, pretrained: str | None) -> None:
    """Raise ValueError unless open_clip has this model and this tag (or the tag is a file), with one activation."""
    models = open_clip.list_models()
    if model not in models:
        close = difflib.get_close_matches(model, models) or models
        raise ValueError(f"name must be open_clip:<model> with a model such as {', '.join(close[:5])}, got {model}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(f"name must be open_clip:{model}/<pretrained> with one of {tags}, got {pretrained}")
    if pretrained in tags:
        configs = open_clip.get_pretrained_cfg(model, pretrained), open_clip.get_model_config(model)
        wanted, has = (bool(config.get("quick_gelu")) for config in configs)
        if wanted != has:
            other = f"{model}-quickgelu" if wanted else model.removesuffix("-quickgelu")
            raise ValueError(f"name must be open_clip:{other}/{pretrained}, for the weights' activation, got {model}")
