"""Products with epilogues, forward and every gradient, against a float64 reference written here on its own.

The same tests run on a GPU, in Triton's interpreter, on simulated PTX and under the interpreter guard (conftest.py).
"""

import contextlib
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerScale, Mlp
from torch.utils._python_dispatch import TorchDispatchMode

from hyperclip_fast import set_backend
from hyperclip_fast.kernels import dispatch
from hyperclip_fast.kernels.linear import functional as linear
from hyperclip_fast.kernels.linear import (
    linear_add,
    linear_add_reference,
    linear_gelu,
    linear_gelu_reference,
)
from hyperclip_fast.kernels.tables import TILES, WIDEST, Tiles, choose_tiles, device_kind, is_chosen, nvidia_kind
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
from hyperclip_fast.kernels.linear import launch as linear_launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EXAMPLES = examples(gpu=200, interpreter=40, other=20)
SMALL = {4: Tiles(32, 32, 32, 2, 4, 2), 2: Tiles(64, 32, 32, 2, 4, 3)}  # many tiles, groups and K-steps in few programs
NAMES = ("x", "weight", "bias", "residual", "scale")


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes, layouts, and what backward keeps; its tensors follow from the seed."""

    add: bool = True  # linear_add, else linear_gelu
    B: int = 3
    N: int = 17
    K: int = 40
    F: int = 48
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # x's by default
    bias_dtype: torch.dtype | None = F32
    residual_dtype: torch.dtype = F32
    scale_dtype: torch.dtype | None = F32
    keep: bool = True
    layout: str = "plain"  # of x and residual: plain, transposed, sliced, expanded
    recompute: bool = True  # linear_gelu's pre-activation in backward
    tiles: Tiles | None = None  # SMALL by default
    programs: int = 2048
    seed: int = 0

    def __str__(self):
        dtypes = (self.dtype, self.bias_dtype, *((self.residual_dtype, self.scale_dtype) if self.add else ()))
        names = "-".join("none" if dtype is None else str(dtype)[6:] for dtype in dtypes)
        kind = f"add-keep{self.keep:d}" if self.add else f"gelu-recompute{self.recompute:d}"
        return f"{kind}-B{self.B}-N{self.N}-K{self.K}-F{self.F}-{names}-{self.layout}-{self.tiles}"

    def tensors(self) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The leaves that have gradients, and keep."""
        generator = torch.Generator().manual_seed(self.seed)
        leaves = {"x": self._activation(generator, self.K, self.dtype)}
        weight = torch.randn(self.F, self.K, generator=generator) / self.K**0.5
        leaves["weight"] = weight.to(DEVICE, self.weight_dtype or self.dtype)
        if self.bias_dtype is not None:
            leaves["bias"] = torch.randn(self.F, generator=generator).to(DEVICE, self.bias_dtype)
        if not self.add:
            return leaves, None
        leaves["residual"] = self._activation(generator, self.F, self.residual_dtype)
        if self.scale_dtype is not None:
            leaves["scale"] = torch.randn(self.F, generator=generator).to(DEVICE, self.scale_dtype)
            leaves["scale"][::3] = 0
        keep = torch.randint(2, (self.B,), generator=generator).float().to(DEVICE) / 0.7 if self.keep else None
        return leaves, keep

    def _activation(self, generator, width, dtype):
        shape = {"transposed": (self.B, width, self.N), "sliced": (self.B, self.N + 1, width + 3)}
        shape = shape.get(self.layout, (1 if self.layout == "expanded" else self.B, self.N, width))
        tensor = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        if self.layout == "transposed":
            return tensor.transpose(1, 2)
        if self.layout == "sliced":
            return tensor[:, 1:, 2 : 2 + width]
        return tensor.expand(self.B, -1, -1)


# 1, odd, below and above the tiles; every K is a compilation under the simulator
INNER = (1, 33, 64) if MODE.startswith("ptxsim") else (1, 7, 32, 33, 64, 100)


