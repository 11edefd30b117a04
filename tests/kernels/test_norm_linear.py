"""Norm and product in one, against a float64 reference written here on its own; the choice between one and two kernels.

The same tests run on a GPU, in Triton's interpreter, on simulated PTX and under the interpreter guard (conftest.py).
"""

import contextlib
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_fast import set_backend
from hyperclip_fast.kernels.norm_linear import functional as norm_linear
from hyperclip_fast.kernels.tables import NORM_TILES, WIDEST, Tiles, choose_norm_tiles
from tests.helpers import (
    DEVICE,
    KERNEL_DTYPES,
    MODE,
    allocating,
    assert_close,
    examples,
    kernel_run,
    poisoned_empty,
    rms,
)

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NARROW = KERNEL_DTYPES[-1]
EXAMPLES = examples(gpu=200, interpreter=40, other=20)
SMALL = Tiles(32, 32, 32, 1, 4, 2)  # many tiles and K-steps in few programs


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes, layouts, tiles; its tensors follow from the seed."""

    gelu: bool = False
    B: int = 3
    N: int = 17
    D: int = 40
    F: int = 48
    T: int = 4
    ids: torch.dtype | None = torch.int64  # None: T is 1 or B
    dtype: torch.dtype = F16  # of the product and of out
    stream_dtype: torch.dtype | None = None  # x's, dtype by default
    row_dtype: torch.dtype = F32
    bias_dtype: torch.dtype | None = F32
    layout: str = "plain"  # of x: plain, transposed, sliced, expanded
    table: bool = True  # the rows are views of wider tables
    offset: float = 0.0  # of x
    eps: float = 1e-6
    tiles: Tiles = SMALL
    programs: int = 256
    seed: int = 0

    def __str__(self):
        dtypes = (self.dtype, self.stream_dtype, self.row_dtype, self.bias_dtype, self.ids)
        names = "-".join("none" if dtype is None else str(dtype)[6:] for dtype in dtypes)
        return f"gelu{self.gelu:d}-B{self.B}-N{self.N}-D{self.D}-F{self.F}-T{self.T}-{names}-{self.layout}-{self.tiles}"

    def arguments(self) -> dict:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        B, N, D = self.B, self.N, self.D
        shapes = {"transposed": (B, D, N), "sliced": (B, N + 1, D + 3), "expanded": (1, N, D)}
        x = (normal(*shapes.get(self.layout, (B, N, D))) + self.offset).to(self.stream_dtype or self.dtype)
        if self.layout == "transposed":
            x = x.transpose(1, 2)
        elif self.layout == "sliced":
            x = x[:, 1:, 2 : 2 + D]
        norm_weight, norm_bias = (normal(self.T, D + more).to(self.row_dtype)[:, more:] for more in (5, 3))
        norm_weight[:, ::3] = 0  # generated weights may be zero
        if not self.table:
            norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
        ids = None if self.ids is None else torch.randint(self.T, (B,), generator=generator, dtype=self.ids).to(DEVICE)
        return {
            "x": x.expand(B, -1, -1),
            "norm_weight": norm_weight,
            "norm_bias": norm_bias,
            "task_ids": ids,
            "eps": self.eps,
            "weight": (normal(self.F, D) / D**0.5).to(self.dtype),
            "bias": None if self.bias_dtype is None else normal(self.F).to(self.bias_dtype),
            "out_dtype": self.dtype,
        }


# 1, odd, below and above the tiles; every D is a compilation under the simulator
WIDTHS = (1, 33, 64) if MODE.startswith("ptxsim") else (1, 7, 32, 33, 64, 100)


@st.composite
def cases(draw):
    """Small calls of every kind."""
    B, dtype = draw(st.integers(1, 5)), draw(st.sampled_from([dtype for dtype in KERNEL_DTYPES if dtype != F32]))
    ids = draw(st.sampled_from((torch.int64, torch.int32, None)))
    stream = draw(st.sampled_from((dtype, F32)))
    return Case(
        gelu=draw(st.booleans()),
        B=B,
        N=draw(st.sampled_from((1, 2, 17, 33, 65))),  # a tile of 32 rows holds 32 samples, some, a part of one
        D=draw(st.sampled_from(WIDTHS)),
        F=draw(st.sampled_from((1, 31, 64, 100))),
        T=draw(st.integers(1, 6)) if ids else draw(st.sampled_from((1, B))),
        ids=ids,
        dtype=dtype,
        stream_dtype=stream,
        row_dtype=draw(st.sampled_from((stream, F32))),
        bias_dtype=draw(st.sampled_from((None, dtype, F32))),
        layout=draw(st.sampled_from(("plain", "plain", "transposed", "sliced", "expanded"))),
        table=draw(st.booleans()),
        eps=draw(st.sampled_from((1e-6, 0.3))),
        programs=draw(st.sampled_from((1, 7, 256))),
        seed=draw(st.integers(0, 2**31)),
    )


def operation(case):
    return norm_linear.norm_linear_gelu if case.gelu else norm_linear.norm_linear


@contextlib.contextmanager
def kernels_of(case):
    """Triton runs every operation, with the case's tiles and slices."""
    with contextlib.ExitStack() as stack:
        launch = "hyperclip_fast.kernels.norm_linear.launch"
        stack.enter_context(mock.patch(f"{launch}.choose_norm_tiles", lambda *_: case.tiles))
        stack.enter_context(mock.patch(f"{launch}.PROGRAMS", case.programs))
        set_backend("triton")
        stack.callback(set_backend, "auto")
        stack.enter_context(kernel_run(case.seed % 1000))
        yield


