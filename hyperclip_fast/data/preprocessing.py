"""How pictures become what a model takes: one value, which the model's configuration carries and everybody reads."""

from dataclasses import dataclass
from typing import Any

HALF = (0.5, 0.5, 0.5)  # mean and standard deviation that bring [0, 1] to [-1, 1]


@dataclass(frozen=True)
class Preprocessing:
    """The shorter side to `size` / `crop_pct`, the centre square of `size`, then (pixels - mean) / std a channel.

    Args:
        size: S in pixels.
        mean: of red, green and blue, with pixels in [0, 1].
        std: likewise.
        interpolation: "bilinear" or "bicubic", antialiased.
        crop_pct: the centre square's share of the shorter side, in (0, 1].

    Raises:
        ValueError: for numbers out of range.
    """

    size: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self):
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or (name == "std" and min(self.std) <= 0):
                raise ValueError(f"{name} must be three numbers, std's positive, got {getattr(self, name)}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f'interpolation must be "bilinear" or "bicubic", got {self.interpolation!r}')
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")

    def timm_config(self) -> dict[str, Any]:
        """What timm's `pretrained_cfg` and `create_transform` call these."""
        return {
            "input_size": (3, self.size, self.size),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }
