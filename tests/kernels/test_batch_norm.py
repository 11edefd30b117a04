"""The batch norm's kernels, forward and every gradient, against a float64 reference written here on its own.

The same tests run on a GPU, in Triton's interpreter, on simulated PTX and under the interpreter guard (conftest.py).
"""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_fast import set_backend
from hyperclip_fast.kernels.batch_norm import batch_norm_act, batch_norm_act_train
from hyperclip_fast.kernels.batch_norm import launch as batch_norm_launch
from tests.helpers import DEVICE, KERNEL_DTYPES, MODE, allocating, assert_close, examples, kernel_run, poisoned_empty

pytest.importorskip("triton")
LAUNCH = "hyperclip_fast.kernels.batch_norm.launch"
EXAMPLES = examples(gpu=200, interpreter=50, other=30)
NAMES = ("x", "weight", "bias", "residual")
F32, F16 = torch.float32, torch.float16
ACTS = {name: getattr(F, name) for name in ("relu", "relu6", "silu", "gelu")}
ACTS |= {"hard_swish": F.hardswish, "none": lambda x: x}


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes, layouts, statistics and the mix of tasks; its tensors follow from the seed."""

    B: int = 3
    C: int = 12
    H: int = 5
    W: int = 4
    T: int = 4
    mix: str = "any"  # any, identical; none: task_ids=None
    statistics: str = "shared"  # shared (C,), task (T, C), batch: batch_norm_act_train
    act: str = "silu"
    residual: str = "before"  # no, before or after the activation
    dtype: torch.dtype = F32
    rows_dtype: torch.dtype = F32
    layout: str = "contiguous"  # of x and residual: contiguous, last, sliced; crossed: residual in the other
    rows: str = "views"  # of weight and bias: views of a wider table, apart (one of each), columns (inner stride 2)
    ids_dtype: torch.dtype = torch.int64
    eps: float = 1e-5
    programs: int = 1024  # programs wanted: how finely samples are sliced
    seed: int = 0

    def __str__(self):
        sizes = "-".join(f"{name}{getattr(self, name)}" for name in "BCHWT")
        kinds = f"{self.statistics}-{self.act}-{self.residual}-{self.layout}-{self.mix}"
        return f"{sizes}-{kinds}-{str(self.dtype)[6:]}-{str(self.rows_dtype)[6:]}"

    def tensors(self):
        """Leaves by name, task_ids, mean and var (None where they are the batch's)."""
        generator = torch.Generator().manual_seed(self.seed)
        last = self.layout in ("last", "crossed")
        x = self._activation(generator, last)
        residual = None if self.residual == "no" else self._activation(generator, self.layout == "last")
        step = 2 if self.rows == "columns" else 1
        table = torch.randn(self.T, 2 * step * self.C + 5, generator=generator)
        table[:, ::5] = 0  # weights cross zero and are exactly zero
        table = table.to(DEVICE, self.rows_dtype)
        weight = table[:, : step * self.C : step]
        bias = table[:, step * self.C + 3 : 2 * step * self.C + 3 : step]
        bias = bias.contiguous() if self.rows == "apart" else bias
        mean = torch.randn(self.T, self.C, generator=generator)
        var = torch.rand(self.T, self.C, generator=generator) + 0.2
        mean, var = (t.to(DEVICE) if self.statistics == "task" else t[0].to(DEVICE) for t in (mean, var))
        if self.statistics == "batch":
            mean = var = None
        return dict(zip(NAMES, (x, weight, bias, residual))), self._task_ids(generator), mean, var

    def _activation(self, generator, last):
        wide = 3 if self.layout == "sliced" else 0
        x = 2 * torch.randn(self.B, self.C, self.H, self.W + wide, generator=generator) + 1
        x = x[..., wide:].to(DEVICE, self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def _task_ids(self, generator):
        if self.mix == "none":
            return None
        ids = torch.randint(self.T, (self.B,), generator=generator)
        return (ids * 0 + ids[0] if self.mix == "identical" else ids).to(DEVICE, self.ids_dtype)


# Every inner size, format and dtype is a compilation under the simulator.
SIZES = ((12, 5, 4), (1, 3, 3), (24, 7, 7), (40, 1, 1), (3, 12, 13), (130, 2, 2))
if not MODE.startswith("ptxsim"):
    SIZES = (*SIZES, (5, 1, 2), (17, 6, 6), (64, 3, 5), (2, 20, 20), (33, 1, 3))


@st.composite
def cases(draw, dtypes=KERNEL_DTYPES):
    """Small calls of every kind."""
    dtype, mix = draw(st.sampled_from(dtypes)), draw(st.sampled_from(("any", "any", "identical", "none")))
    statistics = draw(st.sampled_from(("shared", "task", "batch", "batch")))
    (C, H, W), B = draw(st.sampled_from(SIZES)), draw(st.integers(1, 5))
    B = 2 if statistics == "batch" and H * W == 1 else B
    T = draw(st.sampled_from((1, B))) if mix == "none" else draw(st.integers(1, 6))
    return Case(
        B=B,
        C=C,
        H=H,
        W=W,
        T=T,
        mix=mix,
        statistics=statistics,
        act=draw(st.sampled_from(tuple(ACTS))),
        residual=draw(st.sampled_from(("no", "before", "after"))),
        dtype=dtype,
        rows_dtype=draw(st.sampled_from((dtype, F32))),
        layout=draw(st.sampled_from(("contiguous", "last", "last", "sliced", "crossed"))),
        rows=draw(st.sampled_from(("views", "apart", "columns"))),
        ids_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        eps=draw(st.sampled_from((1e-5, 0.3))),
        programs=draw(st.sampled_from((1, 4, 1024))),
        seed=draw(st.integers(0, 2**31)),
    )


def require_grads(leaves, frozen=()):
    return {
        name: None if leaf is None else leaf.detach().requires_grad_(name not in frozen)
        for name, leaf in leaves.items()
    }


def call(case, leaves, task_ids, mean, var):
    """out, mean and var of the case's operation."""
    options = (case.eps, case.act, leaves["residual"], case.residual == "after")
    rows = (leaves["x"], leaves["weight"], leaves["bias"], task_ids)
    if mean is None:
        return batch_norm_act_train(*rows, *options)
    return batch_norm_act(*rows, mean, var, *options), mean, var


def backward(out, head, leaves):
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), head)))


