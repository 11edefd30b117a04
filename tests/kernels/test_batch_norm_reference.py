"""The plain PyTorch batch norm with rows of samples: the specification, held to its definition in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_fast.kernels.batch_norm.functional import ACTS, batch_norm_act, batch_norm_act_train
from tests.helpers import assert_close

NAMED_ACTS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "silu": lambda x: x * torch.sigmoid(x),
    "hard_swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}
FORMATS = (torch.contiguous_format, torch.channels_last)
IDS = torch.tensor([1, 0, 1, 3])


def make(dtype=torch.float64, layout=torch.contiguous_format, seed=0, shape=(4, 6, 5, 3), T=4, per_task=False):
    """x, weight, bias, residual; mean, var."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(T, 2 * shape[1] + 3, generator=generator).to(dtype)
    x, residual = ((2 * torch.randn(shape, generator=generator) + 0.5).to(dtype) for _ in range(2))
    mean = torch.randn((T, shape[1]) if per_task else shape[1], generator=generator)
    var = torch.rand(mean.shape, generator=generator) + 0.3
    rows = table[:, : shape[1]], table[:, shape[1] + 3 :]
    leaves = x.contiguous(memory_format=layout), *rows, residual
    return [leaf.detach().requires_grad_() for leaf in leaves], mean.to(dtype), var.to(dtype)


def definition(leaves, ids, mean, var, eps, act, residual_after_act):
    """Written from the equation; mean None: the batch's own."""
    x, weight, bias, residual = leaves
    if mean is None:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    elif mean.dim() == 2:
        mean, var = mean[ids], var[ids]
    mean, var, weight, bias = (t[..., None, None] for t in (mean, var, weight[ids], bias[ids]))
    normed = (x - mean) / (var + eps).sqrt() * weight + bias
    if residual is None:
        return NAMED_ACTS[act](normed)
    return NAMED_ACTS[act](normed) + residual if residual_after_act else NAMED_ACTS[act](normed + residual)


@settings(max_examples=100)
@given(
    st.sampled_from(list(NAMED_ACTS)),
    st.sampled_from(FORMATS),
    st.sampled_from(((4, 6, 5, 3), (4, 1, 1, 2), (4, 9, 1, 1), (4, 3, 8, 8), (4, 5, 3, 1), (4, 5, 1, 3))),
    st.sampled_from(("batch", "shared", "per task")),
    st.sampled_from((None, False, True)),
    st.integers(0, 2**31),
)
def test_matches_its_definition_forward_and_backward(act, layout, shape, statistics, after, seed):
    leaves, mean, var = make(layout=layout, shape=shape, seed=seed, per_task=statistics == "per task")
    if after is None:
        leaves[3] = None
    options = (1e-3, act, leaves[3], bool(after))
    if statistics == "batch":
        out, mean_of_batch, var_of_batch = batch_norm_act_train(*leaves[:3], IDS, *options)
        assert_close(mean_of_batch, leaves[0].mean((0, 2, 3)).detach(), "mean", 1)
        assert_close(var_of_batch, leaves[0].var((0, 2, 3), correction=0).detach(), "var")
        mean = var = None
    else:
        out = batch_norm_act(*leaves[:3], IDS, mean, var, *options)
    expected = definition(leaves, IDS, mean, var, 1e-3, act, after)
    assert out.is_contiguous(memory_format=layout)
    assert_close(out, expected.detach(), "out", 1)
    wanted = [leaf for leaf in leaves if leaf is not None]
    head = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    expected_grads = torch.autograd.grad(expected, wanted, head)
    grads = torch.autograd.grad(out, wanted, head)
    for name, grad, right in zip(("x", "weight", "bias", "residual"), grads, expected_grads):
        assert_close(grad, right, f"d {name}", 10)
    with torch.no_grad():  # written over itself
        again = batch_norm_act(*leaves[:3], IDS, *make_statistics(leaves[0], mean, var), *options)
    assert_close(again, expected.detach(), "out without a gradient", 1)