@st.composite
def cases(draw, add):
    """Small calls of every kind."""
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    other = st.sampled_from((dtype, F32))
    return Case(
        add=add,
        B=draw(st.integers(1, 4)),
        N=draw(st.sampled_from((1, 2, 17, 33, 65))),
        K=draw(st.sampled_from(INNER)),
        F=draw(st.sampled_from((1, 31, 64, 100))),
        dtype=dtype,
        bias_dtype=draw(st.one_of(st.none(), other)),
        residual_dtype=draw(other) if add else F32,
        scale_dtype=draw(st.one_of(st.none(), other)) if add else None,
        keep=add and draw(st.booleans()),
        layout=draw(st.sampled_from(("plain", "plain", "transposed", "sliced", "expanded"))),
        recompute=add or draw(st.booleans()),
        programs=draw(st.sampled_from((1, 3, 2048))),
        seed=draw(st.integers(0, 2**31)),
    )


def call(case, leaves, keep, gelu=linear_gelu, add=linear_add):
    x, weight, bias = leaves["x"], leaves["weight"], leaves.get("bias")
    return add(x, weight, bias, leaves["residual"], leaves.get("scale"), keep) if case.add else gelu(x, weight, bias)


def require_grads(leaves, frozen=()):
    return {name: leaf.detach().requires_grad_(name not in frozen) for name, leaf in leaves.items()}


def head_gradient(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)


def backward(out, head, leaves):
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), head)))


@contextlib.contextmanager
def kernels_of(case):
    """Triton runs every operation, with the case's tiles, slices and recomputation."""
    tiles = case.tiles or SMALL[case.dtype.itemsize]
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("linear.launch.choose_tiles", lambda *_: tiles),
            ("linear.launch.PASS_PROGRAMS", case.programs),
            ("linear.operator.WIDEST_RECOMPUTED", case.K if case.recompute else 0),
        ):
            stack.enter_context(mock.patch(f"hyperclip_fast.kernels.{name}", value))
        set_backend("triton")
        stack.callback(set_backend, "auto")
        stack.enter_context(kernel_run(case.seed % 1000))
        yield


def run_kernels(case, frozen=()):
    leaves, keep = case.tensors()
    leaves = require_grads(leaves, frozen)
    with kernels_of(case):
        out = call(case, leaves, keep)
        return out, backward(out, head_gradient(out), leaves)


def run_reference(case):
    leaves, keep = case.tensors()
    leaves = require_grads(leaves)
    out = call(case, leaves, keep, linear_gelu_reference, linear_add_reference)
    return out, backward(out, head_gradient(out), leaves)


def run_float64(case):
    """The operation from its definition, and each result's size where its terms do not cancel."""
    leaves, keep = case.tensors()
    head = head_gradient(call(case, leaves, keep, linear_gelu_reference, linear_add_reference)).double()
    wide = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    factor = torch.ones(case.B, 1, 1).double().to(DEVICE) if keep is None else keep.double().view(-1, 1, 1)
    y = torch.einsum("bnk,fk->bnf", wide["x"], wide["weight"]) + wide.get("bias", 0)
    if case.add:
        out = wide["residual"] + factor * wide.get("scale", 1) * y
    else:
        out = y * (1 + torch.erf(y / 2**0.5)) / 2
    (grad_y,) = torch.autograd.grad(out, y, head, retain_graph=True)
    size, rows = max(rms(grad_y), 0.3 * rms(head)), (case.B * case.N) ** 0.5
    sizes = {"x": size * rms(wide["weight"]) * case.F**0.5, "weight": size * rms(wide["x"]) * rows}
    sizes |= {"bias": size * rows, "scale": rms(y) * rms(head) * rows, "residual": 0.0}
    return out, backward(out, head, wide), sizes


