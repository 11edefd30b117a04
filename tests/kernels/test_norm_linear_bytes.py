"""What the norm and product in one read and write, address by address, counted in Triton's interpreter.

The least possible is x, weight, bias and the rows in use once, and out once. From memory it is that. Beyond L2, each
slice of the columns reads x in two sweeps, and each row tile reads weight once.
"""

import pytest
import torch

from tests.helpers import MODE
from tests.kernels.test_layer_norm_bytes import accesses, assert_never, assert_once

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(MODE not in ("interpreter", "guard"), reason="counted in the interpreter")

if MODE in ("interpreter", "guard"):
    import numpy as np

    from hyperclip_fast.kernels.norm_linear import launch as norm_linear_launch
    from hyperclip_fast.kernels.norm_linear import norm_linear, norm_linear_gelu
    from hyperclip_fast.kernels.tables import Tiles

    TILES = Tiles(32, 32, 16, 1, 4, 2)

B, N, D, F, T = 3, 37, 40, 70, 5  # tails in the rows, the columns and the inner dimension; 4 x 3 tiles of TILES
ROW_TILES = 4


@pytest.mark.parametrize("programs, slices", [(1, 1), (8, 2), (256, 3)])
@pytest.mark.parametrize("stream", [torch.float16, torch.float32], ids=str)
def test_each_element_moves_as_often_as_it_must(stream, programs, slices, monkeypatch, triton_backend):
    monkeypatch.setattr(norm_linear_launch, "choose_norm_tiles", lambda *_: TILES)
    monkeypatch.setattr(norm_linear_launch, "PROGRAMS", programs)
    x, weight, bias = torch.randn(B, N, D).to(stream), torch.randn(F, D).half(), torch.randn(F)
    norm_weight, norm_bias, task_ids = torch.randn(T, D), torch.randn(T, D), torch.tensor([2, 0, 2])
    for operation in (norm_linear, norm_linear_gelu):
        with accesses() as log:
            out = operation(x, norm_weight, norm_bias, task_ids, 1e-6, weight, bias, torch.float16)
        assert_once(log, "store", out=out)
        assert_never(log, "load", out=out)
        assert log.total("store") == out.numel()
        for tensor, times in ((x, 2 * slices), (weight, ROW_TILES), (bias, ROW_TILES)):
            assert np.array_equal(log.of("load", tensor), np.repeat(np.arange(tensor.numel()), times))
        for table in (norm_weight, norm_bias):  # rows 2 and 0 alone; tiles hold 1, 2, 2 and 1 samples
            used = [D * row + np.arange(D) for row in (0, 2)]
            assert np.array_equal(np.unique(log.of("load", table)), np.concatenate(used))
            assert len(log.of("load", table)) == 6 * D * slices


def test_addresses_beyond_two_to_the_31_elements():
    # The last tile of 3.1e6 rows: nothing is read or written, only the addresses are computed.
    rows, width, columns = 3 * 2**20, 768, 1024
    x, out, weight = (torch.zeros(8, dtype=torch.float16) for _ in range(3))
    norm_weight, norm_bias, task_ids = torch.zeros(8), torch.zeros(8), torch.zeros(3, dtype=torch.int64)
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "GELU": False}
    with accesses(execute=False, first_program=rows // 32 * 32 - 1) as log:
        norm_linear_launch._norm_linear_kernel[(1,)](
            x=x,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            task_ids=task_ids,
            weight=weight,
            bias=None,
            out=out,
            M=rows,
            N=2**20,
            T=1,
            F=columns,
            slices=32,
            norm_weight_stride=width,
            norm_bias_stride=width,
            eps=1e-6,
            K=width,
            **blocks,
        )
    stored = np.sort(np.concatenate(log.addresses["store"]) - out.data_ptr()) // 2
    last = (rows - 32 + np.arange(32))[:, None] * columns + np.arange(columns - 32, columns)
    assert np.array_equal(stored, last.reshape(-1))
    chunk = ((rows - 32 + np.arange(32))[:, None] * width + np.arange(width - 64, width)).reshape(-1)
    assert any(np.array_equal(np.sort(a - x.data_ptr()) // 2, chunk) for a in log.addresses["load"])
    assert any(np.array_equal(a - task_ids.data_ptr(), [16]) for a in log.addresses["load"])  # the last sample's
