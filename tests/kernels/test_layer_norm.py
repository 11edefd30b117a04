"""The fused layer norm, forward and every gradient, against a float64 reference written here on its own.

The same tests run on a GPU, in Triton's interpreter, on simulated PTX and under the interpreter guard (conftest.py).
"""

import itertools
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperclip_fast import set_backend
from hyperclip_fast.kernels.dispatch import use_triton
from hyperclip_fast.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from tests.helpers import (
    DEVICE,
    KERNEL_DTYPES,
    MODE,
    TOLERANCE,
    allocating,
    assert_close,
    examples,
    kernel_run,
    poisoned_empty,
    rms,
)

pytest.importorskip("triton")
LAUNCH = "hyperclip_fast.kernels.layer_norm.launch"
EXAMPLES = examples(gpu=200, interpreter=80, other=40)
NAMES = ("x", "delta", "weight", "bias")
F32, F16 = torch.float32, torch.float16


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes, layouts and the mix of tasks; its tensors follow from the seed."""

    B: int = 3
    N: int = 5
    D: int = 48
    T: int = 4
    mix: str = "any"  # any, identical, sorted, reversed; none: task_ids=None
    dtype: torch.dtype = F32
    rows_dtype: torch.dtype = F32
    delta_dtype: torch.dtype | None = F32  # None: layer_norm, without delta
    out_dtype: torch.dtype | None = None
    layout: str = "plain"  # of x and delta: plain, transposed, sliced, expanded
    rows: str = (
        "views"  # of weight and bias: views of a wider table, plain, apart (one of each), columns (inner stride 2)
    )
    ids_dtype: torch.dtype = torch.int64
    eps: float = 1e-6
    programs: int = 1024  # backward programs wanted: how finely samples are sliced
    seed: int = 0

    def __str__(self):
        dtypes = "-".join(str(dtype)[6:] for dtype in (self.dtype, self.rows_dtype, self.delta_dtype or "no_delta"))
        return f"B{self.B}-N{self.N}-D{self.D}-T{self.T}-{self.mix}-{dtypes}-{self.layout}"

    def tensors(self) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        x = self._activation(generator, self.dtype)
        delta = None if self.delta_dtype is None else self._activation(generator, self.delta_dtype)
        weight, bias = self._rows(generator)
        leaves = dict(zip(NAMES, (x, delta, weight, bias)))
        return leaves, self._task_ids(generator)

    def _activation(self, generator, dtype):
        shape = {"transposed": (self.B, self.D, self.N), "sliced": (self.B, self.N + 1, self.D + 3)}
        shape = shape.get(self.layout, (1 if self.layout == "expanded" else self.B, self.N, self.D))
        tensor = (1.5 * torch.randn(shape, generator=generator) + 0.5).to(DEVICE, dtype)
        if self.layout == "transposed":
            return tensor.transpose(1, 2)
        if self.layout == "sliced":
            return tensor[:, 1:, 2 : 2 + self.D]
        return tensor.expand(self.B, -1, -1)

    def _rows(self, generator):
        width = self.D * (4 if self.rows == "columns" else 2) + 5
        table = torch.randn(self.T, width, generator=generator)
        table[:, ::5] = 0  # weights cross zero and are exactly zero
        table[0, : self.D] = 0  # and a whole row of them
        table = table.to(DEVICE, self.rows_dtype)
        if self.rows == "columns":
            return table[:, : 2 * self.D : 2], table[:, 2 * self.D : 4 * self.D : 2]
        weight, bias = table[:, : self.D], table[:, self.D + 5 :]
        weight = weight.contiguous() if self.rows == "plain" else weight
        return weight, bias if self.rows == "views" else bias.contiguous()

    def _task_ids(self, generator):
        if self.mix == "none":
            return None
        ids = torch.randint(self.T, (self.B,), generator=generator)
        if self.mix in ("sorted", "reversed"):
            ids = ids.sort(descending=self.mix == "reversed").values
        if self.mix == "identical":
            ids[:] = ids[0].item()
        return ids.to(DEVICE, self.ids_dtype)


# 1, odd, and below, at and above powers of two; every width and dtype is a compilation under the simulator
WIDTHS = (1, 33, 64, 192) if MODE.startswith("ptxsim") else (1, 3, 8, 33, 48, 64, 100, 192, 260)


@st.composite
def cases(draw, dtypes=KERNEL_DTYPES, widths=WIDTHS):
    """Small calls of every kind."""
    dtype, mix = draw(st.sampled_from(dtypes)), draw(st.sampled_from(("any", "any", "identical", "reversed", "none")))
    B = draw(st.integers(1, 5))
    return Case(
        B=B,
        N=draw(st.sampled_from((1, 2, 7, 17, 33, 65))),
        D=draw(st.sampled_from(widths)),
        T=draw(st.sampled_from((1, B))) if mix == "none" else draw(st.integers(1, 6)),
        mix=mix,
        dtype=dtype,
        rows_dtype=draw(st.sampled_from((dtype, F32))),
        delta_dtype=draw(st.sampled_from((None, dtype, dtype, dtypes[-1]))),
        out_dtype=draw(st.sampled_from((None, None, *dtypes))),
        layout=draw(st.sampled_from(("plain", "plain", "transposed", "sliced", "expanded"))),
        rows=draw(st.sampled_from(("views", "apart", "plain", "columns"))),
        ids_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        eps=draw(st.sampled_from((1e-6, 0.3))),
        programs=draw(st.sampled_from((1, 4, 1024))),
        seed=draw(st.integers(0, 2**31)),
    )


def call(case, leaves, task_ids, norm, add_norm):
    """{name: output} of the case's operation."""
    x, delta, weight, bias = (leaves[name] for name in NAMES)
    if delta is None:
        return {"out": norm(x, weight, bias, task_ids, case.eps, case.out_dtype)}
    return dict(zip(("out", "total"), add_norm(x, delta, weight, bias, task_ids, case.eps, case.out_dtype)))


