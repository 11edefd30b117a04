"""What the batch norm's kernels read and write, address by address, counted in Triton's interpreter.

Every element of x, residual and out moves exactly once in a pass forward, and of d out, x, residual, d x and d residual
in one backward; by the batch's statistics there is one pass more each way, and no more than one.
"""

import numpy as np
import pytest
import torch

from tests.helpers import MODE, allocating, poisoned_empty

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(MODE not in ("interpreter", "guard"), reason="counted in the interpreter")

if MODE in ("interpreter", "guard"):
    from hyperclip_fast.bench.accesses import accesses
    from hyperclip_fast.kernels.batch_norm import batch_norm_act, batch_norm_act_train
    from hyperclip_fast.kernels.batch_norm import launch as batch_norm_launch
    from hyperclip_fast.kernels.batch_norm.triton_kernels import _bwd_kernel, _fwd_kernel
    from hyperclip_fast.kernels.batch_norm.triton_sums import _stats_kernel

B, C, H, W, T = 3, 20, 9, 16, 4  # tiles with a tail in channels and in pixels, in both formats


def assert_moved(log, kind, times=1, **tensors):
    for name, tensor in tensors.items():
        expected = np.repeat(np.arange(tensor.numel()), times)
        assert np.array_equal(log.of(kind, tensor), expected), f"{name}: not {times} {kind}s an element"


def assert_used_rows_stored(log, task_ids, grads) -> int:
    """A memset has written all T rows; the kernel writes those of the batch's tasks, once each. Returns how many."""
    used = task_ids.unique()
    expected = torch.arange(T * C).view(T, C)[used].flatten().numpy()
    for name in ("weight", "bias"):
        assert np.array_equal(log.of("store", grads[name]), expected), name
    return len(used)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def tensors(request):
    generator = torch.Generator().manual_seed(0)
    leaves = {name: torch.randn(B, C, H, W, generator=generator) for name in ("x", "residual")}
    leaves = {name: leaf.contiguous(memory_format=request.param) for name, leaf in leaves.items()}
    leaves |= {name: torch.randn(T, C, generator=generator) for name in ("weight", "bias")}
    head = torch.randn(B, C, H, W, generator=generator).contiguous(memory_format=request.param)
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, torch.tensor([2, 0, 2]), head


STATISTICS = {"mean": torch.zeros(C), "var": torch.ones(C)}


def tile_counts(x):
    """Tiles of a sample, and programs of one slice."""
    layout = batch_norm_launch._layout(x)
    tiles = -(-layout["OUTER"] // layout["BLOCK_O"]) * -(-layout["INNER"] // layout["BLOCK_I"])
    return tiles, batch_norm_launch._slices(x, layout)


@pytest.mark.parametrize("after", [False, True])
def test_forward_moves_each_element_once(tensors, after, triton_backend):
    leaves, task_ids, _ = tensors
    with torch.no_grad(), accesses() as log:
        out = batch_norm_act(**leaves, task_ids=task_ids, **STATISTICS, act="silu", residual_after_act=after)
    assert_moved(log, "load", x=leaves["x"], residual=leaves["residual"])
    assert_moved(log, "load", 0, out=out)
    assert_moved(log, "store", out=out)
    assert log.total("store") == out.numel()
    programs = B * tile_counts(leaves["x"])[0]
    vectors = log.total("load") - 2 * out.numel() - programs  # beside a task id a tile: four rows of its channels
    assert vectors == 4 * B * C * (tile_counts(leaves["x"])[0] // -(-C // tile_channels(leaves["x"])))


def tile_channels(x):
    layout = batch_norm_launch._layout(x)
    return layout["BLOCK_I" if layout["CHANNELS_LAST"] else "BLOCK_O"]


def remembering(allocated):
    def empty(*shape, **options):
        allocated.append(poisoned_empty(*shape, **options))
        return allocated[-1]

    return allocating(empty)


@pytest.mark.parametrize("programs", [1, 64])
def test_backward_moves_each_element_once(tensors, programs, triton_backend, monkeypatch):
    monkeypatch.setattr(batch_norm_launch, "PROGRAMS", programs)
    leaves, task_ids, head = tensors
    out = batch_norm_act(**leaves, task_ids=task_ids, **STATISTICS, act="silu")
    allocated = []
    with remembering(allocated), accesses() as log:
        grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), head)))
    assert_moved(log, "load", x=leaves["x"], residual=leaves["residual"], grad_out=head)
    assert_moved(log, "load", 0, out=out)
    assert_moved(log, "store", x=grads["x"], residual=grads["residual"])
    used = assert_used_rows_stored(log, task_ids, grads)
    partials = next(tensor for tensor in allocated if tensor.dim() == 4 and tensor.shape[:2] == (2, B))
    assert partials.shape == (2, B, tile_counts(leaves["x"])[1][2], C)
    assert_moved(log, "store", partials=partials)
    assert_moved(log, "load", partials=partials)
    assert log.total("store") == 2 * out.numel() + partials.numel() + 2 * used * C


