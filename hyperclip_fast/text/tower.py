"""What every text tower is: texts in, embeddings out, frozen or trained, with prompt templates.

With templates, a text's embedding is that of each filled template, normalised, averaged, and normalised again
(the zero-shot recipe of CLIP, arXiv 2103.00020); without, it is what the tower gives.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperclip_fast.utils.files import save_safetensors

WEIGHTS = "model.safetensors"
BATCH = 256  # texts encoded at once


class TextTower(nn.Module, ABC):
    """Turns texts into embeddings. A frozen tower has no gradients and stays in eval mode.

    Args:
        dim: E_text, the width of an embedding.
        trainable: False: a frozen tower; `create_text_tower` then turns its parameters' gradients off.
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

    def freeze(self, frozen: bool = True) -> None:
        """Turn the parameters' gradients off, and stay in eval mode; or train them."""
        self.trainable = not frozen
        self.requires_grad_(self.trainable).train(self.trainable)

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

    def save(self, folder: str | Path) -> None:
        """Write weights, and what else `load_text_tower` needs, into an empty folder."""
        save_safetensors(self.state_dict(), Path(folder) / WEIGHTS, {"format": "pt"})

    @abstractmethod
    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """The arguments (k, L) of `forward`, by name, for k texts; on the tower's device."""

    @abstractmethod
    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed tokens (k, L): (k, dim)."""


def weights_sha256(tower: nn.Module) -> str:
    """A hash of a tower's weights in float32, whatever the order and the names that a library gives them."""
    digests = []
    for parameter in tower.parameters():
        content = parameter.detach().to("cpu", torch.float32).contiguous().reshape(-1).view(torch.uint8).numpy()
        digests.append(hashlib.sha256(content.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def average_prompts(embeddings: Tensor) -> Tensor:
    """Embeddings (..., M, dim) of M prompts to that of their text (..., dim): normalised, averaged, normalised."""
    return F.normalize(F.normalize(embeddings, dim=-1).mean(-2), dim=-1)