def run_kernel(case, **changes):
    with kernels_of(case):
        return operation(case)(**case.arguments() | changes)


def float64(x, norm_weight, norm_bias, task_ids, eps, weight, bias, out_dtype, gelu):
    """The operation from its definition."""
    rows = range(x.shape[0]) if task_ids is None else task_ids
    rows = torch.zeros(x.shape[0], dtype=torch.int64) if norm_weight.shape[0] == 1 else torch.as_tensor(list(rows))
    x, norm_weight, norm_bias, weight = (tensor.double() for tensor in (x, norm_weight, norm_bias, weight))
    centred = x - x.mean(2, keepdim=True)
    xhat = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    h = xhat * norm_weight[rows].unsqueeze(1) + norm_bias[rows].unsqueeze(1)
    out = torch.einsum("bnd,fd->bnf", h, weight) + (0 if bias is None else bias.double())
    return out * (1 + torch.erf(out / 2**0.5)) / 2 if gelu else out


def compare(case, run=run_kernel):
    out, arguments = run(case), case.arguments()
    assert out.dtype == case.dtype
    expected = float64(**arguments, gelu=case.gelu)
    assert_close(out, expected, str(case), max(0.5, rms(expected)))  # the terms of a short product may cancel
    return out


@settings(max_examples=EXAMPLES)
@given(cases())
def test_matches_float64(case):
    compare(case)


TABLE = sorted({(width, tiles) for kinds in NORM_TILES.values() for width, tiles in kinds.items()})


@pytest.mark.parametrize("gelu, stream", [(False, NARROW), (True, F32)], ids=["narrow", "gelu-wide"])
@pytest.mark.parametrize("width, tiles", TABLE, ids=lambda value: str(value) if isinstance(value, int) else "")
def test_every_tile_of_the_table(width, tiles, gelu, stream):
    # tails in every dimension: 134 = 128 + 6 rows, 72 columns, width - 24 along K; three samples in a tile
    compare(Case(gelu=gelu, B=2, N=67, D=width - 24, F=72, dtype=NARROW, stream_dtype=stream, tiles=tiles))
    if width == 192:  # and as in ViT-Ti, without tails along K
        compare(Case(gelu=gelu, B=2, N=197, D=192, F=200, dtype=NARROW, stream_dtype=stream, tiles=tiles, programs=8))


def test_large_common_offset():
    compare(Case(stream_dtype=F32, offset=1000.0, D=100))  # mean square minus squared mean would lose every digit


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_wrong_task_id_gives_nan_in_its_sample_alone(ids):
    case = Case(B=4, N=9, T=3)
    task_ids = torch.tensor([0, 3, -1, 2], dtype=ids, device=DEVICE)
    out = run_kernel(case, task_ids=task_ids)
    assert out[1:3].isnan().all()
    good = case.arguments() | {"task_ids": task_ids.clamp(0, 2)}
    assert_close(out[[0, 3]], float64(**good, gelu=False)[[0, 3]])


