"""What the products with epilogues read and write, address by address, counted in Triton's interpreter.

Tiles share the rows of x and of weight, so those are read once for every tile across; all else moves once: residual,
d out, out, and what is kept for backward.
"""

import pytest
import torch

from tests.helpers import MODE, allocating, poisoned_empty
from tests.kernels.test_layer_norm_bytes import assert_never, assert_once

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(MODE not in ("interpreter", "guard"), reason="counted in the interpreter")

if MODE in ("interpreter", "guard"):
    import numpy as np

    from hyperclip_fast.bench.accesses import accesses
    from hyperclip_fast.kernels.linear import launch as linear_launch
    from hyperclip_fast.kernels.linear import linear_add, linear_gelu
    from hyperclip_fast.kernels.linear import operator as linear_op
    from hyperclip_fast.kernels.tables import Tiles

    TILES = Tiles(32, 32, 16, 2, 4, 2)

B, N, K, F = 3, 37, 40, 70  # tails in the rows, the columns and the inner dimension; 4 x 3 tiles of TILES
ROW_TILES, COLUMN_TILES = 4, 3


@pytest.fixture
def tensors(monkeypatch, triton_backend):
    monkeypatch.setattr(linear_launch, "choose_tiles", lambda *_: TILES)
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, N, K), "weight": (F, K), "bias": (F,), "residual": (B, N, F), "scale": (F,)}
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


class Allocated:
    """torch.empty that remembers its tensors."""

    def __init__(self):
        self.tensors = []

    def __call__(self, *shape, **options):
        self.tensors.append(poisoned_empty(*shape, **options))
        return self.tensors[-1]

    def of_dim(self, dim: int) -> list[torch.Tensor]:
        return [tensor for tensor in self.tensors if tensor.dim() == dim]


def run(function):
    """The function's result, what it allocated, and its accesses."""
    allocated = Allocated()
    with allocating(allocated), accesses() as log:
        return function(), allocated, log


def assert_operands_once_a_tile(log, x, weight):
    for tensor, times in ((x, COLUMN_TILES), (weight, ROW_TILES)):
        assert np.array_equal(log.of("load", tensor), np.repeat(np.arange(tensor.numel()), times))


@pytest.mark.parametrize("kept", [True, False])
def test_linear_gelu_forward(tensors, kept, monkeypatch):
    monkeypatch.setattr(linear_op, "WIDEST_RECOMPUTED", 0)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    with torch.set_grad_enabled(kept):
        out, allocated, log = run(lambda: linear_gelu(x, weight, bias))
    assert_operands_once_a_tile(log, x, weight)
    assert_never(log, "load", out=out)
    pre = {"pre": allocated.tensors[1]} if kept else {}
    assert_once(log, "store", out=out, **pre)
    assert log.total("store") == (1 + kept) * out.numel()
    assert log.total("load") == COLUMN_TILES * x.numel() + ROW_TILES * (weight.numel() + F)


@pytest.mark.parametrize("recompute", [True, False])
def test_linear_gelu_backward(tensors, recompute, monkeypatch):
    monkeypatch.setattr(linear_op, "WIDEST_RECOMPUTED", K if recompute else 0)
    x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
    out, kept, _ = run(lambda: linear_gelu(x, weight, bias))
    head = torch.randn(B, N, F)
    _, allocated, log = run(lambda: torch.autograd.grad(out, (x, weight, bias), head))
    grad_pre, partials = allocated.tensors
    assert_once(log, "load", grad_out=head)
    assert_once(log, "store", grad_pre=grad_pre, partials=partials)
    assert log.total("store") == grad_pre.numel() + partials.numel()
    if recompute:
        assert len(kept.tensors) == 1
        assert_operands_once_a_tile(log, x, weight)
    else:
        assert_once(log, "load", pre=kept.tensors[1])
        assert log.total("load") == 2 * head.numel()


def test_linear_add_forward(tensors):
    keep = torch.tensor([2.0, 0.0, 2.0])
    out, allocated, log = run(lambda: linear_add(**tensors, keep=keep))
    assert_operands_once_a_tile(log, tensors["x"], tensors["weight"])
    assert_once(log, "load", residual=tensors["residual"])
    assert_never(log, "load", out=out)
    assert_once(log, "store", out=out, y=allocated.tensors[1])
    assert log.total("store") == 2 * out.numel()
    frozen = {name: tensor.detach() for name, tensor in tensors.items()}
    out, _, log = run(lambda: linear_add(**frozen, keep=keep))
    assert log.total("store") == out.numel()


def test_linear_add_backward(tensors):
    out, kept, _ = run(lambda: linear_add(**tensors, keep=torch.ones(B)))
    head = torch.randn(B, N, F)
    _, allocated, log = run(lambda: torch.autograd.grad(out, list(tensors.values()), head))
    (grad_y,) = allocated.of_dim(3)
    partial_bias, partial_scale = allocated.of_dim(2)
    assert_once(log, "load", grad_out=head, y=kept.tensors[1])
    assert_once(log, "store", grad_y=grad_y, partial_bias=partial_bias, partial_scale=partial_scale)
    assert log.total("store") == grad_y.numel() + 2 * partial_bias.numel()


def test_addresses_beyond_two_to_the_31_elements():
    # The last tile of 2.4e9 rows x columns: nothing is read or written, only the addresses are computed.
    rows, width = 3 * 2**20, 768
    wide = {name: torch.zeros(8, dtype=torch.float16) for name in ("x", "residual", "out", "y")}
    row_tiles, column_tiles = rows // 32, width // 32
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2, "PRECISION": "ieee"}
    with accesses(execute=False, first_program=row_tiles * column_tiles - 1) as log:
        linear_launch._linear_add_kernel[(1,)](
            **wide,
            weight=torch.zeros(8, dtype=torch.float16),
            bias=None,
            scale=None,
            keep=None,
            M=rows,
            N=2**20,
            F=width,
            K=64,
            **blocks,
        )
    last = ((rows - 32 + np.arange(32))[:, None] * width + np.arange(width - 32, width)).reshape(-1)
    for kind, name in (("load", "residual"), ("store", "out"), ("store", "y")):
        assert any(np.array_equal(np.sort(a - wide[name].data_ptr()) // 2, last) for a in log.addresses[kind])
    last = np.arange((rows - 32) * 64, rows * 64)
    assert any(np.array_equal(np.sort(a - wide["x"].data_ptr()) // 2, last) for a in log.addresses["load"])
