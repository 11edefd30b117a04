"""A timm model with its weights as an image tower, beside any text tower: LiT's setting (arXiv 2111.07991)."""

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.pretrained.parts import ImageTower, Parts
from hyperclip_fast.pretrained.weights import read_weights


def timm_parts(image: str, text: str = "minilm", weights: str | bool = True, embed_dim: int = 256) -> Parts:
    """What a HyperCLIP takes over of a timm model; the projections of images and texts to E are new.

    Args:
        image: timm's name, such as efficientnet_b0.ra_in1k.
        text: a text tower's name, see `text.create_text_tower`.
        weights: True: what timm has under the name; a file or "pip:<package>": those; False: random ones.
        embed_dim: E.

    Raises:
        ValueError: for an unknown name, or weights that do not fit.
    """
    model: Any
    if isinstance(weights, str):
        model = timm.create_model(image)
        model.load_state_dict(read_weights(weights, model.state_dict()))
        model.reset_classifier(embed_dim)
    else:
        model = timm.create_model(image, pretrained=weights, num_classes=embed_dim)
    cfg: Any = model.pretrained_cfg
    preprocessing = Preprocessing.from_timm(cfg)
    tower = {"image_tower": image, "embed_dim": embed_dim}
    fields = {"text_tower": text, "img_size": preprocessing.size, **preprocessing.config_fields()}
    new = ("head of the image tower", "text head", "hypernetwork")
    return Parts(ImageTower(tower, model.state_dict(), partial(_embed, model)), fields, new=new)


def _embed(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)
