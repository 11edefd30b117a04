"""What a block keeps of its last look at its parts: never what no longer holds."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hyperclip_fast.block_parts import parts_of
from tests.encoders.vit_cases import hyper_pair


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_it_looks_once(monkeypatch):
    _, vit = hyper_pair()
    block = vit.blocks[0]
    assert parts_of(block) is parts_of(block)
    vit.train()
    assert parts_of(block) is parts_of(block), "training mode is asked for, not kept"


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def exchange(block):
    block.attn.qkv = nn.Sequential(block.attn.qkv, nn.Identity())


def parametrized(block):
    parametrize.register_parametrization(block.attn.proj, "weight", Doubling())


def dropout(block):
    block.mlp.drop1.p = 0.5


def manual_attention(block):
    block.attn.fused_attn = False


def own_forward(block):
    forward = block.mlp.fc2.forward
    block.mlp.fc2.forward = lambda x: 2 * forward(x)


def hook(block):
    block.mlp.fc1.register_forward_hook(lambda module, args, out: 2 * out)


def tanh(block):
    block.mlp.act.approximate = "tanh"


def plain_tensor(block):
    weight = 2 * block.attn.proj.weight.detach()
    del block.attn.proj.weight
    block.attn.proj.weight = weight


def global_hook(block):
    def double(module, args, out):
        return 2 * out if module is block.mlp.act else None

    HANDLES.append(torch.nn.modules.module.register_module_forward_hook(double))


def other_weight(block):
    block.attn.qkv.weight = nn.Parameter(2 * block.attn.qkv.weight.detach())


HANDLES = []
CHANGES = [exchange, parametrized, dropout, manual_attention, own_forward, hook, tanh, other_weight]
CHANGES += [plain_tensor, global_hook]


@pytest.fixture(autouse=True)
def _handles():
    yield
    while HANDLES:
        HANDLES.pop().remove()


@pytest.mark.parametrize("is_grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_change_is_seen(change, is_grad):
    """After a forward in which nothing was listening, block 0 changes, in ours and in timm's."""
    stock, vit = hyper_pair()
    with torch.set_grad_enabled(is_grad):
        for model in (stock.train(), vit.train()):
            model(images())
            change(model.blocks[0])
        torch.manual_seed(0)
        expected = stock(images())
        torch.manual_seed(0)
        torch.testing.assert_close(vit(images()), expected, rtol=1e-5, atol=1e-5)


def test_what_was_heard_is_looked_at_again():
    _, vit = hyper_pair()
    block = vit.blocks[0]
    handle = block.mlp.fc1.register_forward_hook(lambda *_: None)
    vit(images())
    assert parts_of(block).mlp is None
    handle.remove()
    assert parts_of(block).mlp is block.mlp


def test_copies_look_for_themselves():
    _, vit = hyper_pair()
    vit(images())
    for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert "kept_parts" not in vars(twin.blocks[0])
        assert parts_of(twin.blocks[0]).attn is twin.blocks[0].attn
        assert torch.equal(twin(images()), vit(images()))