def head_gradient(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)


def run_kernels(case, frozen=(), order=None):
    """Outputs and gradients of the Triton kernels; `order` seeds that of the simulated programs."""
    leaves, *rest = case.tensors()
    leaves = require_grads(leaves, frozen)
    set_backend("triton")
    try:
        with (
            kernel_run(case.seed % 1000 if order is None else order),
            mock.patch(f"{LAUNCH}.PROGRAMS", case.programs),
        ):
            out, mean, var = call(case, leaves, *rest)
            return out, mean, var, backward(out, head_gradient(out), leaves)
    finally:
        set_backend("auto")


def run_float64(case, head, frozen=()):
    """The operation from its definition, in float64."""
    leaves, task_ids, mean, var = case.tensors()
    wide = {k: None if leaf is None else leaf.double() for k, leaf in leaves.items()}
    wide = require_grads(wide, frozen)
    if task_ids is None:
        task_ids = torch.zeros(case.B) if case.T == 1 else torch.arange(case.B)
    rows = F.one_hot(task_ids.long(), case.T).double().to(head.device)
    x, residual = wide["x"], wide["residual"]
    if mean is None:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    of_sample = [rows @ (t.double() if t.dim() == 2 else t.double().expand(case.T, -1)) for t in (mean, var)]
    of_sample += [rows @ wide["weight"], rows @ wide["bias"]]
    mean_b, var_b, weight, bias = (t[..., None, None] for t in of_sample)
    normed = (x - mean_b) / (var_b + case.eps).sqrt() * weight + bias
    act = ACTS[case.act]
    out = act(normed + residual) if case.residual == "before" else act(normed)
    out = out + residual if case.residual == "after" else out
    return out, mean.detach(), var.detach(), backward(out, head.double(), wide), rows.sum(0) == 0


