"""The hypernetwork reads a set: order, padding and duplicates of the batch do not matter; a new one is the base row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_fast.hypernetwork import HyperNetwork, pad_classes
from hyperclip_fast.norm_params import NormParams, NormSpec

SPEC = NormSpec(("a", "b", "c"), (8, 12, 8))
BASE = NormParams(SPEC, torch.randn(1, SPEC.num_params, generator=torch.Generator().manual_seed(1)))


def network(pool="cross", **options):
    torch.manual_seed(0)
    return HyperNetwork(SPEC, text_dim=16, width=32, depth=2, num_heads=2, pool=pool, bottleneck=8, **options)


def trained(pool, **options):
    """A network whose last layer is not zero any more."""
    net = network(pool, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("pool", ["cross", "mean"])
def test_a_new_network_yields_the_base_row_bit_for_bit(pool):
    params = network(pool)(torch.randn(3, 5, 16), base=BASE)
    assert torch.equal(params.table, BASE.table.expand(3, -1))


@pytest.mark.parametrize("pool", ["cross", "mean"])
def test_without_a_base_the_row_is_that_of_new_norm_layers(pool):
    params = network(pool)(torch.randn(2, 4, 16))
    for weight, bias in params.layers():
        assert torch.equal(weight, torch.ones_like(weight))
        assert torch.equal(bias, torch.zeros_like(bias))


@pytest.mark.parametrize("pool", ["cross", "mean"])
@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_order_and_padding_do_not_matter(pool, sizes, seed):
    net, generator = trained(pool), torch.Generator().manual_seed(seed)
    tasks = [torch.randn(size, 16, generator=generator) for size in sizes]
    together = net(*pad_classes(tasks), base=BASE).table
    for task, row in zip(tasks, together):
        shuffled = task[torch.randperm(len(task), generator=generator)]
        alone = net(shuffled[None], base=BASE).table[0]
        torch.testing.assert_close(alone, row, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("pool", ["cross", "mean"])
def test_other_names_give_other_rows(pool):
    net = trained(pool)
    first, second = net(torch.randn(2, 5, 16), base=BASE).table
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["cross", "mean"])
def test_every_parameter_and_the_base_get_gradients(pool):
    net, base = trained(pool), BASE.table.clone().requires_grad_()
    net(
        *pad_classes([torch.randn(3, 16), torch.randn(5, 16)]), base=NormParams(SPEC, base)
    ).table.square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent
    assert base.grad.abs().sum() > 0


def test_learned_tokens_ignore_the_text():
    net = trained("cross", learned_tokens=4)
    one, two = net(torch.randn(1, 3, 16), base=BASE), net(*pad_classes([torch.randn(6, 16)]), base=BASE)
    assert torch.equal(one.table, two.table)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.randn(2, 3, 15),), "class_embeddings must be"),
        ((torch.randn(2, 0, 16),), "class_embeddings must be"),
        ((torch.randn(2, 3, 16), torch.ones(2, 4, dtype=torch.bool)), "mask must be"),
        ((torch.randn(2, 3, 16), torch.ones(2, 3)), "mask must be"),
        ((torch.randn(2, 3, 16), torch.tensor([[True, True, False], [False] * 3])), "every task a class"),
        ((torch.randn(2, 3, 16), None, NormParams(NormSpec(("z",), (4,)), torch.ones(1, 8))), "base must follow"),
    ],
)
def test_refused_inputs(arguments, message):
    with pytest.raises(ValueError, match=message):
        network()(*arguments)


def test_refused_options():
    with pytest.raises(ValueError, match="pool must be one of"):
        network("max")
    with pytest.raises(ValueError, match="width must be a multiple"):
        HyperNetwork(SPEC, text_dim=16, width=30, num_heads=4)
    with pytest.raises(ValueError, match="class_embeddings must be non-empty"):
        pad_classes([torch.ones(2, 4), torch.ones(0, 4)])