def require_grads(leaves, frozen=()):
    return {
        name: None if leaf is None else leaf.detach().requires_grad_(name not in frozen)
        for name, leaf in leaves.items()
    }


def head_gradients(outputs):
    """The gradient that arrives at each output: {name: tensor}, fixed by the output's shape."""
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(v.shape, generator=generator).to(v.device, v.dtype) for k, v in outputs.items()}


def backward(outputs, heads, leaves, used=("out", "total")):
    used = [name for name in used if name in outputs]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(
        [outputs[name] for name in used], list(wanted.values()), [heads[name] for name in used], allow_unused=True
    )
    return dict(zip(wanted, grads))


def run_kernels(case, used=("out", "total"), frozen=(), order=None):
    """Outputs, head gradients and gradients of the Triton kernels; `order` seeds that of the simulated programs."""
    leaves, task_ids = case.tensors()
    leaves = require_grads(leaves, frozen)
    set_backend("triton")
    try:
        with (
            kernel_run(case.seed % 1000 if order is None else order),
            mock.patch(f"{LAUNCH}.BACKWARD_PROGRAMS", case.programs),
        ):
            outputs = call(case, leaves, task_ids, layer_norm, add_layer_norm)
            heads = head_gradients(outputs)
            return outputs, heads, backward(outputs, heads, leaves, used)
    finally:
        set_backend("auto")


def run_reference(case):
    leaves, task_ids = case.tensors()
    leaves = require_grads(leaves)
    outputs = call(case, leaves, task_ids, layer_norm_reference, add_layer_norm_reference)
    heads = head_gradients(outputs)
    return outputs, heads, backward(outputs, heads, leaves)


def run_float64(case, heads, used=("out", "total")):
    """The operation from its definition, in float64; `total` is rounded to x's dtype, its gradient passes unrounded."""
    leaves, task_ids = case.tensors()
    wide = {name: None if leaf is None else leaf.double().requires_grad_() for name, leaf in leaves.items()}
    total = wide["x"]
    if wide["delta"] is not None:
        total = wide["x"] + wide["delta"]
        total = total + (total.to(case.dtype).double() - total).detach()
    if task_ids is None:
        task_ids = torch.zeros(case.B) if case.T == 1 else torch.arange(case.B)
    rows = F.one_hot(task_ids.long(), case.T).double().to(total.device)
    mean = total.mean(2, keepdim=True)
    normed = (total - mean) / ((total - mean).square().mean(2, keepdim=True) + case.eps).sqrt()
    out = normed * (rows @ wide["weight"])[:, None] + (rows @ wide["bias"])[:, None]
    outputs = {"out": out} if wide["delta"] is None else {"out": out, "total": total}
    heads = {name: head.double() for name, head in heads.items()}
    return outputs, backward(outputs, heads, wide, used), rows.sum(0) == 0


