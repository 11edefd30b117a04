"""What HyperCLIP.from_open_clip makes of every open_clip model.

    python -m hyperclip_fast.integrations.open_clip_table

No weights are needed: the models are built without memory, and names and shapes are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hyperclip_fast.encoders import create_encoder
from hyperclip_fast.hyperclip_config import HyperCLIPConfig
from hyperclip_fast.pretrained.open_clip_images import image_tower
from hyperclip_fast.utils.extras import require

NO_TEXT = {"layers": 1, "width": 64, "heads": 1}  # a text tower that is let go at once


@dataclass(frozen=True)
class Entry:
    """What becomes of one image tower.

    Args:
        name: of the open_clip model.
        timm: of the timm model; empty where it is refused.
        encoder: "HyperViT" or "HyperEncoder"; or why it is refused.
        row_size: P, generated norm parameters.
    """

    name: str
    timm: str
    encoder: str
    row_size: int


def entries() -> Iterator[Entry]:
    """Every model of `open_clip.list_models()`."""
    open_clip = require("open_clip", "clip")
    for name in open_clip.list_models():
        yield entry(name, open_clip.get_model_config(name))


def entry(name: str, config: dict[str, Any]) -> Entry:
    """One model's.

    Args:
        name: its name.
        config: open_clip's configuration of it.

    Raises:
        AssertionError: where our tower has other names or shapes than what was taken over: a fault of ours.
    """
    kept = {key: config[key] for key in ("embed_dim", "vision_cfg", "quick_gelu") if key in config}
    with torch.device("meta"):
        visual = require("open_clip", "clip").CustomTextCLIP(text_cfg=NO_TEXT, **kept).visual
        try:
            tower = image_tower(visual)
        except ValueError as error:
            return Entry(name, "", str(error).partition("got ")[2], 0)
        ours = HyperCLIPConfig(**tower.fields)
        encoder = create_encoder(ours.image_tower, **ours.timm_kwargs())
    theirs = {key: value.shape for key, value in tower.state.items()}
    assert theirs == {key: value.shape for key, value in encoder.state_dict().items()}, name
    kind = "HyperViT" if type(encoder).__name__ == "HyperViT" else "HyperEncoder"
    return Entry(name, ours.image_tower, kind, encoder.norm_spec.num_params)


def line(each: Entry) -> str:
    """An entry as a line of a table in Markdown."""
    if not each.timm:
        return f"| {each.name} | | refused: {each.encoder} | |"
    return f"| {each.name} | {each.timm} | {each.encoder} | {each.row_size:,} |"


if __name__ == "__main__":
    print("| open_clip | image tower in timm | encoder | norm parameters |", "|---|---|---|---|", sep="\n")
    for one in entries():
        print(line(one))
