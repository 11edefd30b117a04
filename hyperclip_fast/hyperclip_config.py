"""What a HyperCLIP is built from: one flat dataclass, stored as config.json."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hyperclip_fast.data.preprocessing import HALF, Preprocessing
from hyperclip_fast.utils.timm_models import model_options
from hyperclip_fast.utils.typed_config import check_choice, check_types, from_dict
from hyperclip_fast.version import MODEL_TYPE

# Left out of config.json where they are as they were before there were such fields.
OPTIONAL = (
    *("mean", "std", "interpolation", "crop_pct", "crop_mode", "fill_color"),
    *("image_kwargs", "image_head", "text_sha256", "text_included", "text_head", "text_anchors", "text_gamma"),
)


@dataclass
class HyperCLIPConfig:
    """What a HyperCLIP is built from; stored flat as config.json.

    Args:
        image_tower: name of a timm model: HyperViT runs a VisionTransformer, HyperEncoder any other.
        img_size: image side in pixels; None, here and in the next six: as the named tower has it. A tower that takes
            images of any size has no option for it; the other options are refused where the tower has none.
        patch_size: patch side in pixels.
        width: D.
        depth: blocks.
        num_heads: H.
        global_pool: pooling of the tokens.
        drop_path_rate: stochastic depth while training.
        image_kwargs: what else timm.create_model takes for the tower, such as act_layer, init_values or mlp_ratio.
        image_head: "linear" is the tower's classifier, with E outputs; "identity" leaves it out, so that the pooled
            features, as many as E, are the embedding.
        modulate: name patterns of the generated norm layers; None: the encoder's default.
        freeze_statistics: BatchNorms keep to their running statistics in training.
        embed_dim: E, the space that images and class names share.
        text_tower: see `text.create_text_tower`.
        train_text: train the text tower, too; a frozen one is built at first use.
        templates: prompt templates, averaged in embedding space; empty: the bare name.
        text_dim: width of the text features; None: asked of the text tower.
        text_head: what makes class embeddings of text features, "linear", "kernel" or "identity": see `text.head`.
        text_sha256: of the frozen text tower's weights, see `text.weights_sha256`; None: whatever the name leads to.
        text_included: the frozen text tower lies in the model's folder, in text/.
        text_anchors: anchors of the kernel.
        text_gamma: of the kernel.
        hyper_width: width of the hypernetwork.
        hyper_depth: its blocks.
        hyper_heads: its attention heads.
        hyper_pool: its read-out, "cross" or "mean".
        hyper_bottleneck: its last hidden width.
        learned_tokens: control, see HyperNetwork.
        conditioned: False leaves the hypernetwork out: plain SigLIP, the baseline.
        mean: of an image's channels, with pixels in [0, 1]; this and the next five are its `Preprocessing`.
        std: likewise.
        interpolation: with which pictures are resized, "bilinear" or "bicubic".
        crop_pct: the square's share of what a picture is resized to.
        crop_mode: what of a picture is kept, "center", "squash" or "border".
        fill_color: grey level of the border.
        init_logit_scale: logarithm of the first temperature; the paper's ln 10.
        init_logit_bias: the paper's -10, made for large batches.
    """

    image_tower: str = "vit_tiny_patch16_224"
    img_size: int | None = None
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    global_pool: str | None = None
    drop_path_rate: float | None = None
    image_kwargs: dict[str, Any] = field(default_factory=dict)
    image_head: str = "linear"
    modulate: tuple[str, ...] | None = None
    freeze_statistics: bool = False
    embed_dim: int = 256
    text_tower: str = "minilm"
    train_text: bool = False
    templates: tuple[str, ...] = ()
    text_dim: int | None = None
    text_sha256: str | None = None
    text_included: bool = False
    text_head: str = "linear"
    text_anchors: int = 0
    text_gamma: float = 6.0
    hyper_width: int = 256
    hyper_depth: int = 2
    hyper_heads: int = 4
    hyper_pool: str = "cross"
    hyper_bottleneck: int = 64
    learned_tokens: int = 0
    conditioned: bool = True
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    fill_color: int | None = None
    init_logit_scale: float = math.log(10)
    init_logit_bias: float = -10.0

    def __post_init__(self):
        check_types(self)
        check_choice(self, image_head=("linear", "identity"))
        self.preprocessing(1)  # refuses numbers out of range

    def to_json(self) -> str:
        """What config.json holds: its kind and every field, but those in OPTIONAL only where they are not as usual."""
        usual = asdict(HyperCLIPConfig())
        values = {key: value for key, value in asdict(self).items() if key not in OPTIONAL or value != usual[key]}
        return json.dumps({"model_type": MODEL_TYPE, **values}, sort_keys=True, indent=2)

    def preprocessing(self, size: int) -> Preprocessing:
        """How pictures become the images, of side `size`, that the image tower takes."""
        names = (field.name for field in fields(Preprocessing) if field.name != "size")
        return Preprocessing(size, **{name: getattr(self, name) for name in names})

    def timm_kwargs(self) -> dict[str, Any]:
        """Arguments of timm.create_model that differ from the named tower's own; its head is the projection to E."""
        names = {"width": "embed_dim"}
        keys = ("img_size", "patch_size", "width", "depth", "num_heads", "global_pool", "drop_path_rate")
        given = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        known = model_options(self.image_tower) if given else frozenset()
        kwargs = {names.get(key, key): value for key, value in given.items() if names.get(key, key) in known}
        for key in set(given) - {"img_size"}:
            if names.get(key, key) not in kwargs:
                raise ValueError(f"{key} must be None, as {self.image_tower} has no such option, got {given[key]!r}")
        if taken := set(self.image_kwargs) & {*kwargs, "num_classes"}:
            raise ValueError(
                f"image_kwargs must leave {sorted(taken)} to fields of the config, got {self.image_kwargs}"
            )
        return {**kwargs, **self.image_kwargs, "num_classes": self.embed_dim if self.image_head == "linear" else 0}


def config_from_dict(values: dict) -> HyperCLIPConfig:
    """A config from config.json's content.

    Raises:
        ValueError: for a key that is no field, a value of another type, or another kind of model.
    """
    if isinstance(values, dict):
        values = {"model_type": MODEL_TYPE, **values}
        if (kind := values.pop("model_type")) != MODEL_TYPE:
            raise ValueError(f"config must have the model_type {MODEL_TYPE}, got {kind!r}")
    return from_dict(HyperCLIPConfig, values, "config")