def compare(case, run=run_kernels, slack=1.0, **options):
    """Run a case and hold out and the gradients to the float64 reference, within `slack` tolerances."""
    out, grads = run(case, **options)
    expected, expected_grads, sizes = run_float64(case)
    assert out.dtype == (case.residual_dtype if case.add else case.dtype)
    leaves, _ = case.tensors()
    floor = 0.0 if case.add else 0.5
    product = slack if out.dtype == case.dtype else slack * 2
    assert_close(out, expected.detach(), f"{case} out", max(floor, rms(expected)), product)
    for name, grad in grads.items():
        assert grad.dtype == leaves[name].dtype
        narrow = max(case.dtype, grad.dtype, key=TOLERANCE.get)  # 32-bit gradients of 16-bit activations
        assert_close(grad.to(narrow), expected_grads[name], f"{case} d {name}", sizes[name], slack)
    return out, grads


@settings(max_examples=EXAMPLES)
@given(cases(add=False))
def test_linear_gelu_matches_float64(case):
    compare(case)


@settings(max_examples=EXAMPLES)
@given(cases(add=True))
def test_linear_add_matches_float64(case):
    compare(case)


@settings(max_examples=40)
@given(st.booleans().flatmap(lambda add: cases(add=add)))
def test_references_match_float64(case):
    case = replace(case, dtype=F32)  # in 16 bits they round the product before the epilogue, as timm does
    compare(case, run_reference)


TABLE = sorted({tiles for kinds in TILES.values() for tiles in kinds[2] + kinds[4]})


@pytest.mark.parametrize("add", [False, True], ids=["gelu", "add"])
@pytest.mark.parametrize("tiles", TABLE, ids=lambda tiles: "-".join(map(str, tiles)))
def test_every_tile_of_the_table(tiles, add):
    # tails in every dimension: 134 = 128 + 6 rows, 136 = 128 + 8 columns, 72 = 64 + 8 along K
    itemsizes = {size for kinds in TILES.values() for size in kinds if tiles in kinds[size]}
    for dtype in {4: (F32,), 2: KERNEL_DTYPES[-1:]}[itemsizes.pop()]:
        compare(Case(add=add, B=2, N=67, K=72, F=136, dtype=dtype, bias_dtype=dtype, scale_dtype=None, tiles=tiles))


@pytest.mark.parametrize("case", [Case(), Case(add=False, recompute=False)], ids=str)
def test_inference_matches_float64(case):
    # Without what training stores, the compiler contracts the epilogue's sums otherwise: not always bit-equal.
    leaves, keep = case.tensors()
    with kernels_of(case), torch.no_grad():
        out = call(case, leaves, keep)
    assert_close(out, run_float64(case)[0].detach())