def test_any_order_and_slicing_give_the_same_bits():
    first, *others = (run_kernel(Case(seed=7, programs=programs)) for programs in (1, 2, 256))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("B, N", [(0, 3), (2, 0)])
def test_empty_batch(B, N):
    assert run_kernel(Case(B=B, N=N)).shape == (B, N, 48)


def test_nothing_but_the_output_is_allocated_and_inputs_stay():
    case, shapes = Case(), []

    def remembering_empty(*shape, **options):
        shapes.append(shape)
        return poisoned_empty(*shape, **options)

    arguments = case.arguments()
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with kernels_of(case), allocating(remembering_empty):
        norm_linear.norm_linear(**arguments)
    assert shapes == [(3, 17, 48)]
    assert all(torch.equal(value, arguments[name]) for name, value in before.items())


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_references_are_the_layers_bit_for_bit(dtype, gelu):
    case = Case(T=1, dtype=dtype, row_dtype=dtype, bias_dtype=dtype)
    arguments = case.arguments()
    x, norm_weight, norm_bias, _, eps, weight, bias, _ = arguments.values()
    out = F.linear(F.layer_norm(x, (40,), norm_weight[0], norm_bias[0], eps), weight, bias)
    reference = norm_linear.norm_linear_gelu_reference if gelu else norm_linear.norm_linear_reference
    assert torch.equal(reference(**arguments), F.gelu(out) if gelu else out)


@settings(max_examples=20)
@given(cases())
def test_references_match_float64(case):
    reference = norm_linear.norm_linear_gelu_reference if case.gelu else norm_linear.norm_linear_reference
    wide = {name: value.float() if name in ("x", "weight") else value for name, value in case.arguments().items()}
    wide |= {name: value.float() for name, value in wide.items() if name.startswith("norm_")} | {"out_dtype": F32}
    assert_close(reference(**wide), float64(**wide, gelu=case.gelu), str(case), 0.5)


def fused_calls(monkeypatch):
    """The list that every call of the one kernel is added to; it still runs."""
    calls, fused = [], norm_linear.fused_norm_linear
    monkeypatch.setattr(norm_linear, "fused_norm_linear", lambda *inputs: calls.append(inputs) or fused(*inputs))
    return calls


LEAVES = ("x", "norm_weight", "norm_bias", "weight", "bias")


@pytest.mark.parametrize("needed", [LEAVES, ("norm_weight",), ("norm_bias",), ("x",)], ids="-".join)
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_come_from_two_kernels(gelu, needed, monkeypatch):
    calls, case = fused_calls(monkeypatch), Case(gelu=gelu)
    leaves = {name: value.detach().requires_grad_() for name, value in case.arguments().items() if name in needed}
    out = run_kernel(case, **leaves)
    head = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    with kernels_of(case):
        grads = torch.autograd.grad(out, list(leaves.values()), head)
    assert not calls
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    expected = float64(**case.arguments() | wide, gelu=gelu)
    assert_close(out.detach(), expected.detach(), "out", 0.5)
    for name, grad, reference in zip(wide, grads, torch.autograd.grad(expected, list(wide.values()), head.double())):
        assert_close(grad.to(case.dtype), reference, f"d {name}", slack=2)
    with torch.no_grad():
        run_kernel(case, **leaves)
    assert len(calls) == 1


@pytest.mark.parametrize("change", [{"dtype": F32}, {"D": 385}], ids=["float32", "wide"])
@pytest.mark.parametrize("gelu", [False, True])
def test_what_the_kernel_does_not_take_runs_in_two(gelu, change, monkeypatch):
    calls = fused_calls(monkeypatch)
    compare(Case(gelu=gelu, F=33, **change))
    assert not calls


