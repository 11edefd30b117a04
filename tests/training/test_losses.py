"""SigLIP's loss in chunks: the equation in float64, exact gradients, memory that does not grow with the square."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperclip_fast.training.losses import balanced_bias, siglip_loss

SIZES = st.lists(st.tuples(st.integers(1, 7), st.integers(2, 9)), min_size=1, max_size=3)  # (N_t, K_t) of each task


def features(sizes, dtype=torch.float64, width=5):
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    images, texts = [draw(n) for n, _ in sizes], [draw(k) for _, k in sizes]
    labels = [torch.randint(k, (n,), generator=generator) for n, k in sizes]
    scale, bias = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (3.0, -2.0))
    return images, texts, scale, bias, labels


def equation(images, texts, scale, bias, labels):
    total = 0
    for x, y, shown in zip(images, texts, labels):
        sign = 2 * torch.nn.functional.one_hot(shown, len(y)) - 1
        total = total - torch.nn.functional.logsigmoid(sign * (scale * x @ y.T + bias)).sum() / len(x)
    return total / len(images)


def gradients(loss, arguments):
    images, texts, scale, bias, _ = arguments
    return torch.autograd.grad(2 * loss(*arguments), [*images, *texts, scale, bias])


@given(sizes=SIZES, chunk=st.integers(0, 8))
def test_loss_and_gradients_are_the_equations(sizes, chunk):
    arguments = features(sizes)
    torch.testing.assert_close(siglip_loss(*arguments, chunk), equation(*arguments), rtol=1e-12, atol=1e-12)
    ours = gradients(lambda *given: siglip_loss(*given, chunk), arguments)
    for grad, expected in zip(ours, gradients(equation, arguments)):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_equal_open_clips_loss(chunk):
    images, texts, scale, bias, _ = features([(8, 8), (8, 8)], torch.float32)
    whole, parts = (siglip_loss(torch.stack(images), torch.stack(texts), scale, bias, chunk=c) for c in (0, chunk))
    torch.testing.assert_close(parts, whole)
    inputs = [*images, *texts, scale, bias]
    for ours, expected in zip(torch.autograd.grad(parts, inputs), torch.autograd.grad(whole, inputs)):
        torch.testing.assert_close(ours, expected)


def test_what_is_kept_for_backward_grows_with_the_batch_only():
    def kept(size, chunk):
        images, texts, scale, bias, _ = features([(size, size)], torch.float32, width=4)
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
            siglip_loss(images, texts, scale, bias, chunk=chunk)
        return sum(total)

    assert kept(512, 64) <= 2 * 512 * 4 * 4 + 64  # both features' gradients, and two scalars'
    assert kept(1024, 64) < 2.1 * kept(512, 64)
    assert kept(1024, 0) > 3.9 * kept(512, 0) > 50 * kept(512, 64)


@pytest.mark.parametrize("classes", [2, 16, 32768])
def test_the_balanced_bias_is_where_its_gradient_vanishes(classes):
    bias = torch.tensor(balanced_bias(classes), dtype=torch.float64, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(bias) - (classes - 1) * torch.nn.functional.logsigmoid(-bias)
    assert abs(torch.autograd.grad(loss, bias)[0]) < 1e-9
    assert math.log(classes) < loss < math.log(classes) + 1.01


def test_shapes_that_do_not_fit_are_refused():
    images, texts, scale, bias, labels = features([(3, 4), (2, 5)])
    with pytest.raises(ValueError, match="must be \\(G, K, E\\)"):
        siglip_loss(images, texts, scale, bias)  # no labels, and not an image a class
    with pytest.raises(ValueError, match="must be \\(G, K, E\\)"):
        siglip_loss(images, texts, scale, bias, labels[:1])
    with pytest.raises(ValueError, match="must be \\(G, K, E\\)"):
        siglip_loss(images, texts[:1], scale, bias, labels)