def compare(case, run=run_kernels, used=("out", "total"), slack=1.0):
    """Run a case and hold outputs, gradients and unused rows to the float64 reference, within `slack` tolerances."""
    outputs, heads, grads = run(case) if used == ("out", "total") else run(case, used)
    expected, expected_grads, unused = run_float64(case, heads, used)
    for name, output in outputs.items():
        floor = 0.5 if name == "out" else 0.0
        assert output.dtype == ((case.out_dtype if name == "out" else None) or case.dtype)
        assert_close(output, expected[name].detach(), f"{case} {name}", floor, slack)
    for name, grad in grads.items():
        if grad is None:
            assert rms(expected_grads[name]) == 0 if expected_grads[name] is not None else True, f"{case} d {name}"
            continue
        scale = 0.5 * sum(rms(head) for head in heads.values())  # the projections may cancel, at D = 1 entirely
        assert_close(grad, expected_grads[name], f"{case} d {name}", scale, slack)
        if name in ("weight", "bias"):
            assert grad[unused].count_nonzero() == 0, f"{case} d {name} of unused rows"
    return outputs, grads


@settings(max_examples=EXAMPLES)
@given(cases())
def test_matches_float64(case):
    outputs, _ = compare(case)
    if case.delta_dtype is not None:
        leaves, _ = case.tensors()
        assert torch.equal(outputs["total"], (leaves["x"] + leaves["delta"]).to(case.dtype))


@settings(max_examples=60)
@given(cases(dtypes=(torch.float32, torch.float16, torch.bfloat16), widths=(8, 33, 64, 192)))
def test_reference_matches_its_definition(case):
    compare(case, run_reference, slack=4)  # PyTorch adds up rows' gradients in the rows' own dtype


@pytest.mark.parametrize("T", [1, 4])
def test_reference_is_exact_in_float64(T):
    F64 = torch.float64
    compare(Case(T=T, dtype=F64, rows_dtype=F64, delta_dtype=F64), run_reference)
    compare(Case(T=T, dtype=F64, rows_dtype=F64, delta_dtype=None), run_reference)


REAL_WIDTHS = ((3, 192), (3, 384), (5, 768), (2, 1024), (3, 2000), (2, 4096), (2, 8192))
WIDE = 4096  # from here on the interpreter takes seconds, so it runs one dtype: tiles follow from the width alone


def widths_and_dtypes():
    for (N, D), dtype in itertools.product(REAL_WIDTHS, KERNEL_DTYPES):
        if MODE != "interpreter" or D < WIDE or dtype is KERNEL_DTYPES[-1]:
            yield N, D, dtype


@pytest.mark.parametrize("N, D, dtype", widths_and_dtypes(), ids=str)
def test_widths_of_real_encoders(N, D, dtype):
    compare(Case(B=2, N=N, D=D, T=2 if D >= WIDE else 3, dtype=dtype, delta_dtype=dtype))


@pytest.mark.parametrize("used", ["out", "total"])
@pytest.mark.parametrize("delta_dtype", [F32, F16, None], ids=str)
def test_gradient_of_one_output_only(used, delta_dtype):
    if delta_dtype is None and used == "total":
        pytest.skip("layer_norm has one output")
    compare(Case(N=37, delta_dtype=delta_dtype), used=(used,))


def test_wide_batch_is_reduced_in_chunks():
    # 150 samples: three chunks of the reduction, the last one partly filled
    compare(Case(B=150, N=1, D=5, T=3, programs=1))


def test_repeated_gradients_are_bit_equal():
    case = Case(B=5, N=70, D=33, T=2, programs=10)
    first, second = (run_kernels(case, order=order)[2] for order in (1, 2))  # programs may come in any order
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_task_ids_in_another_order_permute_the_result():
    case = Case(B=4, N=9, D=64)
    leaves, task_ids = case.tensors()
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    set_backend("triton")
    try:
        with kernel_run():
            rows = leaves["weight"], leaves["bias"]
            plain = add_layer_norm(leaves["x"], leaves["delta"], *rows, task_ids)[0]
            moved = add_layer_norm(leaves["x"][order], leaves["delta"][order], *rows, task_ids[order])[0]
    finally:
        set_backend("auto")
    assert torch.equal(plain[order], moved)


