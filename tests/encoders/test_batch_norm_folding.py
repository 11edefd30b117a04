"""A BatchNorm folded into the convolution before it changes nothing but the count of layers."""

import copy

import pytest
import torch
from torch import nn

from hyperclip_fast.batch_norm_folding import fuse_batch_norms
from tests.encoders.encoder_cases import images_of, small_pair, stock_model
from tests.helpers import assert_close

FULLY = ("tinynet_e", "mobilenetv3_small_100", "resnet18", "repvit_m1", "mobilevitv2_100")


def batch_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
@pytest.mark.parametrize("name", FULLY)
def test_fused_model_computes_the_same_without_batch_norm(name):
    stock, x = stock_model(name), images_of(name, 2)
    before = copy.deepcopy(stock.state_dict())
    fused = fuse_batch_norms(stock, x[:1])
    assert not batch_norms(fused) and batch_norms(stock)
    narrow = name == "repvit_m1"  # timm's own fusion computes in float32
    assert_close(fused(x), stock(x), name, slack=1e8 if narrow else 100)
    assert all(torch.equal(value, before[key]) for key, value in stock.state_dict().items())


class Odd(nn.Module):
    """Convolutions whose output somebody else reads, too, or that run twice; a norm before its convolution."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(6))

    def forward(self, x):
        x = self.convs[0](self.norms[0](x))
        y = self.convs[1](x)
        x = self.norms[1](y) + y
        x = self.norms[2](self.convs[2](x)) + self.convs[2](x)
        x = self.norms[3](self.norms[3](self.convs[3](x)))
        x = self.norms[4](self.convs[4](x))
        return self.norms[5](x.relu())


@torch.no_grad()
def test_only_what_nobody_else_reads_is_folded():
    torch.manual_seed(0)
    model, x = Odd().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for norm in model.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    fused = fuse_batch_norms(model, x[:1])
    assert batch_norms(fused) == [f"norms.{i}" for i in (0, 1, 2, 3, 5)]
    assert_close(fused(x), model(x), slack=10)


@torch.no_grad()
def test_activation_stays():
    stock, _ = small_pair()
    fused = fuse_batch_norms(stock, torch.zeros(1, 3, 12, 12, dtype=torch.float64))
    assert isinstance(fused.norm, nn.ReLU) and not batch_norms(fused)