def make_statistics(x, mean, var):
    return (mean, var) if mean is not None else (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("half_model", [False, True])
def test_one_row_is_torch_batch_norm_bit_for_bit(dtype, layout, half_model):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 3).to(dtype).contiguous(memory_format=layout)
    norm = torch.nn.BatchNorm2d(6)
    torch.nn.init.normal_(norm.weight)
    norm.running_mean.normal_()
    norm = norm.to(dtype) if half_model else norm
    rows = norm.weight.detach()[None], norm.bias.detach()[None]
    for act, ids in itertools.product(NAMED_ACTS, (None, torch.zeros(4, dtype=torch.int64))):
        stock = ACTS[act](norm.eval()(x), inplace=False)
        assert torch.equal(batch_norm_act(x, *rows, ids, norm.running_mean, norm.running_var, 1e-5, act), stock)
        out, mean, var = batch_norm_act_train(x, *rows, ids, 1e-5, act)
        assert torch.equal(
            out, ACTS[act](F.batch_norm(x, None, None, *rows[0], *rows[1], training=True), inplace=False)
        )
        assert mean.dtype == var.dtype == torch.float32
        torch.testing.assert_close(mean, x.float().mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(var, x.float().var((0, 2, 3), correction=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", FORMATS, ids=str)
def test_narrow_types_are_computed_in_float32(dtype, layout):
    leaves, mean, var = make(dtype, layout)
    wide = [leaf.detach().double() for leaf in leaves]
    for rows in (leaves[1:3], [row.float() for row in leaves[1:3]]):
        out = batch_norm_act(leaves[0], *rows, IDS, mean, var, 1e-3, "silu").detach()
        expected = definition((*wide[:3], None), IDS, mean.double(), var.double(), 1e-3, "silu", False)
        assert out.dtype == dtype
        assert_close(out, expected, "out", 0.5, slack=3)  # the norm's output is rounded before the activation
        out, batch_mean, batch_var = batch_norm_act_train(leaves[0], *rows, IDS, 1e-3)
        assert_close(out.detach(), definition((*wide[:3], None), IDS, None, None, 1e-3, "none", False), "train", 0.5)
        assert_close(batch_mean, wide[0].mean((0, 2, 3)), "mean", 1)
        assert_close(batch_var, wide[0].var((0, 2, 3), correction=0), "var")


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("is_batch", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2)], ids=str)
def test_gradients_are_exact_and_have_gradients(layout, is_batch, frozen):
    leaves, mean, var = make(layout=layout, shape=(4, 2, 2, 1))
    inputs = [leaf.detach().requires_grad_(i not in frozen) for i, leaf in enumerate(leaves[:3])]

    def run(x, weight, bias):
        if is_batch:
            return batch_norm_act_train(x, weight, bias, IDS, 1e-1)[0].sin()
        return batch_norm_act(x, weight, bias, IDS, mean, var, 1e-3).sin()

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_large_mean_does_not_swallow_the_variance():
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64) * 0.5 + 200
    for layout in FORMATS:
        narrow = x.float().contiguous(memory_format=layout)
        _, mean, var = batch_norm_act_train(narrow, torch.ones(8, 3), torch.zeros(8, 3), None)
        torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=4e-6, atol=0)
        torch.testing.assert_close(var.double(), x.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows_dtype", [None, torch.float32], ids=str)
def test_one_rows_statistics_are_float32(dtype, rows_dtype):
    x = (400 * torch.randn(4, 3, 5, 3)).to(dtype)  # variances that float16 does not hold
    rows = torch.ones(1, 3, dtype=rows_dtype or dtype), torch.zeros(1, 3, dtype=rows_dtype or dtype)
    out, mean, var = batch_norm_act_train(x.requires_grad_(), *rows, None)
    assert torch.equal(out, F.batch_norm(x, None, None, *rows[0], *rows[1], training=True))
    assert mean.dtype == var.dtype == torch.float32 and not mean.requires_grad and not var.requires_grad
    wide = x.detach().double()
    assert_close(mean, wide.mean((0, 2, 3)), "mean", 400)
    assert_close(var, wide.var((0, 2, 3), correction=0), "var")


@pytest.mark.parametrize("layout", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 6, 5, 3), (4, 6, 0, 3)], ids=str)
def test_an_empty_batch(shape, layout):
    leaves, mean, var = make(layout=layout, shape=shape)
    out = batch_norm_act(*leaves[:3], IDS[: shape[0]], mean, var, residual=leaves[3])
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert not any(grad.any() for grad in grads)