def test_task_id_out_of_range_reads_nothing_and_shows(triton_backend):
    leaves, _ = Case(B=4, T=2).tensors()
    leaves = require_grads(leaves)
    task_ids = torch.tensor([0, 2, 1, -1], device=DEVICE)
    with kernel_run():
        out, _ = add_layer_norm(*leaves.values(), task_ids)
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


@pytest.mark.parametrize("frozen, kinds", [((), 2), (("weight",), 1), (("bias",), 1), (("weight", "bias"), 0)])
def test_frozen_rows_cost_nothing(frozen, kinds, triton_backend):
    case, allocations = Case(), Allocations()
    leaves, task_ids = case.tensors()
    leaves = require_grads(leaves, frozen)
    with kernel_run(), allocating(allocations):
        outputs = call(case, leaves, task_ids, layer_norm, add_layer_norm)
        heads = head_gradients(outputs)
        grads = backward(outputs, heads, leaves)
    _, expected, _ = run_float64(case, heads)
    for name, grad in grads.items():
        assert_close(grad, expected[name], name)
    S = 1
    partials = [shape for shape in allocations.shapes if len(shape) == 4]
    assert partials == ([(kinds, case.B, S, case.D)] if kinds else [])


@pytest.mark.parametrize("frozen", [("x",), ("delta",), ("x", "delta")], ids=str)
def test_frozen_activations(frozen, triton_backend):
    for delta_dtype in (F32, F16):
        case, allocations = Case(delta_dtype=delta_dtype), Allocations()
        leaves, task_ids = case.tensors()
        leaves = require_grads(leaves, frozen)
        with kernel_run():
            outputs = call(case, leaves, task_ids, layer_norm, add_layer_norm)
            heads = head_gradients(outputs)
            with allocating(allocations):
                grads = backward(outputs, heads, leaves)
        _, expected, _ = run_float64(case, heads)
        assert sorted(grads) == sorted(set(NAMES) - set(frozen))
        for name, grad in grads.items():
            assert_close(grad, expected[name], name)
        dtypes = {
            leaves[name].dtype for name in ("x", "delta") if name not in frozen
        }  # one tensor serves both if it can
        assert allocations.shapes.count((case.B, case.N, case.D)) == len(dtypes)


def test_inference_keeps_nothing_for_backward(triton_backend):
    case, allocations = Case(), Allocations()
    leaves, task_ids = case.tensors()
    with kernel_run(), torch.no_grad(), allocating(allocations):
        call(case, require_grads(leaves), task_ids, layer_norm, add_layer_norm)
    assert allocations.shapes == [(case.B, case.N, case.D)] * 2


def test_outputs_are_not_aliases_of_inputs(triton_backend):
    leaves, task_ids = Case().tensors()
    before = {name: leaf.clone() for name, leaf in leaves.items()}
    with kernel_run():
        outputs = add_layer_norm(*leaves.values(), task_ids)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*leaves.values(), *outputs)]
    assert len(set(storages)) == len(storages) - 1  # weight and bias are views of one table
    assert all(torch.equal(before[name], leaves[name]) for name in NAMES)


@pytest.mark.parametrize("B, N", [(0, 3), (2, 0)])
def test_empty_batch(B, N, triton_backend):
    leaves, _ = Case(B=B, N=N).tensors()
    leaves = require_grads(leaves)
    task_ids = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    with kernel_run():
        out, total = add_layer_norm(*leaves.values(), task_ids)
        (out.sum() + total.sum()).backward()
    assert out.shape == total.shape == (B, N, 48)
    assert leaves["weight"].grad.count_nonzero() == 0 and leaves["bias"].grad.count_nonzero() == 0


