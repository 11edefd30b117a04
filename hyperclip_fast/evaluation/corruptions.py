"""Five corruptions in five strengths, on tensors: noise, blur, contrast, pixelate, JPEG (after Hendrycks, 1903.12261).

The strengths are for small images: noise and contrast are the paper's; blur and blocks are shares of the image's side.
"""

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast.utils.extras import require

SEVERITIES = (1, 2, 3, 4, 5)
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of [0, 1]
BLUR = (0.008, 0.012, 0.018, 0.026, 0.038)  # standard deviation, of the side
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
PIXELS = (0.6, 0.5, 0.4, 0.3, 0.25)  # of the side
QUALITY = (25, 18, 15, 10, 7)


def noise(images: Tensor, severity: int, first: int) -> Tensor:
    """Gaussian noise on each pixel, drawn for each image by its index."""
    seeded = [torch.Generator().manual_seed(first + i) for i in range(len(images))]
    random = [torch.randn(images.shape[1:], generator=generator) for generator in seeded]
    return images + 2 * NOISE[severity - 1] * torch.stack(random).to(images)


def blur(images: Tensor, severity: int, first: int) -> Tensor:
    """A Gaussian blur, edges repeated."""
    sigma = BLUR[severity - 1] * images.shape[-1]
    radius = max(1, round(3 * sigma))
    at = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-(at**2) / (2 * sigma**2), 0).expand(3, 1, 1, -1)
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)


def contrast(images: Tensor, severity: int, first: int) -> Tensor:
    """Closer to each channel's mean."""
    mean = images.mean((2, 3), keepdim=True)
    return torch.lerp(mean, images, CONTRAST[severity - 1])


def pixelate(images: Tensor, severity: int, first: int) -> Tensor:
    """Fewer pixels, blown up."""
    size = images.shape[-2:]
    small = [max(1, round(PIXELS[severity - 1] * n)) for n in size]
    return F.interpolate(F.interpolate(images, small, mode="area"), size, mode="nearest")


def jpeg(images: Tensor, severity: int, first: int) -> Tensor:
    """Through a JPEG file of low quality."""
    image_module = require("PIL.Image", "train")
    pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
    out = []
    for picture in pixels:
        file = io.BytesIO()
        image_module.fromarray(picture).save(file, "JPEG", quality=QUALITY[severity - 1])
        read = image_module.open(file).convert("RGB").tobytes()
        out.append(torch.frombuffer(bytearray(read), dtype=torch.uint8).view(picture.shape))
    return (torch.stack(out).permute(0, 3, 1, 2).float() / 127.5 - 1).to(images)


CORRUPTIONS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg": jpeg,
}


def corrupt(images: Tensor, name: str, severity: int, first: int = 0) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1], corrupted, in the same range.

    Args:
        images: what to corrupt.
        name: one of CORRUPTIONS.
        severity: one of SEVERITIES.
        first: index of the first image in its set: an image gets the same noise in any batch.

    Raises:
        ValueError: for an unknown corruption, a severity outside 1 ... 5, or images of another shape.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name must be one of {list(CORRUPTIONS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity!r}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, S, S), got {tuple(images.shape)}")
    return CORRUPTIONS[name](images, severity, first).clamp(-1, 1)