def compare(case, frozen=()):
    """Run a case and hold outputs, gradients and unused rows to the float64 reference."""
    out, mean, var, grads = run_kernels(case, frozen)
    expected, expected_mean, expected_var, expected_grads, unused = run_float64(case, head_gradient(out), frozen)
    leaves, *_ = case.tensors()
    if case.layout != "sliced":
        assert out.stride() == leaves["x"].stride() == (grads["x"].stride() if "x" in grads else out.stride())
    assert_close(out.detach(), expected.detach(), f"{case} out", 0.5)
    if case.statistics == "batch":
        assert mean.dtype == var.dtype == F32 and not mean.requires_grad
        assert_close(mean, expected_mean, f"{case} mean", 1)
        assert_close(var, expected_var, f"{case} var", 1e-3)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        scale = 0.5 * (case.H * case.W) ** 0.5 if name in ("weight", "bias") else 0.5
        assert_close(grad, expected_grads[name], f"{case} d {name}", scale, slack=2)
        if name in ("weight", "bias"):
            assert grad[unused].count_nonzero() == 0, f"{case} d {name} of unused rows"
    return out, grads


@settings(max_examples=EXAMPLES)
@given(cases())
def test_matches_float64(case):
    compare(case)


@pytest.mark.parametrize("statistics", ["task", "batch"])
@pytest.mark.parametrize("layout, programs", [("contiguous", 4), ("last", 2)])
def test_slices_of_several_tiles(layout, programs, statistics):
    # four tiles of pixels in two slices, the last tile partly filled; contiguous: two tiles of channels
    case = Case(B=1, C=12, H=20, W=20, T=2, statistics=statistics, layout=layout, programs=programs)
    with mock.patch(f"{LAUNCH}.PROGRAMS", programs):
        x = case.tensors()[0]["x"]
        assert batch_norm_launch._slices(x, batch_norm_launch._layout(x))[1:3] == (2, 2)
    compare(case)


@pytest.mark.slow
@pytest.mark.parametrize("layout, statistics", [("contiguous", "batch"), ("last", "task")])
def test_wide_batch_is_combined_in_chunks(layout, statistics):
    # 150 samples: three chunks of the kernels that add partials, the last one partly filled; they see no layout
    compare(Case(B=150, C=5, H=2, W=2, T=3, statistics=statistics, layout=layout, act="relu", residual="no"))


def test_repeated_gradients_are_bit_equal():
    for layout in ("contiguous", "last"):
        case = Case(B=5, H=9, W=9, T=2, statistics="batch", layout=layout, programs=64)
        first, second = (run_kernels(case, order=order) for order in (1, 2))  # programs may come in any order
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
        assert all(torch.equal(first[3][name], second[3][name]) for name in NAMES)


def test_task_ids_in_another_order_permute_the_result(triton_backend):
    case = Case(B=4, statistics="task")
    leaves, task_ids, mean, var = case.tensors()
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    with kernel_run():
        plain = call(case, leaves, task_ids, mean, var)[0]
        moved = {name: leaf[order] if name in ("x", "residual") else leaf for name, leaf in leaves.items()}
        assert torch.equal(plain[order], call(case, moved, task_ids[order], mean, var)[0])


