"""The named encoders at a small image size, and stock models in which every norm matters."""

import copy
from functools import lru_cache

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from hyperclip_fast import HyperEncoder, NormParams
from hyperclip_fast.encoders import create_encoder

# Every named encoder: arguments that let it take small images, and its norm parameters.
NAMED = {
    "efficientnet_b0": ({}, 42016),
    "efficientnet_b1": ({}, 62048),
    "efficientnet_b2": ({}, 67568),
    "tinynet_a": ({}, 52000),
    "tinynet_c": ({}, 21552),
    "tinynet_e": ({}, 14240),
    "mobilenetv3_small_100": ({}, 12112),
    "mobilenetv3_large_100": ({}, 24400),
    "mobilevit_s": ({}, 20512),
    "mobilevitv2_100": ({}, 23872),
    "edgenext_small": ({}, 8000),
    "convnext_atto": ({}, 4960),
    "fastvit_t8": ({}, 27264),
    "repvit_m1": ({}, 46992),
    "resnet18": ({}, 9600),
    "resnet50": ({}, 53120),
    "swin_tiny_patch4_window7_224": ({"img_size": 56}, 24768),
    "vit_tiny_patch16_224": ({"img_size": 48}, 9600),
}
FAMILIES = ("tinynet_e", "mobilevitv2_100", "convnext_atto", "resnet18", "swin_tiny_patch4_window7_224")
MIX = [3, 1, 0, 0]  # repeated, unsorted; 2 unused


@lru_cache(maxsize=1)
def stock_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A stock model in eval mode with weights, biases and statistics of norms that are not 1 and 0; shared: copy it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **NAMED[name][0]).eval().to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor)).add_(0.1 * torch.rand_like(tensor))
    return model


def encoder_of(stock: nn.Module) -> nn.Module:
    """HyperViT or HyperEncoder of a stock model."""
    return create_encoder(stock).train(stock.training)


def images_of(name: str, batch: int = len(MIX), dtype: torch.dtype = torch.float64) -> Tensor:
    side = NAMED[name][0].get("img_size", 64)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=dtype)


def rows_of(encoder: nn.Module, tasks: int = 4, scale: float = 0.2) -> NormParams:
    """Random rows around the encoder's own."""
    base = encoder.base_params.table.detach()
    noise = torch.randn(tasks, base.shape[1], generator=torch.Generator().manual_seed(2), dtype=base.dtype)
    return NormParams(encoder.norm_spec, base + scale * noise)


def with_row(stock: nn.Module, rows: NormParams, task: int) -> nn.Module:
    """A copy of a stock model that holds one task's row."""
    model, row = copy.deepcopy(stock), rows.state_dict(task)
    missing, unexpected = model.load_state_dict(row, strict=False)
    assert not unexpected and not set(missing) & set(row)
    return model


class Small(nn.Module):
    """A BatchNorm network of two blocks: what many tests need, in milliseconds."""

    def __init__(self, norm: type[nn.Module] = BatchNormAct2d, width: int = 6):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, bias=False)
        self.norm = norm(width)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.norm(self.conv(x))).mean((2, 3))


def small_pair(
    norm: type[nn.Module] = BatchNormAct2d, dtype: torch.dtype = torch.float64
) -> tuple[Small, HyperEncoder]:
    """A small stock model in eval mode and its HyperEncoder."""
    torch.manual_seed(0)
    stock = Small(norm).to(dtype).eval()
    with torch.no_grad():
        for tensor in (*stock.parameters(), *stock.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor)).add_(0.1 * torch.rand_like(tensor))
    return stock, HyperEncoder.from_timm(stock)
