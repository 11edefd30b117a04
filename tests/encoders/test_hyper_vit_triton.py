"""HyperViT on the Triton path, its products writing the stream, under PyTorch's transformations."""

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt

from hyperclip_fast import NormParams
from tests.encoders.vit_cases import assert_same, gradients, hyper_pair, random_rows
from tests.helpers import DEVICE, KERNEL_DTYPES, MODE, assert_close, kernel_run, rms

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_backend")
IDS = [2, 0, 2]


def small(dtype=torch.float32, **more):
    """A small encoder on two by two patches, a batch, and rows."""
    _, vit = hyper_pair("layer_scale", img_size=16, **more)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    return vit.to(DEVICE, dtype), images.to(DEVICE, dtype), random_rows(vit.norm_spec, 4)


def step(run, vit, images, rows, half=None):
    """Output and every gradient of a step on a mixed batch."""
    images = images.clone().requires_grad_()
    table = rows.table.to(DEVICE).requires_grad_()
    vit.zero_grad()
    torch.manual_seed(0)
    with torch.autocast(DEVICE, half, enabled=half is not None):
        out = run(images, NormParams(rows.spec, table, IDS))
    out.float().square().sum().backward()
    return {"out": out.detach(), "dx": images.grad, "table": table.grad, **gradients(vit)}


@pytest.fixture(params=[False, True], ids=["non_reentrant", "reentrant"])
def reentrant(request):
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield
    set_reentrant_ckpt(before)


@pytest.mark.parametrize("half", [None, KERNEL_DTYPES[-1]], ids=["f32", "autocast"])
def test_checkpointing_changes_no_gradient(half, reentrant):
    """Recomputed blocks drop the same paths and round the same way."""
    vit, images, rows = small(drop_path_rate=0.5, attn_drop_rate=0.1)
    with kernel_run():
        plain = step(vit.train(), vit, images, rows, half)
        vit.set_grad_checkpointing()
        recomputed = step(vit, vit, images, rows, half)
    if MODE == "gpu":  # where cuDNN's and attention's backwards may add up in another order
        for name, value in plain.items():
            assert_close(recomputed[name], value.double(), name, rms(plain["table"]) * 1e-2)
    else:
        assert_same(recomputed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_compiles_to_one_graph(dtype):
    vit, images, rows = small(dtype, depth=1)
    torch._dynamo.reset()
    run = torch.compile(vit, fullgraph=True, dynamic=True, backend="inductor" if MODE == "gpu" else "aot_eager")
    with kernel_run():
        ours, eager = (step(function, vit, images, rows) for function in (run, vit))
    assert ours.keys() == eager.keys()
    for name, value in eager.items():
        assert_close(ours[name], value.double(), name, rms(eager["table"]) * 1e-2)


def test_traces_in_bfloat16():
    """Nothing runs: the graph of a bfloat16 encoder holds the operators, and its outputs have the right dtypes."""
    vit, images, rows = small(torch.bfloat16, depth=2)
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        out = next(node for node in graph.graph.nodes if node.op == "output").args[0][0]
        assert out.meta["example_value"].dtype == torch.bfloat16
        return lambda *_: (torch.zeros(3, 7),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(vit, fullgraph=True, backend=backend)(images, rows.to(DEVICE)[IDS])
    ours = [name.split(".")[1] for name in names if name.startswith("hyperclip_fast.")]
    sub_layer = ["norm_linear", "linear_add"]
    last_attention = ["layer_norm", "linear_add"]  # its query reads the class token alone, keys and values all
    assert ours == [*sub_layer, *sub_layer, *last_attention, *sub_layer, "layer_norm"]
