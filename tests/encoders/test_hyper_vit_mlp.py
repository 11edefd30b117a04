"""The MLP of a HyperBlock: when its GELU joins the first product, and that the plain path is timm's own."""

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from hyperclip_fast import hyper_block
from hyperclip_fast.hyper_block import HyperBlock
from hyperclip_fast.kernels.dispatch import use_triton
from tests.helpers import DEVICE, assert_close, kernel_run

B, N, D = 2, 5, 24
LISTENERS = {
    "a forward hook on fc1": lambda mlp: mlp.fc1.register_forward_hook(lambda *_: None),
    "a forward hook on act": lambda mlp: mlp.act.register_forward_hook(lambda *_: None),
    "a pre-hook on the mlp": lambda mlp: mlp.register_forward_pre_hook(lambda *_: None),
    "a backward hook on fc1": lambda mlp: mlp.fc1.register_full_backward_hook(lambda *_: None),
    "a backward pre-hook on fc1": lambda mlp: mlp.fc1.register_full_backward_pre_hook(lambda *_: None),
    "a forward of its own": lambda mlp: setattr(mlp.act, "forward", type(mlp.act)().forward),
    "a parametrization": lambda mlp: nn.utils.parametrizations.weight_norm(mlp.fc1),
}
OTHERS = {
    "tanh GELU": lambda: Mlp(D, 4 * D, act_layer=lambda: nn.GELU(approximate="tanh")),
    "ReLU": lambda: Mlp(D, 4 * D, act_layer=nn.ReLU),
    "norm": lambda: Mlp(D, 4 * D, norm_layer=nn.LayerNorm),
    "dropout": lambda: Mlp(D, 4 * D, drop=0.1).train(),
    "another class": lambda: type("MyMlp", (Mlp,), {})(D, 4 * D),
}


@pytest.fixture
def fused(monkeypatch):
    """The shapes of linear_gelu's calls."""
    calls, original = [], hyper_block.run_linear_gelu

    def counting(h, weight, bias, is_fused):
        calls.append(tuple(weight.shape))
        return original(h, weight, bias, is_fused)

    monkeypatch.setattr(hyper_block, "run_linear_gelu", counting)
    return calls


def make(build=lambda: Mlp(D, 4 * D).eval()):
    torch.manual_seed(0)
    return build().to(DEVICE), torch.randn(B, N, D, device=DEVICE)


class Given(nn.Module):
    """A norm whose output is known."""

    def __init__(self, h):
        super().__init__()
        self.h = h

    def forward(self, x):
        return self.h


def run(mlp, h):
    """What a block adds to a stream of zeros."""
    block = HyperBlock(D, 2, device="meta")
    block.mlp, block.norm2 = mlp, Given(h)
    x, delta = block.feed_forward(torch.zeros_like(h), None, None, use_triton(h))
    return x if delta is None else delta


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_a_plain_mlp_is_fused_and_keeps_its_values(bias, drop, fused, triton_backend):
    pytest.importorskip("triton")
    mlp, h = make(lambda: Mlp(D, 4 * D, bias=bias, drop=drop).eval())
    with kernel_run():
        out = run(mlp, h)
        out.square().sum().backward()
    assert fused == [(4 * D, D)]
    exact = copy.deepcopy(mlp).double()
    exact.zero_grad()
    expected = exact(h.double())
    expected.square().sum().backward()
    assert_close(out, expected.detach(), "out")
    for (name, ours), reference in zip(mlp.named_parameters(), exact.parameters()):
        assert_close(ours.grad, reference.grad, name)


@pytest.mark.parametrize("listener", LISTENERS)
def test_an_mlp_that_is_listened_to_runs_its_own_modules(listener, fused, triton_backend):
    pytest.importorskip("triton")
    mlp, h = make()
    LISTENERS[listener](mlp)
    assert torch.equal(run(mlp, h), mlp(h))
    assert fused == []


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_other_mlps_run_as_they_are(build, fused, triton_backend):
    pytest.importorskip("triton")
    mlp, h = make(build)
    torch.manual_seed(1)
    ours = run(mlp, h)
    torch.manual_seed(1)
    assert torch.equal(ours, mlp(h))
    assert fused == []


@pytest.mark.skipif(DEVICE != "cpu", reason="the reference path of the CPU")
def test_on_a_cpu_the_mlp_is_untouched(fused):
    mlp, h = make()
    assert torch.equal(run(mlp, h), mlp(h))
    assert fused == []
