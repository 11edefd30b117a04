"""A timm model with its weights as an image tower, beside any text tower: LiT's setting (arXiv 2111.07991)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.pretrained.parts import ImageTower, Parts
from hyperclip_fast.pretrained.weights import read_weights
from hyperclip_fast.utils.timm_models import create_timm_model


def timm_parts(image: str, text: str = "minilm", weights: str | bool = True, embed_dim: int = 256) -> Parts:
    """What a HyperCLIP takes over of a timm model; the projections of images and texts to E are new.

    Args:
        image: timm's name, such as efficientnet_b0.ra_in1k.
        text: a text tower's name, see `text.create_text_tower`.
        weights: see `load_timm`.
        embed_dim: E.

    Raises:
        ValueError: for an unknown name, or weights that do not fit.
    """
    model = load_timm(image, weights)
    model.reset_classifier(embed_dim)
    new = ("head of the image tower", "text head", "hypernetwork")
    fields = {"text_tower": text, **preprocessing_fields(model)}
    return Parts(as_image_tower(image, model, embed_dim), fields, new=new)


def load_timm(name: str, weights: str | bool) -> Any:
    """A timm model with its own classifier.

    Args:
        name: timm's.
        weights: True: what timm has under the name; a file or "pip:<package>": those; False: random ones.

    Raises:
        ValueError: for an unknown name, or weights that do not fit.
    """
    model: Any = create_timm_model(name, weights is True, {})
    if isinstance(weights, str):
        model.load_state_dict(read_weights(weights, model.state_dict()))
    return model


def as_image_tower(name: str, model: Any, embed_dim: int) -> ImageTower:
    """A timm model whose classifier is the projection to E."""
    tower = {"image_tower": name, "embed_dim": embed_dim}
    return ImageTower(tower, model.state_dict(), partial(_embed, model))


def preprocessing_fields(model: Any) -> dict[str, Any]:
    """Fields of HyperCLIPConfig: size and preprocessing of a timm model's weights."""
    preprocessing = Preprocessing.from_timm(model.pretrained_cfg)
    return {"img_size": preprocessing.size, **preprocessing.config_fields()}


def _embed(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)
