"""How pictures become what a model takes: one value, which the model's configuration carries and everybody reads."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation that bring [0, 1] to [-1, 1]
CROP_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}  # timm's names, and open_clip's for them


@dataclass(frozen=True)
class Preprocessing:
    """A picture brought to S x S, then (pixels - mean) / std a channel: timm's and open_clip's, to the last bit.

    Args:
        size: S in pixels.
        mean: of red, green and blue, with pixels in [0, 1].
        std: likewise.
        interpolation: "bilinear" or "bicubic", antialiased.
        crop_pct: the square's share of what the picture is resized to, `size` / `crop_pct`; beyond 1 it gets a border.
        crop_mode: what is resized to that: "center", the shorter side, of which the centre square stays; "squash", both
            sides; "border", the longer side, with a border around the shorter.
        fill_color: grey level of that border, 0 to 255; None: the mean.

    Raises:
        ValueError: for numbers out of range, or another mode.
    """

    size: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    fill_color: int | None = None

    def __post_init__(self):
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or (name == "std" and min(self.std) <= 0):
                raise ValueError(f"{name} must be three numbers, std's positive, got {getattr(self, name)}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f'interpolation must be "bilinear" or "bicubic", got {self.interpolation!r}')
        if not 0 < self.crop_pct <= 2:
            raise ValueError(f"crop_pct must lie in (0, 2], got {self.crop_pct}")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode must be one of {tuple(CROP_MODES)}, got {self.crop_mode!r}")
        if self.fill_color is not None and not 0 <= self.fill_color <= 255:
            raise ValueError(f"fill_color must lie in [0, 255], got {self.fill_color}")

    @classmethod
    def from_timm(cls, cfg: Mapping[str, Any]) -> "Preprocessing":
        """What a timm model's `pretrained_cfg` asks for.

        Raises:
            ValueError: for images that are not square, or what timm knows and we do not.
        """
        return cls(
            _side(cfg["input_size"][1:]),
            tuple(cfg["mean"]),
            tuple(cfg["std"]),
            cfg["interpolation"],
            cfg.get("crop_pct") or 0.875,  # timm's default
            cfg.get("crop_mode") or "center",
        )

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> "Preprocessing":
        """What an open_clip model's `visual.preprocess_cfg` asks for.

        Raises:
            ValueError: for images that are not square.
        """
        size = cfg["size"]
        return cls(
            _side(size if isinstance(size, (tuple, list)) else (size, size)),
            tuple(cfg["mean"]),
            tuple(cfg["std"]),
            cfg["interpolation"],
            crop_mode=next(ours for ours, theirs in CROP_MODES.items() if theirs == cfg["resize_mode"]),
            fill_color=cfg["fill_color"] if cfg["resize_mode"] == "longest" else None,
        )

    @property
    def border(self) -> tuple[int, int, int]:
        """(3,) the border's colour, 0 to 255."""
        red, green, blue = self.mean if self.fill_color is None else (self.fill_color / 255,) * 3
        return round(255 * red), round(255 * green), round(255 * blue)

    @property
    def low_and_high(self) -> tuple[float, float]:
        """The least and the greatest value of an image."""
        ends = [((end - mean) / std) for end in (0, 1) for mean, std in zip(self.mean, self.std)]
        return min(ends), max(ends)

    def config_fields(self) -> dict[str, Any]:
        """All but the size, which the model's configuration has as img_size."""
        return {name: value for name, value in asdict(self).items() if name != "size"}

    def to_json(self) -> str:
        """What preprocessor_config.json holds, where transformers looks for it."""
        return json.dumps({"preprocessing": asdict(self)}, sort_keys=True, indent=2)

    def timm_config(self) -> dict[str, Any]:
        """What timm's `pretrained_cfg` and `create_transform` call these; of a border they know the mean alone."""
        return {
            "input_size": (3, self.size, self.size),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "interpolation": self.interpolation,
        }

    def open_clip_config(self) -> dict[str, Any]:
        """What open_clip's `PreprocessCfg` calls these.

        Raises:
            ValueError: where it has no such thing.
        """
        if self.crop_pct != 1:
            raise ValueError(f"model.config.crop_pct must be 1, as open_clip crops no other share, got {self.crop_pct}")
        return {
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "resize_mode": CROP_MODES[self.crop_mode],
            "fill_color": self.border if self.crop_mode == "border" else 0,
        }


def _side(size: Any) -> int:
    if size[0] != size[1]:
        raise ValueError(f"size must be that of squares, got {tuple(size)}")
    return int(size[0])
