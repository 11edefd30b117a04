"""RGBA pictures to the tensors that a model takes, with or without chance."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast.data.preprocessing import HALF, Preprocessing


def to_rgb(images: Tensor, background: int = 255) -> Tensor:
    """Pictures (B, 4, S, S) uint8 RGBA on a grey level of 0 ... 255 to (B, 3, S, S) float32 in [-1, 1]."""
    rgba = _unit_rgba(images)
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + (background / 255) * (1 - alpha)) * 2 - 1


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, S, S) to side `size`, antialiased; as they are where that is S."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1], such as `to_rgb` makes, as a model with this preprocessing takes them."""
    if preprocessing.mean == preprocessing.std == HALF:
        return images
    mean, std = (images.new_tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((images + 1) / 2 - mean) / std


def _unit_rgba(images: Tensor) -> Tensor:
    """RGBA in [0, 1] (B, 4, S, S) float32."""
    if images.dim() != 4 or images.shape[1] != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (B, 4, S, S) uint8, got {tuple(images.shape)} {images.dtype}")
    return images.float() / 255


def augment(images: Tensor, generator: torch.Generator, flip: Tensor | None = None) -> Tensor:
    """Training's view of pictures: moved, turned, scaled, mirrored, on light coloured grounds, colours jittered.

    Args:
        images: (B, 4, S, S) uint8 RGBA.
        generator: where all chance comes from.
        flip: (B,) bool, pictures of which half are mirrored; None: all.

    Returns:
        (B, 3, S, S) float32 in [-1, 1], on the images' device.
    """
    rgba = _unit_rgba(images)
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)
    grid = _grid(_random_affine(len(images), generator, flip).to(images.device), images.shape[-2:])
    warped = F.grid_sample(premultiplied, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    tint = _uniform((len(images), 1, 1, 1), 0, 0.6, generator) * _uniform((len(images), 3, 1, 1), 0, 1, generator)
    rgb = torch.addcmul(warped[:, :3], 1 - tint.to(images.device), 1 - warped[:, 3:])
    return _jitter_colours(rgb, generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _random_affine(count: int, generator: torch.Generator, flip: Tensor | None) -> Tensor:
    """Maps (B, 2, 3) from output to input positions: scale 0.75 ... 1.1, 15 degrees, shift of an eighth."""
    angle = _uniform((count,), -0.26, 0.26, generator)
    scale = _uniform((count,), 0.75, 1.1, generator)
    stretch = _uniform((count,), 0.92, 1.08, generator)
    shift = _uniform((count, 2), -0.125, 0.125, generator)
    mirror = _uniform((count,), 0, 1, generator) < 0.5
    if flip is not None:
        mirror = mirror & flip.to(mirror.device)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    side = torch.where(mirror, -stretch, stretch)
    rows = [torch.stack([cos * side, -sin, shift[:, 0]], 1), torch.stack([sin * side, cos, shift[:, 1]], 1)]
    return torch.stack(rows, 1)


def _grid(theta: Tensor, size: Sequence[int]) -> Tensor:
    """F.affine_grid (B, H, W, 2) for maps (B, 2, 3); as a sum of two small tensors, four times as fast."""
    y, x = ((torch.arange(n, device=theta.device) * 2 + 1) / n - 1 for n in size)
    across, down, shift = theta[:, None, None].unbind(-1)
    return x[:, None] * across + (y[:, None, None] * down + shift)


def _jitter_colours(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """Saturation, contrast and brightness of (B, 3, S, S) in [0, 1] varied; the result is in [-1, 1]."""
    shape = (len(rgb), 1, 1, 1)
    saturation = _uniform(shape, 0.7, 1.3, generator).to(rgb.device)
    contrast = _uniform(shape, 0.8, 1.2, generator).to(rgb.device)
    brightness = _uniform(shape, -0.1, 0.1, generator).to(rgb.device)
    grey = rgb.mean(dim=1, keepdim=True)
    rgb = torch.lerp(grey, rgb, saturation)
    return rgb.sub_(0.5).mul_(2 * contrast).add_(2 * brightness).clamp_(-1, 1)


def to_rgba(images: Tensor) -> Tensor:
    """Images (..., 3, S, S) in [-1, 1] as opaque uint8 RGBA (..., 4, S, S)."""
    rgb = ((images + 1) * 127.5).round().clamp(0, 255).byte()
    return torch.cat([rgb, torch.full_like(rgb[..., :1, :, :], 255)], -3)
