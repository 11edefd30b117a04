"""What the layer norm's kernels read and write, address by address, counted in Triton's interpreter.

Every element of x, delta, out and total moves exactly once forward, and of d out, d total, total and d x backward.
"""

import numpy as np
import pytest
import torch

from tests.helpers import MODE, allocating, poisoned_empty

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(MODE not in ("interpreter", "guard"), reason="counted in the interpreter")

if MODE in ("interpreter", "guard"):
    from hyperclip_fast.bench.accesses import accesses
    from hyperclip_fast.kernels.common.launch import REDUCE_CONFIG, reduce_partials
    from hyperclip_fast.kernels.layer_norm import add_layer_norm, layer_norm
    from hyperclip_fast.kernels.layer_norm import launch as layer_norm_launch
    from hyperclip_fast.kernels.layer_norm.triton_kernels import _bwd_kernel, _fwd_kernel


def assert_once(log, kind, **tensors):
    for name, tensor in tensors.items():
        assert np.array_equal(log.of(kind, tensor), np.arange(tensor.numel())), f"{name}: not one {kind} an element"


def assert_never(log, kind, **tensors):
    for name, tensor in tensors.items():
        assert len(log.of(kind, tensor)) == 0, f"{name}: unexpected {kind}"


B, N, D, T = 3, 37, 40, 4  # tiles with a tail in N and in D


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, N, D), "delta": (B, N, D), "weight": (T, D), "bias": (T, D)}
    leaves = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    return leaves, torch.tensor([2, 0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_moves_each_element_once(tensors, dtype, triton_backend):
    leaves, task_ids = tensors
    x, delta = leaves["x"].detach().to(dtype), leaves["delta"].detach().to(dtype)
    rows = [leaves[name].detach() for name in ("weight", "bias")]
    with accesses() as log:
        out, total = add_layer_norm(x, delta, *rows, task_ids)
    assert_once(log, "load", x=x, delta=delta)
    assert_once(log, "store", out=out, total=total)
    assert_never(log, "load", out=out, total=total)
    assert log.total("store") == 2 * x.numel()
    tiles = B * -(-N // layer_norm_launch.layer_norm_tiles(D)[1][0])
    assert log.total("load") == 2 * x.numel() + tiles * (1 + 2 * D)  # a task id and two rows a tile

    with accesses() as log:
        out = layer_norm(x, *rows, task_ids)
    assert_once(log, "load", x=x)
    assert_once(log, "store", out=out)
    assert log.total("store") == x.numel()


def test_task_id_out_of_range_reads_no_row(tensors, triton_backend):
    x, _, weight, bias = (leaf.detach() for leaf in tensors[0].values())
    with accesses() as log:  # which raises for an access outside the tensors
        layer_norm(x, weight, bias, torch.tensor([0, T, -1]))
    tiles = -(-N // layer_norm_launch.layer_norm_tiles(D)[1][0])
    for rows in (weight, bias):
        assert np.array_equal(log.of("load", rows), np.repeat(np.arange(D), tiles))


def test_backward_moves_each_element_once(tensors, triton_backend):
    leaves, task_ids = tensors
    allocated = []

    def remembering_empty(*shape, **options):
        allocated.append(poisoned_empty(*shape, **options))
        return allocated[-1]

    with allocating(remembering_empty):
        out, total = add_layer_norm(*leaves.values(), task_ids)
        heads = torch.randn(B, N, D), torch.randn(B, N, D)
        kept, allocated = allocated[2:], []
        with accesses() as log:
            grads = torch.autograd.grad((out, total), list(leaves.values()), heads)
    assert_once(log, "load", total=total, grad_out=heads[0], grad_total=heads[1], mean=kept[0], rstd=kept[1])
    assert_never(log, "load", out=out)
    assert_once(log, "store", grad_x=grads[0])
    used = task_ids.unique()
    for rows in grads[2:]:  # a memset has written all T rows, the kernel those of the batch's tasks, once each
        assert np.array_equal(log.of("store", rows), torch.arange(T * D).view(T, D)[used].flatten().numpy())
    partials = next(tensor for tensor in allocated if tensor.dim() == 4)
    assert_once(log, "store", partials=partials)
    assert_once(log, "load", partials=partials)
    assert log.total("store") == total.numel() + partials.numel() + 2 * len(used) * D


@pytest.mark.parametrize("tasks", [4, 64])
def test_row_gradients_cost_the_same_for_any_number_of_tasks(tasks):
    """Reads and writes of the sum by task, whatever T."""
    partials, ids = torch.randn(2, 6, 3, D), torch.tensor([3, 1, 3, 0, 1, 1])
    weight = torch.zeros(tasks, D)
    with accesses() as log:
        grads = reduce_partials(partials, weight, ids)
    expected = torch.zeros(2, tasks, D).index_add_(1, ids, partials.sum(2))
    torch.testing.assert_close(grads, expected)
    assert log.total("store") == 2 * 3 * D
    assert_once(log, "load", partials=partials)
    programs = 2 * -(-D // REDUCE_CONFIG[2])
    last = {0: 2, 1: 5, 3: 3}  # of the task whose first sample it is
    again = sum(6 - first + last[first] + 1 for first in last)  # ids behind it, then those up to the last
    assert log.total("load") - partials.numel() == programs * (6 + sum(range(6)) + again)  # its own, and those before


def test_backward_writes_a_second_copy_only_for_another_dtype(tensors, triton_backend):
    leaves, task_ids = tensors
    narrow = {**leaves, "delta": leaves["delta"].detach().half().requires_grad_()}
    for inputs, copies in ((leaves, 1), (narrow, 2)):
        frozen = {name: leaf.detach() for name, leaf in inputs.items() if name in ("weight", "bias")}
        arguments = {**inputs, **frozen}
        out, _ = add_layer_norm(**arguments, task_ids=task_ids)
        with accesses() as log:
            grads = torch.autograd.grad(out.sum(), (inputs["x"], inputs["delta"]))
        assert_once(log, "store", grad_x=grads[0], grad_delta=grads[1])
        assert log.total("store") == copies * B * N * D


def test_addresses_beyond_two_to_the_31_elements():
    # The last program of a batch of 2.4e9 elements: nothing is read or written, only the addresses are computed.
    samples, tokens, width = 3, 2**20, 768
    block_d, (block_n, _), (back_n, _) = layer_norm_launch.layer_norm_tiles(width)
    x, delta, out, total, grad_out, grad_x = (torch.zeros(8, dtype=torch.float16) for _ in range(6))
    weight, mean, rstd, partial = (torch.zeros(8) for _ in range(4))
    shared = {"weight": weight, "task_ids": None, "total": total, "mean": mean, "rstd": rstd, "N": tokens, "T": 1}
    shared |= {"weight_stride": 0, "D": width, "BLOCK_D": block_d}
    last = np.arange((samples * tokens - block_n) * width, samples * tokens * width)
    tiles = tokens // block_n
    with accesses(execute=False, first_program=samples * tiles - 1) as log:
        options = {"tiles": tiles, "bias_stride": 0, "eps": 1e-6, "BLOCK_N": block_n, **shared}
        _fwd_kernel[(1,)](x=x, delta=delta, bias=weight, out=out, **options)
    for kind, tensor in (("load", x), ("load", delta), ("store", out), ("store", total)):
        assert any(np.array_equal(np.sort(a - tensor.data_ptr()) // 2, last) for a in log.addresses[kind])

    tiles = tokens // back_n
    last = last[-back_n * width :]
    with accesses(execute=False, first_program=samples * tiles - 1) as log:
        gradients = {"grad_out": grad_out, "grad_total": None, "grad_x": grad_x, "grad_delta": None}
        options = {"partial_weight": partial, "partial_bias": None, "slices": tiles, "BLOCK_N": back_n, **shared}
        _bwd_kernel[(1,)](**gradients, **options)
    for kind, tensor in (("load", grad_out), ("load", total), ("store", grad_x)):
        assert any(np.array_equal(np.sort(a - tensor.data_ptr()) // 2, last) for a in log.addresses[kind])
    expected = np.arange((samples * tiles - 1) * width, samples * tiles * width)
    assert any(np.array_equal(np.sort(a - partial.data_ptr()) // 4, expected) for a in log.addresses["store"])