@pytest.mark.parametrize("act", ACTS)
def test_task_id_out_of_range_reads_nothing_and_shows(act, triton_backend):
    case = Case(B=4, T=2, statistics="task", act=act)
    leaves, _, mean, var = case.tensors()
    leaves = require_grads(leaves)
    with kernel_run():
        out, *_ = call(case, leaves, torch.tensor([0, 2, 1, -1], device=DEVICE), mean, var)
        out.nansum().backward()
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, False, True]
    assert not out[[0, 2]].isnan().any()
    assert leaves["weight"].grad.isfinite().all() and leaves["bias"].grad.isfinite().all()


class Allocations:
    """torch.empty that remembers the shapes it was asked for."""

    def __init__(self):
        self.shapes = []

    def __call__(self, *shape, **options):
        self.shapes.append(shape)
        return poisoned_empty(*shape, **options)


FROZEN = (("weight",), ("bias",), ("weight", "bias"), ("x",), ("residual",), ("x", "weight", "residual"))


@pytest.mark.parametrize("statistics", ["shared", "batch"])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_what_is_frozen_costs_nothing(frozen, statistics, triton_backend):
    case, allocations = Case(statistics=statistics, act="hard_swish"), Allocations()
    leaves, *rest = case.tensors()
    leaves = require_grads(leaves, frozen)
    with kernel_run():
        out, *_ = call(case, leaves, *rest)
        with allocating(allocations):
            grads = backward(out, head_gradient(out), leaves)
    *_, expected, _ = run_float64(case, head_gradient(out), frozen)
    for name, grad in grads.items():
        assert_close(grad, expected[name], name, 1)
    assert grads.keys() == expected.keys() == set(NAMES) - set(frozen)
    kinds = 2 if statistics == "batch" and "x" not in frozen else 2 - len({"weight", "bias"} & set(frozen))
    partials = [shape for shape in allocations.shapes if len(shape) == 4 and shape[1:] == (case.B, 1, case.C)]
    assert partials == ([(kinds, case.B, 1, case.C)] if kinds else [])
    rows, asked = (
        [shape for shape in allocations.shapes if shape[1:] == (case.T, case.C)],
        {"weight", "bias"} - {*frozen},
    )
    assert rows == ([(len(asked), case.T, case.C)] if asked else [])
    activations = allocations.shapes.count((case.B, case.C, case.H, case.W))
    assert activations == 2 - len({"x", "residual"} & set(frozen))


@pytest.mark.parametrize("statistics", ["shared", "batch"])
def test_a_residual_behind_the_activation_passes_its_gradient_on(statistics, triton_backend):
    case = Case(statistics=statistics, residual="after")
    leaves, *rest = case.tensors()
    frozen = {k: leaf.detach().requires_grad_(k == "residual") for k, leaf in leaves.items()}
    with kernel_run():
        out, *_ = call(case, frozen, *rest)
        head = head_gradient(out)
        with mock.patch(f"{LAUNCH}._bwd_kernel", None):  # nothing is launched
            (grad,) = torch.autograd.grad(out, frozen["residual"], head)
    assert torch.equal(grad, head)