@pytest.mark.parametrize("act, programs", [("none", 64), ("relu", 1)])
def test_training_takes_one_more_pass_each_way(tensors, act, programs, triton_backend, monkeypatch):
    monkeypatch.setattr(batch_norm_launch, "PROGRAMS", programs)
    leaves, task_ids, head = tensors
    with accesses() as log:
        out, mean, var = batch_norm_act_train(**leaves, task_ids=task_ids, act=act)
    assert_moved(log, "load", 2, x=leaves["x"])
    assert_moved(log, "load", 1, residual=leaves["residual"])
    assert_moved(log, "store", out=out, mean=mean, var=var)
    slices = tile_counts(leaves["x"])[1][2]
    assert log.total("store") == out.numel() + 2 * B * slices * C + 2 * C

    allocated = []
    with remembering(allocated), accesses() as log:
        grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), head)))
    assert_moved(log, "load", 2, x=leaves["x"])
    if act == "none":  # d residual is d out itself
        assert_moved(log, "load", 2, grad_out=head)
        assert_moved(log, "load", 0, residual=leaves["residual"])
        assert torch.equal(grads.pop("residual"), head)
    else:  # the second pass reads d residual, which the first has written
        assert_moved(log, "load", 1, grad_out=head, residual=leaves["residual"], grad_residual=grads["residual"])
    assert_used_rows_stored(log, task_ids, grads)
    assert_moved(log, "store", **{name: grad for name, grad in grads.items() if name in ("x", "residual")})


def test_task_id_out_of_range_reads_no_row(tensors, triton_backend):
    leaves, _, _ = tensors
    with torch.no_grad(), accesses() as log:  # which raises for an access outside the tensors
        batch_norm_act(**leaves, task_ids=torch.tensor([0, T, -1]), **STATISTICS)
    for rows in (leaves["weight"], leaves["bias"], STATISTICS["mean"], STATISTICS["var"]):
        assert set(log.of("load", rows)) == set(range(C))
    with accesses():
        out, *_ = batch_norm_act_train(**leaves, task_ids=torch.tensor([0, T, -1]))
        out.sum().backward()


@pytest.mark.parametrize("last", [False, True])
def test_addresses_beyond_two_to_the_31_elements(last):
    # The last program of a batch of 2.6e9 elements: nothing is read or written, only the addresses are computed.
    samples, channels, pixels = 3 * 2**10, 256, 56 * 64
    outer, inner = (pixels, channels) if last else (channels, pixels)
    block_o, block_i, _ = batch_norm_launch.batch_norm_tiles(inner)
    block_c, block_s = (block_i, block_o) if last else (block_o, block_i)
    streams = {
        n: torch.zeros(8, dtype=torch.float16) for n in ("x", "residual", "out", "grad_out", "grad_x", "grad_res")
    }
    vector, partial_weight, partial_bias = (torch.zeros(8) for _ in range(3))
    shared = {"x": streams["x"], "OUTER": outer, "INNER": inner, "CHANNELS_LAST": last}
    shared |= {"BLOCK_O": block_o, "BLOCK_I": block_i}
    norm = {"weight": vector, "bias": vector, "task_ids": None, "mean": vector, "var": vector, "T": 1, "eps": 1e-5}
    norm |= {"weight_stride": 0, "bias_stride": 0, "stats_stride": 0, "residual": streams["residual"]}
    start = (samples * outer - block_o) * inner + inner - block_i
    expected = (start + np.arange(block_o)[:, None] * inner + np.arange(block_i)).reshape(-1)

    def check(log, kind, tensor, addresses, size):
        assert any(np.array_equal(np.sort(a - tensor.data_ptr()) // size, addresses) for a in log.addresses[kind])

    tiles = outer // block_o * (inner // block_i)
    with accesses(execute=False, first_program=samples * tiles - 1) as log:
        _fwd_kernel[(1,)](out=streams["out"], ACT="none", RESIDUAL_AFTER=False, **norm, **shared)
    for kind, name in (("load", "x"), ("load", "residual"), ("store", "out")):
        check(log, kind, streams[name], expected, 2)

    slices = pixels // block_s
    cut = {"chunk": 1, "slices": slices}
    last_program = samples * slices * (channels // block_c) - 1
    lines = np.arange(samples * slices * channels - block_c, samples * slices * channels)
    with accesses(execute=False, first_program=last_program) as log:
        gradients = {"grad_out": streams["grad_out"], "grad_x": streams["grad_x"], "grad_residual": streams["grad_res"]}
        partials = {"sums": vector, "partial_weight": partial_weight, "partial_bias": partial_bias}
        _bwd_kernel[(1,)](ACT="relu", **gradients, **partials, **norm, **shared, **cut)
    for kind, name in (
        ("load", "x"),
        ("load", "residual"),
        ("load", "grad_out"),
        ("store", "grad_x"),
        ("store", "grad_res"),
    ):
        check(log, kind, streams[name], expected, 2)
    check(log, "store", partial_weight, lines, 4)
    check(log, "store", partial_bias, lines, 4)

    with accesses(execute=False, first_program=last_program) as log:
        _stats_kernel[(1,)](partial_mean=partial_weight, partial_m2=partial_bias, **shared, **cut)
    check(log, "load", streams["x"], expected, 2)
    check(log, "store", partial_weight, lines, 4)
    check(log, "store", partial_bias, lines, 4)