@pytest.mark.skipif(MODE in ("interpreter", "guard"), reason="65,536 programs take the interpreter minutes")
def test_more_samples_than_a_grid_axis_holds():
    compare(Case(B=65_600, N=1, D=1, T=3))
    compare(Case(B=1, N=65_600, D=1, T=3, programs=64))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(triton_backend):
    B, N, D = 3, 2**20, 768
    if torch.cuda.mem_get_info()[0] < 4.5 * B * N * D * 2:
        pytest.skip("needs 22 GB of free memory")
    x = torch.zeros(B, N, D, dtype=F16, device=DEVICE)
    x[-1, -1] = torch.randn(D, device=DEVICE)
    weight, bias = torch.randn(2, 3, D, device=DEVICE)
    out, total = add_layer_norm(x, x, weight, bias, torch.tensor([0, 1, 2], device=DEVICE))
    assert torch.equal(total[-1, -1], 2 * x[-1, -1])
    assert_close(out[-1, -1], F.layer_norm(2 * x[-1, -1].double(), (D,), weight[2].double(), bias[2].double(), 1e-6))


def test_shared_row_of_the_reference_is_torch_layer_norm():
    leaves, _ = Case(T=1).tensors()
    x, weight, bias = leaves["x"], leaves["weight"], leaves["bias"]
    for ids in (None, torch.zeros(3, dtype=torch.int64, device=DEVICE)):
        ours = layer_norm_reference(x, weight, bias, ids, 1e-6)
        assert torch.equal(ours, F.layer_norm(x, (48,), weight[0], bias[0], 1e-6))


REFUSED = {
    "x must be (B, N, D)": {"x": torch.zeros(5, 48)},
    "delta must have x's shape": {"delta": torch.zeros(3, 5, 47)},
    "weight must be (T, D) with D = 48": {"weight": torch.zeros(4, 47)},
    "weight must be (T, D)": {"weight": torch.zeros(48)},
    "bias must have weight's shape": {"bias": torch.zeros(3, 48)},
    "bias must have weight's shape and dtype": {"bias": torch.zeros(4, 48, dtype=F16)},
    "task_ids must be given": {"task_ids": None},
    "task_ids must be (B,) with B = 3": {"task_ids": torch.zeros(2, dtype=torch.int64)},
    "task_ids must be (B,)": {"task_ids": torch.zeros(3, 1, dtype=torch.int64)},
    "task_ids must be int64 or int32": {"task_ids": torch.zeros(3)},
}
REFUSED_BY_KERNELS = {
    "x must be one of": {"x": torch.zeros(3, 5, 48, dtype=torch.float64)},
    "delta must be one of": {"delta": torch.zeros(3, 5, 48, dtype=torch.float64)},
    "D in 1..8192": {
        "x": torch.zeros(3, 5, 8193),
        "delta": torch.zeros(3, 5, 8193),
        "weight": torch.zeros(4, 8193),
        "bias": torch.zeros(4, 8193),
    },
    "weight must be torch.float32": {
        "weight": torch.zeros(4, 48, dtype=F16),
        "bias": torch.zeros(4, 48, dtype=F16),
    },
    "task_ids must be on x's device": {"task_ids": torch.zeros(3, dtype=torch.int64, device="meta")},
    "out_dtype must be one of": {"out_dtype": torch.int32},
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, backend, triton_backend):
    set_backend(backend)
    check_refused(message, REFUSED[message])


@pytest.mark.parametrize("message", REFUSED_BY_KERNELS)
def test_refused_by_the_kernels(message, triton_backend):
    check_refused(message, REFUSED_BY_KERNELS[message])


def check_refused(message, changes):
    leaves, task_ids = Case().tensors()
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in changes.items()}
    arguments = {**leaves, "task_ids": task_ids, **moved}
    with pytest.raises(ValueError) as error:
        add_layer_norm(**arguments)
    assert message in str(error.value)
    if not message.startswith("delta"):
        arguments.pop("delta")
        with pytest.raises(ValueError) as error:
            layer_norm(**arguments)
        assert message in str(error.value)


@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_operator_passes_opcheck(has_delta, keep, triton_backend):
    leaves, task_ids = Case(B=2, N=3, D=8).tensors()
    leaves = require_grads(leaves, () if keep else NAMES)
    if not has_delta:
        leaves["delta"] = None
    with kernel_run():
        torch.library.opcheck(
            torch.ops.hyperclip_fast.layer_norm, (*leaves.values(), task_ids, 1e-6, torch.float16, keep)
        )


