"""`python -m hyperclip_fast.env` says what really runs."""

import runpy
import types

import pytest
import torch

from hyperclip_fast import env, set_backend
from hyperclip_fast.kernels.batch_norm import batch_norm_act
from hyperclip_fast.kernels.layer_norm import add_layer_norm, layer_norm
from hyperclip_fast.kernels.linear import linear_add, linear_gelu
from hyperclip_fast.kernels.tables import WIDEST
from tests.kernels.test_cuda_paths import Operators, fake_h100


def call(operation, dtype, width):
    """The operation on a batch of one token, its parameters in float32 where autocast would have them so."""
    x, row = torch.empty(1, 1, width, dtype=dtype), torch.empty(1, width)
    weight, bias = torch.empty(width, width), torch.empty(width)
    calls = {
        "layer_norm": lambda: layer_norm(x, row, row),
        "add_layer_norm": lambda: add_layer_norm(x, x, row, row),
        "batch_norm_act": lambda: batch_norm_act(x.view(1, width, 1, 1), row, row, None, row[0], row[0]),
        "linear_gelu": lambda: linear_gelu(x, weight, bias),
        "linear_add": lambda: linear_add(x, weight, bias, x),
    }
    return calls[operation]()


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("dtype", env.DTYPES)
def test_the_implementation_is_the_one_that_runs(dtype, backend, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(WIDEST["linear_add"], "large", 384)
    set_backend(backend)
    try:
        with fake_h100(), torch.no_grad():
            for operation in ("layer_norm", "add_layer_norm", "batch_norm_act", "linear_gelu", "linear_add"):
                for width in env.WIDTHS.values():
                    with Operators() as seen:
                        call(operation, env.DTYPES[dtype], width)
                    said = env.implementation(operation, torch.device("cuda", 0), env.DTYPES[dtype], width)
                    assert said == ("triton" if seen.ours() else "pytorch"), (operation, width)
    finally:
        set_backend("auto")


def test_the_report_of_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(name="H100", total_memory=0)
    )
    with fake_h100():
        lines = [" ".join(line.split()) for line in env.report().splitlines()]
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("cuda:0: H100")) :]
    assert "layer_norm bf16 fp16 fp32 triton triton triton triton a GPU" in lines
    assert "batch_norm_act bf16 fp16 fp32 triton triton triton triton a GPU" in lines
    table = 'the table, "large":'
    assert f"linear_gelu bf16 fp16 pytorch pytorch pytorch pytorch {table} never" in lines
    assert f"linear_add bf16 fp16 pytorch pytorch pytorch pytorch {table} never" in lines
    left = "pytorch pytorch pytorch pytorch float32 products are left to the BLAS"
    assert f"linear_gelu fp32 {left}" in lines and f"linear_add fp32 {left}" in lines


@pytest.mark.parametrize("backend, why", [("auto", "not a GPU"), ("reference", 'set_backend("reference")')])
def test_the_command(backend, why, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("HYPERCLIP_KERNEL_TABLE", "mine.json")
    set_backend(backend)
    try:
        runpy.run_path(env.__file__, run_name="__main__")
    finally:
        set_backend("auto")
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert f"torch {torch.__version__.split('+')[0]}" in lines[0]
    assert lines[1:3] == [f'backend: "{backend}"', "kernels' tables: mine.json"]
    assert f"layer_norm bf16 fp16 fp32 pytorch pytorch pytorch pytorch {why}" in lines
    attention = next(line.split() for line in lines if line.startswith("attention"))
    assert set(attention[4:8]) <= {"flash", "math"}
    assert printed.isascii() and max(map(len, printed.splitlines())) <= 120
