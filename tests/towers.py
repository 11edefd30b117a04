"""A text tower for tests: a fixed random vector for each string, and one trainable matrix."""

import hashlib

import torch
from torch import nn

import hyperclip_fast.hyperclip
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.hyperclip_config import HyperCLIPConfig


class HashTower(nn.Module):
    """encode(texts) -> (K, 24): depends on each string alone."""

    dim = 24

    def __init__(self, trainable: bool):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(self.dim), requires_grad=trainable)
        self.calls = 0

    def set_templates(self, templates):
        """It has none."""

    def freeze(self, frozen=True):
        self.requires_grad_(not frozen)

    def encode(self, texts):
        self.calls += 1
        seeds = [int.from_bytes(hashlib.md5(text.encode()).digest()[:6], "big") for text in texts]
        rows = [torch.randn(self.dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(self.matrix.device) @ self.matrix


def patch_text_tower(monkeypatch) -> None:
    """Every HyperCLIP made from here on has a HashTower."""
    monkeypatch.setattr(
        hyperclip_fast.hyperclip, "create_text_tower", lambda name, *, trainable, templates: HashTower(trainable)
    )


def tiny_config(**options) -> HyperCLIPConfig:
    """Two blocks of width 32 on 32-pixel images."""
    sizes = {"img_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2, "embed_dim": 16}
    return HyperCLIPConfig(**{**sizes, "hyper_width": 32, "hyper_heads": 2, "hyper_bottleneck": 8, **options})


def tiny_model(**options) -> HyperCLIP:
    """A HyperCLIP in eval mode whose hypernetwork no longer yields the base row for every task."""
    torch.manual_seed(0)
    model = HyperCLIP(tiny_config(**options)).eval()
    with torch.no_grad():
        for parameter in (model.hypernetwork or model).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