def test_a_large_mean_does_not_swallow_the_variance(triton_backend):
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5 + 200
    for layout in (torch.contiguous_format, torch.channels_last):
        narrow = x.float().contiguous(memory_format=layout).to(DEVICE)
        with kernel_run():
            rows = torch.ones(8, 3, device=DEVICE), torch.zeros(8, 3, device=DEVICE)
            _, mean, var = batch_norm_act_train(narrow, *rows, None)
        torch.testing.assert_close(mean.double().cpu(), narrow.double().cpu().mean((0, 2, 3)), rtol=1e-6, atol=0)
        exact = narrow.double().cpu().var((0, 2, 3), correction=0)
        torch.testing.assert_close(var.double().cpu(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", [Case(B=0), Case(H=0), Case(H=0, T=3, mix="none")], ids=str)
def test_an_empty_batch(case, triton_backend):
    leaves, *rest = case.tensors()
    leaves = require_grads(leaves)
    with kernel_run():
        out, *_ = call(case, leaves, *rest)
        out.sum().backward()
    assert out.shape == leaves["x"].shape
    assert leaves["weight"].grad.count_nonzero() == 0 and leaves["bias"].grad.count_nonzero() == 0


REFUSED_BY_KERNELS = {
    "x must be one of": {"x": torch.zeros(3, 12, 5, 4, dtype=torch.float64), "residual": None},
    "weight must be torch.float32": dict.fromkeys(("weight", "bias"), torch.zeros(4, 12, dtype=F16)),
    "task_ids must be on x's device": {"task_ids": torch.zeros(3, dtype=torch.int64, device="meta")},
    "mean must be on x's device": {"mean": torch.zeros(12, device="meta")},
}


@pytest.mark.parametrize("message", REFUSED_BY_KERNELS)
def test_refused_by_the_kernels(message, triton_backend):
    leaves, task_ids, mean, var = Case().tensors()
    moved = {k: v.to(DEVICE) if v is not None and not v.is_meta else v for k, v in REFUSED_BY_KERNELS[message].items()}
    with pytest.raises(ValueError, match=message):
        batch_norm_act(**{**leaves, "task_ids": task_ids, "mean": mean, "var": var, **moved})


@pytest.mark.parametrize("layout", ["contiguous", "last", "sliced"])
@pytest.mark.parametrize("is_batch", [False, True])
def test_operators_pass_opcheck(layout, is_batch, triton_backend):
    case = Case(B=2, C=3, H=2, W=2, layout=layout)
    leaves, task_ids, mean, var = case.tensors()
    leaves = require_grads(leaves)
    rows = (leaves["x"], leaves["weight"], leaves["bias"], task_ids, mean, var, 1e-5, "silu")
    with kernel_run():
        operators = torch.ops.hyperclip_fast
        torch.library.opcheck(operators.batch_norm_statistics, (leaves["x"].detach(),))
        torch.library.opcheck(operators.batch_norm_act, (*rows, leaves["residual"], False, is_batch))


def compiled_step(x, weight, bias, residual, task_ids, mean, var):
    out, batch_mean, batch_var = batch_norm_act_train(x, weight, bias, task_ids, 1e-5, "silu", residual)
    return (
        batch_norm_act(out.sin(), weight, bias, task_ids, mean, var, 1e-5, "relu") * batch_mean.sum() + batch_var.sum()
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_compiles_to_one_graph_with_a_dynamic_batch(layout, triton_backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests compile, too
    backend = "inductor" if MODE == "gpu" else "aot_eager"
    compiled = torch.compile(compiled_step, fullgraph=True, dynamic=True, backend=backend)
    for B in (4, 3, 7):
        leaves, *rest = Case(B=B, layout=layout).tensors()
        found = []
        for function in (compiled, compiled_step):
            leaves = require_grads(leaves)
            with kernel_run():
                out = function(*leaves.values(), *rest)
                out.square().sum().backward()
            found.append({"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}})
        for name, eager in found[1].items():
            assert_close(found[0][name], eager.double(), name)
        assert found[0]["out"].stride() == found[1]["out"].stride()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one, and one more for a static first batch


def test_exports_the_operator(triton_backend):
    class Norm(torch.nn.Module):
        def forward(self, x, weight, bias, task_ids, mean, var):
            return batch_norm_act(x, weight, bias, task_ids, mean, var, 1e-5, "silu")

    leaves, *rest = Case(residual="no").tensors()
    inputs = (leaves["x"], leaves["weight"], leaves["bias"], *rest)
    exported = torch.export.export(Norm(), inputs)
    assert "hyperclip_fast.batch_norm_act" in str(exported.graph)
    with kernel_run():
        assert torch.equal(exported.module()(*inputs), Norm()(*inputs))


def test_second_derivative_is_refused(triton_backend):
    case = Case()
    leaves, *rest = case.tensors()
    leaves = require_grads(leaves)
    with kernel_run():
        out, *_ = call(case, leaves, *rest)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
