"""What a pretrained model gives: fields of a HyperCLIPConfig, weights under timm's names, and a text tower."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hyperclip_fast.text import TextTower


@dataclass(frozen=True)
class ImageTower:
    """An image tower as timm has it.

    Args:
        fields: of HyperCLIPConfig: image_tower, embed_dim, and what else differs from the defaults.
        state: weights by timm's names.
        source: (B, 3, S, S) -> (B, E), the module that was taken over, in eval mode.
    """

    fields: dict[str, Any]
    state: dict[str, Tensor]
    source: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parts:
    """A whole model.

    Args:
        image: the image tower.
        fields: of HyperCLIPConfig: text_tower, text_head, preprocessing, and what else differs from the defaults.
        text: the text tower, frozen; None: what the name in `fields` leads to.
        text_is_named: whether that name leads to the tower's weights, so that a saved model can do without them.
        text_head: weights of the text head.
        logit_scale: the logarithm; None: a new one.
        logit_bias: None: a new one.
        new: what is not pretrained, in words.
    """

    image: ImageTower
    fields: dict[str, Any]
    text: TextTower | None = None
    text_is_named: bool = True
    text_head: dict[str, Tensor] = field(default_factory=dict)
    logit_scale: float | None = None
    logit_bias: float | None = None
    new: tuple[str, ...] = ("hypernetwork",)