@pytest.mark.parametrize("add, recompute", [(False, True), (False, False), (True, True)])
def test_repeated_gradients_are_bit_equal(add, recompute):
    case = Case(add=add, recompute=recompute, B=2, N=70, programs=3)
    first, second = (run_kernels(case)[1] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scale_of_zero_has_the_right_gradient():
    _, grads = compare(Case(dtype=KERNEL_DTYPES[-1], bias_dtype=None))
    assert (grads["scale"][::3] != 0).all()  # the product itself, which out - residual has lost


class Allocations:
    """torch.empty that remembers the shapes it was asked for."""

    def __init__(self):
        self.shapes = []

    def __call__(self, *shape, **options):
        self.shapes.append(shape)
        return poisoned_empty(*shape, **options)


def allocations_of(case, frozen=(), grad=True):
    """What the launches allocate in forward and in backward; gradients of the rest are compared on the way."""
    leaves, keep = case.tensors()
    forward, back = Allocations(), Allocations()
    leaves = require_grads(leaves, frozen)
    with kernels_of(case), torch.set_grad_enabled(grad):
        with allocating(forward):
            out = call(case, leaves, keep)
        if grad:
            with allocating(back):
                grads = backward(out, head_gradient(out), leaves)
            _, expected, sizes = run_float64(case)
            for name, gradient in grads.items():
                assert_close(gradient, expected[name], name, sizes[name])
    return forward.shapes, back.shapes


ROWS, OUT = 3 * 17, (3, 17, 48)
FROZEN = {  # frozen leaves: what backward allocates of (d pre or d y, partials of bias, partials of scale)
    (): (1, 1, 1),
    ("bias",): (1, 0, 1),
    ("scale",): (1, 1, 0),
    ("x",): (1, 1, 1),
    ("x", "weight"): (0, 1, 1),
    ("weight", "bias", "scale"): (1, 0, 0),
    ("x", "weight", "bias", "scale"): (0, 0, 0),
}


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_linear_add_computes_no_gradient_that_is_not_needed(frozen):
    forward, back = allocations_of(Case(), frozen)
    tensors, *partials = FROZEN[frozen]
    assert forward == [OUT] * (1 if "scale" in frozen else 2)  # y is kept for scale's gradient alone
    slices = -(-ROWS // 16)
    assert back == [OUT] * tensors + [(slices, 48)] * sum(partials)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("frozen", [(), ("bias",), ("weight",), ("x", "weight")], ids=str)
def test_linear_gelu_computes_no_gradient_that_is_not_needed(frozen, recompute):
    forward, back = allocations_of(Case(add=False, recompute=recompute), frozen)
    assert forward == [OUT] * (1 if recompute else 2)
    lines = -(-ROWS // (32 if recompute else 16))
    assert back == [OUT] + ([] if "bias" in frozen else [(lines, 48)])


class Products(TorchDispatchMode):
    """Counts the matrix products that run under it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("x", "weight")], ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_backward_multiplies_only_for_what_is_needed(add, frozen):
    case = Case(add=add)
    leaves, keep = case.tensors()
    with kernels_of(case), Products() as products:
        leaves = require_grads(leaves, frozen)
        out = call(case, leaves, keep)
        backward(out, head_gradient(out), leaves)
    assert products.count == 2 - len(frozen)


def test_plain_residual_add_has_no_pass_in_backward():
    case = Case(bias_dtype=None, scale_dtype=None, keep=False)
    assert allocations_of(case) == ([OUT], [])


def test_inference_keeps_nothing_for_backward():
    for add in (False, True):
        assert allocations_of(Case(add=add, recompute=False), grad=False) == ([OUT], [])


@pytest.mark.parametrize("B, N", [(0, 3), (2, 0)])
@pytest.mark.parametrize("add, recompute", [(False, True), (False, False), (True, True)])
def test_empty_batch(B, N, add, recompute):
    out, grads = run_kernels(Case(add=add, B=B, N=N, recompute=recompute))
    assert out.shape == (B, N, 48)
    assert all(grads[name].count_nonzero() == 0 for name in ("weight", "bias"))


def test_outputs_are_not_aliases_of_inputs():
    for case in (Case(), Case(add=False)):
        leaves, keep = case.tensors()
        before = {name: leaf.clone() for name, leaf in leaves.items()}
        with kernels_of(case):
            out = call(case, leaves, keep)
        storages = {tensor.untyped_storage().data_ptr() for tensor in (*leaves.values(), out)}
        assert len(storages) == len(leaves) + 1
        assert all(torch.equal(before[name], leaf) for name, leaf in leaves.items())


@pytest.mark.parametrize("add", [False, True], ids=["gelu", "add"])
def test_weights_are_cast_to_the_activations(add):
    dtype = KERNEL_DTYPES[-1]
    case = Case(add=add, dtype=dtype, weight_dtype=F32)
    out, grads = run_kernels(case)
    assert grads["weight"].dtype == grads["bias"].dtype == F32
    leaves, keep = case.tensors()
    with kernels_of(case):
        assert torch.equal(out, call(case, {**leaves, "weight": leaves["weight"].to(dtype)}, keep))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_references_are_timm_bit_for_bit(dtype):
    leaves, keep = Case(dtype=dtype, bias_dtype=dtype, residual_dtype=dtype, scale_dtype=dtype).tensors()
    x, weight, bias, residual, scale = (leaves[name] for name in NAMES)
    mlp, layer_scale = Mlp(40, 48, device=DEVICE, dtype=dtype), LayerScale(48, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        mlp.fc1.weight.copy_(weight), mlp.fc1.bias.copy_(bias), layer_scale.gamma.copy_(scale)
        fc1 = mlp.fc1(x)
        assert torch.equal(linear_gelu_reference(x, weight, bias), mlp.act(fc1))
        dropped = layer_scale(fc1) * keep.to(dtype).view(-1, 1, 1)  # timm's drop_path draws its factors in x's dtype
        assert torch.equal(linear_add_reference(x, weight, bias, residual, scale, keep), residual + dropped)
        assert torch.equal(linear_add_reference(x, weight, bias, residual), residual + fc1)


def test_float32_products_use_tf32_only_where_torch_may(monkeypatch):
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(torch.version, "hip", None)
    before = matmul.fp32_precision if hasattr(matmul, "fp32_precision") else None
    try:
        for allowed in (True, False):
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            assert linear_launch._precision(F32) == ("tf32" if allowed else "ieee")
            assert linear_launch._precision(F16) == "ieee"
            if MODE.startswith("ptxsim"):  # the interpreter computes in full float32 either way
                out, _ = run_kernels(Case(add=False))
                error = rms(out.double() - run_float64(Case(add=False))[0]) / rms(out)
                assert (1e-5 < error < 1e-3) if allowed else error < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")
        if before is not None:
            matmul.fp32_precision = before


def test_the_table_decides_under_auto(monkeypatch):
    x = torch.zeros(1, 1, 8, dtype=BF16)
    monkeypatch.setitem(WIDEST["linear_gelu"], "large", 768)
    assert [is_chosen("linear_gelu", x, width) for width in (192, 384, 768, 1024)] == [True, True, True, False]
    assert not is_chosen("linear_gelu", x.float(), 192)
    assert not is_chosen("linear_add", x, 192)
    monkeypatch.setitem(WIDEST["linear_add"], "large", 192)
    assert is_chosen("linear_add", x, 192)
    calls = []
    monkeypatch.setattr(dispatch, "use_triton", lambda x: True)  # as on a GPU
    monkeypatch.setattr(linear, "fused_linear_gelu", lambda *_: calls.append("gelu"))
    linear_gelu(x, torch.zeros(4, 8, dtype=BF16))
    assert calls == ["gelu"]
    linear_gelu(x.float(), torch.zeros(4, 8))
    assert calls == ["gelu"]


@pytest.mark.parametrize(
    "capability, kind", [((8, 0), "large"), ((8, 9), "small"), ((9, 0), "large"), ((12, 0), "small")]
)
def test_kind_of_device(capability, kind, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    nvidia_kind.cache_clear()
    assert device_kind("cuda", 0) == kind
    nvidia_kind.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_kind("cuda", 0) == "amd"


def test_small_batches_get_small_tiles():
    device = torch.device("cpu")
    small, shallow, deep = TILES["large"][2]
    assert choose_tiles(device, 2, 197, 768, 192) == small
    assert choose_tiles(device, 2, 256 * 197, 768, 192) == shallow
    assert choose_tiles(device, 2, 256 * 197, 3072, 768) == deep


REFUSED = {
    "x must be (B, N, K)": {"x": torch.zeros(5, 40)},
    "x must be (B, N, K) with K at least 1": {"x": torch.zeros(3, 17, 0)},
    "weight must be (F, K) with F at least 1 and K = 40": {"weight": torch.zeros(48, 41)},
    "weight must be (F, K)": {"weight": torch.zeros(40)},
    "bias must have shape (48,)": {"bias": torch.zeros(47)},
    "residual must have shape (3, 17, 48)": {"residual": torch.zeros(3, 17, 47)},
    "scale must have shape (48,)": {"scale": torch.zeros(1)},
    "keep must have shape (3,)": {"keep": torch.zeros(3, 1, 1)},
    "keep must be torch.float32": {"keep": torch.zeros(3, dtype=F16)},
    "keep must be torch.float32 without a gradient": {"keep": torch.zeros(3, requires_grad=True)},
}
REFUSED_BY_KERNELS = {
    "x must be one of": {"x": torch.zeros(3, 17, 40, dtype=torch.float64)},
    "residual must be one of": {"residual": torch.zeros(3, 17, 48, dtype=torch.float64)},
    "bias must be on x's device": {"bias": torch.zeros(48, device="meta")},
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
    leaves, keep = Case().tensors()
    arguments = {**leaves, "keep": keep}
    arguments |= {name: value if value.is_meta else value.to(DEVICE) for name, value in changes.items()}
    with pytest.raises(ValueError) as error:
        linear_add(**arguments)
    assert message in str(error.value)
    if message.split()[0] in ("x", "weight", "bias"):
        with pytest.raises(ValueError) as error:
            linear_gelu(*(arguments[name] for name in ("x", "weight", "bias")))
        assert message in str(error.value)


@pytest.mark.parametrize("kept", [True, False])
def test_operators_pass_opcheck(kept):
    case = Case(B=2, N=3, K=8, F=16)
    leaves, keep = case.tensors()
    leaves = require_grads(leaves, () if kept else ("scale",))
    x, weight, bias, residual, scale = (leaves[name] for name in NAMES)
    operators = torch.ops.hyperclip_fast
    with kernels_of(case):
        torch.library.opcheck(operators.linear_gelu, (x, weight, bias, kept))
        torch.library.opcheck(operators.linear_add, (x, weight, bias, residual, scale, keep, kept))
        torch.library.opcheck(operators.linear_add, (x, weight, None, residual, None, None, False))


def mlp_step(x, weight, bias, residual, scale, keep):
    hidden = linear_gelu(x, weight, bias)
    return linear_add(hidden, weight.t(), None, x, None, keep) + linear_add(x, weight, bias, residual, scale).sum()


@pytest.mark.parametrize("recompute", [True, False])
def test_compiles_to_one_graph_with_a_dynamic_batch(recompute):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = "inductor" if MODE == "gpu" else "aot_eager"
    compiled = torch.compile(mlp_step, fullgraph=True, dynamic=True, backend=backend)
    for B in (4, 3):
        case = Case(B=B, recompute=recompute)
        leaves, keep = case.tensors()
        results = []
        with kernels_of(case):
            for function in (compiled, mlp_step):
                inputs = require_grads(leaves)
                function(*inputs.values(), keep).square().sum().backward()
                results.append([leaf.grad for leaf in inputs.values()])
        for ours, eager, name in zip(*results, leaves):
            assert_close(ours, eager.double(), name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one, and one more for a static first batch


def test_the_choice_is_made_while_tracing(monkeypatch):
    # As on a GPU under "auto": the table is asked inside the compiled function.
    monkeypatch.setattr(dispatch, "use_triton", lambda x: True)
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="eager")
    x, weight = torch.randn(1, 2, 8), torch.randn(4, 8)
    assert torch.equal(compiled(x, weight), linear_gelu_reference(x, weight))


def test_exports_the_operators():
    class Step(torch.nn.Module):
        def forward(self, *inputs):
            return mlp_step(*inputs)

    case = Case()
    leaves, keep = case.tensors()
    inputs = (*leaves.values(), keep)
    with kernels_of(case):
        exported = torch.export.export(Step(), inputs)
        assert all(name in str(exported.graph) for name in ("hyperclip_fast.linear_gelu", "hyperclip_fast.linear_add"))
        assert torch.equal(exported.module()(*inputs), mlp_step(*inputs))


def test_second_derivative_is_refused():
    case = Case(add=False)
    leaves, _ = case.tensors()
    leaves = require_grads(leaves)
    with kernels_of(case):
        out = call(case, leaves, None)
        (grad,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
