"""CLIP's text transformer, from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from hyperclip_fast.text.tower import TextTower
from hyperclip_fast.utils.extras import require


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
