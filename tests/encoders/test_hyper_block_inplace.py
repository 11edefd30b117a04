"""A HyperBlock overwrites intermediate results of its own: values, gradients stay timm's, and no hook notices."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from hyperclip_fast import HyperViT
from hyperclip_fast.hyper_block import HyperBlock, _Gelu
from tests.helpers import assert_close

B, N, D = 2, 5, 24


def make_blocks():
    torch.manual_seed(0)
    stock = Block(D, num_heads=3, init_values=0.5).eval()
    hyper = copy.deepcopy(stock)
    hyper.__class__ = HyperBlock
    return stock, hyper, torch.randn(B, N, D)


class Names(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_values_are_timms_and_the_input_is_left_alone():
    stock, hyper, x = make_blocks()
    given = x.clone()
    with torch.no_grad(), Names() as names:
        total, delta = hyper(x)
    assert {"gelu_", "add_"} <= set(names.seen) and "gelu" not in names.seen
    assert delta is None and torch.equal(x, given)
    assert torch.equal(total, stock(x))


def test_autograd_sees_no_overwriting():
    stock, hyper, x = make_blocks()
    with Names() as names:
        total, _ = hyper(x.requires_grad_())
    assert not {"gelu_", "add_"} & set(names.seen)
    for _ in range(2):  # a second backward finds what the first found
        grads = torch.autograd.grad(total.square().sum(), [x, *hyper.parameters()], retain_graph=True)
        expected = torch.autograd.grad(stock(x).square().sum(), [x, *stock.parameters()])
        assert all(torch.equal(ours, timms) for ours, timms in zip(grads, expected, strict=True))


def test_gradient_of_the_gelu_overwrites_what_came_in():
    x, incoming = torch.randn(B, N, D, requires_grad=True), torch.randn(B, N, D)
    given = incoming.clone()
    _Gelu.apply(x).backward(incoming)
    assert torch.equal(incoming, x.grad)
    assert torch.equal(x.grad, torch.autograd.grad(F.gelu(x), x, given)[0])


def test_gradients_of_gradients_and_forward_mode():
    stock, hyper, x = make_blocks()
    results = []
    for block in (lambda x: hyper(x)[0], stock):
        y = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the one that can be differentiated twice
            out = block(y)
        (slope,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.square().sum(), y)
        with torch.autograd.forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(block(dual)).tangent
        results.append((slope, curvature, tangent, torch.func.vmap(block)(torch.stack([x, 2 * x]))))
    for ours, timms in zip(*results, strict=True):
        assert_close(ours, timms.double())


@pytest.mark.parametrize(
    "name", ["norm1", "norm2", "attn", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "ls2", "drop_path2"]
)
def test_a_hook_keeps_what_it_was_shown(name):
    stock, hyper, x = make_blocks()
    shown = {}
    for key, block in (("stock", stock), ("hyper", hyper)):
        module = block.get_submodule(name)
        module.register_forward_hook(lambda _, args, out, key=key: shown.update({key: (args[0], out)}))
    with torch.no_grad():
        assert torch.equal(hyper(x)[0], stock(x))
    for ours, timms in zip(shown["hyper"], shown["stock"]):
        assert torch.equal(ours, timms)


def test_intermediates_are_not_overwritten_by_later_blocks():
    stock = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=0).eval()
    hyper, images = HyperViT.from_timm(stock).eval(), torch.randn(B, 3, 32, 32)
    with torch.inference_mode():
        _, taken = hyper.forward_intermediates(images)
        _, expected = stock.forward_intermediates(images)
    for ours, timms in zip(taken, expected):
        assert torch.equal(ours, timms)


def test_a_sum_wider_than_the_stream_keeps_its_dtype():
    stock, hyper, x = make_blocks()
    for block in (stock, hyper):
        block.ls2.double()
    with torch.no_grad():
        total, _ = hyper(x)
        assert total.dtype == torch.float64 and torch.equal(total, stock(x))
