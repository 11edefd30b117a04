"""The byte ledger's figures, on small shapes: what every operation moves, and what a block moves beside stock timm."""

import json

import pytest
import torch

from tests.helpers import MODE

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(MODE not in ("interpreter", "guard"), reason="counted in the interpreter")

if MODE in ("interpreter", "guard"):
    import triton.language as tl

    from hyperclip_fast.bench import ledger
    from hyperclip_fast.bench.accesses import steps
    from hyperclip_fast.bench.ledger import SEGMENTS, Shape, block_tables, operation_lines, predicted_seconds

    SHAPE = Shape(N=37, D=32, heads=2)

    @triton.jit
    def _twice_kernel(x, out, SIZE: tl.constexpr):
        o = tl.arange(0, SIZE)
        tl.store(out + o, tl.load(x + o) + tl.load(x + SIZE - 1 - o))


ACTIVATIONS = {  # MD that each pass cannot do without: inference, forward in training, backward
    "layer_norm": (2, 2, 3),
    "add_layer_norm": (4, 4, 4),
    "batch_norm_act": (2, 2, 3),
    "batch_norm_act, residual": (3, 3, 5),
    "linear_gelu, recomputed": (5, 5, 9),
    "linear_gelu, kept": (5, 9, 12),
    "linear_add": (6, 6, 1),
    "linear_add, scale": (6, 7, 3),
    "norm_linear": (4, None, None),
    "norm_linear_gelu": (5, None, None),
}
INFERENCE = {"(a)": 36, "(a)+GELU": 28, "(a')": 26, "(b)": 22}
TRAINING = {"(a)": 111, "(a)+GELU": 96, "(a)+GELU kept": 103, "(a')": 98}
TRAINING_WITHOUT = {"(a)": 96, "(a)+GELU": 86}  # the packing of dq, dk, dv and the bias gradients, which are torch's


@pytest.fixture(scope="module")
def tables():
    return block_tables(SHAPE)


def test_every_operation_moves_the_least_possible():
    lines = operation_lines(SHAPE)
    kinds = ("inference", "forward", "backward")
    expected = {f"{name}: {kind}": md for name, mds in ACTIVATIONS.items() for kind, md in zip(kinds, mds) if md}
    assert {line.operation: line.activations for line in lines} == expected
    assert all(line.ratio == pytest.approx(1, abs=2e-3) for line in lines), lines  # two kernels read the task ids


def test_partials_are_written_and_read_once():
    lines = {line.operation: line.partials for line in operation_lines(SHAPE)}
    slices = 2  # of 37 tokens, 32 at a time; two float32 sums of each
    assert lines["layer_norm: backward"] == 2 * 2 * SHAPE.B * slices * SHAPE.D * 4 / SHAPE.unit
    assert all(partials == 0 for name, partials in lines.items() if "backward" not in name)


def test_a_block_in_inference(tables):
    inference, _ = tables
    totals = {level: sum(column.values()) for level, column in inference.items()}
    assert totals["stock timm"] == 38 and totals["naive"] == 46
    assert {level: totals[level] <= md for level, md in INFERENCE.items()} == dict.fromkeys(INFERENCE, True), totals
    for column in inference.values():  # what no fusion removes: reading q, k, v and writing out; the products' operands
        assert column["attention"] == 4 and column["qkv"] == 4 and column["fc1"] == 5 and column["fc2"] >= 5
        assert set(column) <= set(SEGMENTS)


def test_a_block_in_training(tables):
    _, training = tables
    totals = {level: sum(column.values()) for level, column in training.items()}
    assert {level: totals[level] <= md for level, md in TRAINING.items()} == dict.fromkeys(TRAINING, True), totals
    for level, md in TRAINING_WITHOUT.items():
        column = training[level]
        assert totals[level] - column["packing dq, dk, dv"] - column["bias gradients"] <= md
        assert totals[level] < totals["stock timm"] < totals["naive"]


def test_predicted_times_are_the_roofline(tables):
    inference, _ = tables
    stock, fused = (1e6 * predicted_seconds(inference[level], 768, 197) for level in ("stock timm", "(a')"))
    by_hand = [25.8 * md for md in (2, 4, 5, 8, 3)] + [
        223.1,
        74.4,
        297.5,
        297.5,
    ]  # passes, then products
    assert stock == pytest.approx(sum(by_hand), rel=1e-3)
    assert fused == pytest.approx(sum(by_hand) - 25.8 * (3 + 8 + 3) + (3 * 25.8 - 74.4), rel=1e-3)  # proj: bytes bind


def moved(function, *arguments):
    """(name, bytes loaded, bytes stored) of each step of a call."""
    with steps() as taken:
        function(*arguments)
    kinds = [
        {kind: sum(m.unique for m in step.moved if m.kind == kind) for kind in ("load", "store")} for step in taken
    ]
    return [(step.name, kind["load"], kind["store"]) for step, kind in zip(taken, kinds)]


def test_operators_are_counted_by_their_tensors():
    x, row = torch.zeros(4, 6), torch.zeros(1, 6)
    assert moved(lambda: x.t().reshape(2, 12)) == [("clone", 96, 96)]  # 24 floats, and the view is free
    assert moved(lambda: x.view(24)[3:].detach()) == []
    assert moved(lambda: torch.empty_like(x)) == []
    assert moved(lambda: x + row.expand(4, 6)) == [("add", 96 + 24, 96)]
    assert moved(lambda: x * x) == [("mul", 96, 96)]
    assert moved(lambda: x.mul_(2)) == [("mul_", 96, 96)]
    assert moved(lambda: x.sum(0)) == [("sum", 96, 24)]


def test_kernels_are_counted_by_their_addresses():
    x, out = torch.zeros(16), torch.zeros(16)
    with steps() as taken:
        _twice_kernel[(1,)](x=x, out=out, SIZE=16)
    (step,) = taken
    assert {m.name: (m.kind, m.unique, m.total) for m in step.moved} == {
        "x": ("load", 64, 128),
        "out": ("store", 64, 64),
    }


def test_an_access_outside_every_tensor_is_an_error():
    x, out = torch.zeros(32)[:16], torch.zeros(32)[:16]
    with pytest.raises(ValueError, match="32 of 64 loads lie in its tensors"), steps():
        _twice_kernel[(1,)](x=x, out=out, SIZE=32)


def test_the_command_prints_and_writes_the_tables(monkeypatch, capsys, tmp_path):
    path = tmp_path / "ledger.json"
    monkeypatch.setattr("sys.argv", ["ledger.py", "--tokens", "5", "--width", "64", "--json", str(path)])
    ledger.main()
    report = json.loads(path.read_text())
    assert sum(report["inference"]["stock timm"].values()) == 38
    assert report["operations"][0]["operation"] == "layer_norm: inference"
    printed = capsys.readouterr().out
    assert "add_layer_norm: backward" in printed and "packing dq, dk, dv" in printed