@pytest.mark.parametrize("name", ["norm_linear", "norm_linear_gelu"])
def test_the_table_decides_under_auto(name, monkeypatch):
    calls = []
    monkeypatch.setattr(norm_linear, "use_triton", lambda x: True)  # as on a GPU, for the choice alone
    monkeypatch.setattr(norm_linear, "fused_norm_linear", lambda *inputs: calls.append(inputs[-2:]))
    arguments = {**Case(gelu=name.endswith("gelu"), stream_dtype=F32, dtype=BF16, F=24).arguments()}
    monkeypatch.setitem(WIDEST["linear_gelu"], "large", 0)
    operation = getattr(norm_linear, name)
    operation(**arguments)
    assert not calls  # off by default
    monkeypatch.setitem(WIDEST[name], "large", 40)
    operation(**arguments)
    assert calls == [(BF16, name.endswith("gelu"))]  # autocast: what counts is the product's dtype
    operation(**arguments | {"out_dtype": None})
    monkeypatch.setitem(WIDEST[name], "large", 39)
    operation(**arguments)
    assert len(calls) == 1


def test_widths_have_their_tiles():
    cpu, (first, last) = torch.device("cpu"), NORM_TILES["large"].values()
    assert [choose_norm_tiles(cpu, width) for width in (1, 192, 193, 384, 385)] == [first, first, last, last, None]


REFUSED = {
    "x must be (B, N, D)": {"x": torch.zeros(5, 40)},
    "norm_weight must be (T, D) with D = 40": {"norm_weight": torch.zeros(4, 41)},
    "norm_bias must have norm_weight's shape and dtype": {"norm_bias": torch.zeros(3, 40)},
    "task_ids must be given unless T is 1 or B": {"task_ids": None},
    "task_ids must be (B,) with B = 3": {"task_ids": torch.zeros(4, dtype=torch.int64)},
    "weight must be (F, K) with F at least 1 and K = 40": {"weight": torch.zeros(48, 41)},
    "bias must have shape (48,)": {"bias": torch.zeros(47)},
}
REFUSED_BY_KERNELS = {
    "x must be one of": {"x": torch.zeros(3, 17, 40, dtype=torch.float64)},
    "norm_weight must be torch.float32 or x's": {name: torch.zeros(4, 40, dtype=BF16) for name in LEAVES[1:3]},
    "weight must be one of": {"weight": torch.zeros(48, 40, dtype=torch.float64)},
    "norm_bias must be on x's device": {"norm_bias": torch.zeros(4, 40, device="meta")},
    "task_ids must be on x's device": {"task_ids": torch.zeros(3, dtype=torch.int64, device="meta")},
    "bias must be on x's device": {"bias": torch.zeros(48, device="meta")},
}


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("message", REFUSED | REFUSED_BY_KERNELS)
def test_refused(message, gelu, triton_backend):
    case = Case(gelu=gelu)
    changes = (REFUSED | REFUSED_BY_KERNELS)[message]
    changes = {name: value if value is None or value.is_meta else value.to(DEVICE) for name, value in changes.items()}
    for backend in ("triton", "reference") if message in REFUSED else ("triton",):
        set_backend(backend)
        with pytest.raises(ValueError) as error:
            operation(case)(**case.arguments() | changes)
        assert str(error.value).startswith(message)


def test_operator_passes_opcheck():
    case = Case(B=2, N=3, D=8, F=16)
    arguments = list(case.arguments().values())[:-1]
    with kernels_of(case):
        torch.library.opcheck(torch.ops.hyperclip_fast.norm_linear, (*arguments, True))
        arguments[3] = arguments[6] = None
        torch.library.opcheck(torch.ops.hyperclip_fast.norm_linear, (*arguments, False))


def step(arguments):
    return norm_linear.norm_linear(**arguments).sum() + norm_linear.norm_linear_gelu(**arguments)


@pytest.mark.slow
def test_compiles_to_one_graph_with_a_dynamic_batch():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor" if MODE == "gpu" else "aot_eager")
    for B in (4, 3):
        case = Case(B=B)
        with kernels_of(case), torch.no_grad():
            assert_close(compiled(case.arguments()), step(case.arguments()).double())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one, and one more for a static first batch


def test_exports_the_operator():
    class Step(torch.nn.Module):
        def forward(self, arguments):
            return step(arguments)

    case = Case()
    arguments = case.arguments() | {"out_dtype": None}  # export takes no dtype as an input
    with kernels_of(case):
        exported = torch.export.export(Step(), (arguments,))
        assert str(exported.graph).count("hyperclip_fast.norm_linear") == 2
        assert torch.equal(exported.module()(arguments), step(arguments))