def compiled_step(x, delta, weight, bias, task_ids):
    normed, total = add_layer_norm(x, delta, weight, bias, task_ids)
    return layer_norm(normed.sin(), weight, bias, task_ids) * total


@pytest.mark.slow
def test_compiles_to_one_graph_with_a_dynamic_batch(triton_backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests compile, too
    backend = "inductor" if MODE == "gpu" else "aot_eager"
    compiled = torch.compile(compiled_step, fullgraph=True, dynamic=True, backend=backend)
    for B in (4, 3, 7):
        leaves, task_ids = Case(B=B).tensors()
        leaves = require_grads(leaves)
        with kernel_run():
            for function in (compiled, compiled_step):
                (function(*leaves.values(), task_ids).square()).sum().backward()
                grads = [leaf.grad for leaf in leaves.values()]
                leaves = require_grads(leaves)
                if function is compiled:
                    first = grads
        for ours, eager, name in zip(first, grads, NAMES):
            assert_close(ours, eager.double(), name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one, and one more for a static first batch


def test_exports_the_operator(triton_backend):
    class Norm(torch.nn.Module):
        def forward(self, x, delta, weight, bias, task_ids):
            return add_layer_norm(x, delta, weight, bias, task_ids)

    leaves, task_ids = Case().tensors()
    inputs = (*leaves.values(), task_ids)
    exported = torch.export.export(Norm(), inputs)
    assert "hyperclip_fast.layer_norm" in str(exported.graph)
    with kernel_run():
        for ours, direct in zip(exported.module()(*inputs), add_layer_norm(*inputs)):
            assert torch.equal(ours, direct)


def test_second_derivative_is_refused(triton_backend):
    leaves, task_ids = Case().tensors()
    leaves = require_grads(leaves)
    with kernel_run():
        out, _ = add_layer_norm(*leaves.values(), task_ids)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_tolerances_are_tight_enough_to_see_a_wrong_row():
    case = Case()
    outputs, heads, _ = run_kernels(case)
    expected, _, _ = run_float64(replace(case, seed=1), heads)
    assert rms(outputs["out"].double() - expected["out"]) > 1000 * TOLERANCE[F32] * rms(expected["out"])


def test_float64_on_a_gpu_takes_the_reference():
    with FakeTensorMode():
        x, delta = (torch.empty(2, 3, 8, dtype=torch.float64, device="cuda") for _ in range(2))
        weight, bias = torch.ones(4, 8, device="cuda", dtype=torch.float64), torch.ones(4, 8, device="cuda").double()
        ids = torch.empty(2, dtype=torch.int64, device="cuda")
        assert use_triton(x.float()) and use_triton(x.half()) and use_triton(x.bfloat16()) and not use_triton(x)
        out, total = add_layer_norm(x, delta, weight, bias, ids)
        assert out.dtype == total.dtype == torch.float64 and out.device.type == "cuda"


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1)])
def test_gradients_of_the_reference_are_exact_and_have_gradients(frozen):
    torch.manual_seed(0)
    shapes = ((3, 4, 5), (2, 5), (2, 5))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=i not in frozen) for i, s in enumerate(shapes)]
    task_ids = torch.tensor([1, 0, 1])

    def run(x, weight, bias):
        return layer_norm_reference(x, weight, bias, task_ids, 1e-3).sin()

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_reference_under_function_transforms():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 4, 5), (3, 5), (3, 5)))

    def loss(weight, x, bias):
        return layer_norm_reference(x, weight, bias).sin().sum()

    leaf = weight.clone().requires_grad_()
    loss(leaf, x, bias).backward()
    assert_close(torch.func.grad(loss)(weight, x, bias), leaf.grad)
    each = torch.func.vmap(lambda w: layer_norm_reference(x, w, bias))(torch.stack([weight, 2 * weight]))
    assert_close(each[1], layer_norm_reference(x, 2 * weight, bias))


def test_reference_keeps_x_and_no_second_copy_of_it():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 50, 64), (2, 64), (2, 64)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm_reference(x, weight, bias)
    assert sum(t.numel() for t in kept if t is not x) <= 2 * 50 * 2 + 2 * weight.numel()