def step(x, weight, bias, ids, mean, var, residual):
    out, batch_mean, batch_var = batch_norm_act_train(x, weight, bias, ids, 1e-3, "relu6", residual)
    return batch_norm_act(out, weight, bias, ids, mean, var, 1e-3, "gelu") * batch_mean.sum() / batch_var.sum()


@pytest.mark.parametrize("T", [1, 4])
def test_compiles_to_one_graph_and_exports(T):
    torch._dynamo.reset()
    leaves, mean, var = make(torch.float32, T=T)
    ids = IDS.clamp(max=T - 1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = (*leaves[:3], ids, mean, var, leaves[3])
    results = [torch.autograd.grad(f(*arguments).sum(), leaves) for f in (compiled, step)]
    for ours, eager in zip(*results):
        assert_close(ours, eager.double(), scale=1e-3, slack=10)

    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias, ids, mean, var, residual):
            return batch_norm_act(x, weight, bias, ids, mean, var, 1e-3, "silu", residual)

    inputs = tuple(a.detach() for a in arguments)
    assert_close(torch.export.export(Norm(), inputs).module()(*inputs), Norm()(*inputs).double())


def test_under_function_transforms():
    leaves, mean, var = make()
    x, weight, bias = (leaf.detach() for leaf in leaves[:3])

    def loss(weight):
        out = batch_norm_act_train(x, weight, bias, IDS, 1e-3, "silu")[0]
        return batch_norm_act(out, weight, bias, IDS, mean, var, 1e-3, "hard_swish").sin().sum()

    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    assert_close(torch.func.grad(loss)(weight), leaf.grad)


def test_keeps_x_and_no_second_copy_of_it():
    leaves, _, _ = make(torch.float32, shape=(4, 6, 32, 32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm_act_train(*leaves[:3], IDS)
    assert sum(t.numel() for t in kept if t is not leaves[0]) <= 20 * 4 * 6


X, ROWS = torch.zeros(3, 8, 5, 4), torch.zeros(4, 8)
REFUSED = {
    "x must be (B, C, H, W)": {"x": torch.zeros(3, 8, 5)},
    "weight must be (T, C) with C = 8": {"weight": torch.zeros(4, 7)},
    "weight must be (T, C)": {"weight": torch.zeros(8)},
    "bias must have weight's shape": {"bias": torch.zeros(3, 8)},
    "bias must have weight's shape and dtype": {"bias": torch.zeros(4, 8, dtype=torch.float16)},
    "task_ids must be given": {"task_ids": None},
    "task_ids must be (B,) with B = 3": {"task_ids": torch.zeros(2, dtype=torch.int64)},
    "task_ids must be int64 or int32": {"task_ids": torch.zeros(3)},
    "act must be one of ('none', 'relu'": {"act": "swish"},
    "residual must have x's shape": {"residual": torch.zeros(3, 8, 4, 5)},
    "residual must have x's shape and dtype": {"residual": torch.zeros(3, 8, 5, 4, dtype=torch.float16)},
    "mean must be (C,) or (T, C) with C = 8, T = 4": {"mean": torch.zeros(3, 8)},
    "var must have mean's shape": {"var": torch.zeros(4, 8)},
    "must not require a gradient": {"var": torch.zeros(8, requires_grad=True)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    arguments = {"x": X, "weight": ROWS, "bias": ROWS, "task_ids": torch.zeros(3, dtype=torch.int64)}
    arguments |= {"mean": torch.zeros(8), "var": torch.ones(8)} | REFUSED[message]
    with pytest.raises(ValueError) as error:
        batch_norm_act(**arguments)
    assert message in str(error.value)
    if not {"mean", "var"} & set(REFUSED[message]):
        del arguments["mean"], arguments["var"]
        with pytest.raises(ValueError) as error:
            batch_norm_act_train(**arguments)
        assert message in str(error.value)


def test_one_value_in_a_channel_has_no_statistics():
    for T in (1, 2):
        with pytest.raises(ValueError, match="x must have more than one value in a channel"):
            batch_norm_act_train(X[:1, :, :1, :1], ROWS[:T], ROWS[:T], torch.zeros(1, dtype=torch.int64))
