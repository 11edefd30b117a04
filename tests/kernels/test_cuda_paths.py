"""What the encoder runs on a GPU, found without one: CUDA tensors without data, which refuse to be read.

Dispatch, dtypes, strides and operators are PyTorch's own for CUDA; nothing is computed. The last test needs a GPU.
"""

import contextlib
from unittest import mock

import pytest
import torch
from timm.layers import LayerNormFp32, set_fast_norm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hyperclip_fast import NormParams, hyper_block
from hyperclip_fast.kernels.dispatch import use_triton
from hyperclip_fast.kernels.tables import WIDEST, nvidia_kind
from tests.encoders.vit_cases import hyper_pair, random_rows
from tests.helpers import assert_close

pytest.importorskip("triton")
BATCH, TASKS = 4, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_STREAM = {"class_token": False, "pos_embed": "none", "global_pool": "avg"}  # nothing widens it to float32
STREAMS = {
    "token": {},
    "half": HALF_STREAM,
    "half_pre_norm": {**HALF_STREAM, "pre_norm": True},
    "half_no_fc_norm": {**HALF_STREAM, "fc_norm": False},
    "half_float32_norm": {**HALF_STREAM, "fc_norm": False, "norm_layer": LayerNormFp32},
}


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run; one that leaves the device fails."""

    def __init__(self):
        super().__init__()
        self.names, self.device = [], torch.empty(0).device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            device = tensor.device if isinstance(tensor, torch.Tensor) else self.device
            assert device == self.device, f"{function} gave a tensor on {device}"
        self.names.append(function.name())
        return out

    def ours(self) -> list[str]:
        return [name.removeprefix("hyperclip_fast::") for name in self.names if name.startswith("hyperclip_fast::")]


@contextlib.contextmanager
def fake_h100(*models: nn.Module, autocast: bool = False):
    """Models, and what is made inside, lie on an H100 that is not there; torch.autocast would see that it is not."""
    nvidia_kind.cache_clear()
    with mock.patch("torch.cuda.get_device_capability", lambda _: (9, 0)), FakeTensorMode(), torch.device("cuda"):
        for module in (module for model in models for module in model.modules()):
            for name, old in module._parameters.items():
                if old is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype))
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            nvidia_kind.cache_clear()


def fake_inputs(vit, dtype=torch.float32):
    """Images and rows, one of the batch's three tasks for each image."""
    table = torch.empty(TASKS, vit.norm_spec.num_params)
    images = torch.empty(BATCH, 3, 32, 32, dtype=dtype)
    return images, NormParams(vit.norm_spec, table, torch.empty(BATCH, dtype=torch.int64))


def operators_of(vit, autocast=False, dtype=torch.float32):
    """Our operators in a forward. Any .item(), .cpu(), nonzero or shape that depends on data raises: no graph could
    capture it."""
    with fake_h100(vit, autocast=autocast), torch.no_grad(), Operators() as seen:
        vit(*fake_inputs(vit, dtype=dtype))
    return seen.ours()


@pytest.mark.parametrize("kind", ["autocast", "bf16", "f16", "f32"])
def test_the_table_decides_and_nothing_is_read_back(kind, monkeypatch):
    monkeypatch.setitem(WIDEST["linear_gelu"], "large", 48)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}.get(kind, torch.float32)
    _, vit = hyper_pair("layer_scale", drop_path_rate=0.3, dtype=dtype)
    block = ["layer_norm", "layer_norm"] if kind == "f32" else ["layer_norm", "layer_norm", "linear_gelu"]
    assert operators_of(vit.train(), kind == "autocast", dtype) == block * 2 + ["layer_norm"]
    monkeypatch.setitem(WIDEST["linear_gelu"], "large", 47)
    assert operators_of(vit, kind == "autocast", dtype) == ["layer_norm"] * 5


@pytest.mark.parametrize("autocast", [False, True])
def test_products_write_the_stream_where_the_table_says_so(autocast, monkeypatch):
    for operation in ("linear_add", "linear_gelu"):
        monkeypatch.setitem(WIDEST[operation], "large", 48)
    dtype = torch.float32 if autocast else torch.bfloat16
    _, vit = hyper_pair("layer_scale", drop_path_rate=0.3, dtype=dtype)
    block = ["layer_norm", "linear_add", "layer_norm", "linear_gelu", "linear_add"]
    assert operators_of(vit.train(), autocast, dtype) == block * 2 + ["layer_norm"]
    monkeypatch.setitem(WIDEST["linear_add"], "large", 47)
    assert "linear_add" not in operators_of(vit, autocast, dtype)


def test_backward_reads_nothing_back(triton_backend):
    """On the CPU's fake tensors: autograd's engine asks a GPU's tensors for their stream."""
    _, vit = hyper_pair("layer_scale", drop_path_rate=0.3)
    with FakeTensorMode(allow_non_fake_inputs=True), Operators() as seen:
        images, table = torch.empty(BATCH, 3, 32, 32), torch.empty(BATCH, vit.norm_spec.num_params, requires_grad=True)
        vit.train()(images, NormParams(vit.norm_spec, table)).sum().backward()
    counts = {name: seen.ours().count(f"{name}_backward") for name in ("layer_norm", "linear_gelu", "linear_add")}
    assert counts == {"layer_norm": 5, "linear_gelu": 2, "linear_add": 4}
    assert table.grad.shape == table.shape


@pytest.fixture(params=[False, True], ids=["norm", "fast_norm"])
def fast_norm(request):
    set_fast_norm(request.param)
    yield
    set_fast_norm(False)


@pytest.mark.parametrize("option", [*STREAMS, "avg", "map", "pre_norm", "token_fc_norm", "torch_norm"])
def test_autocast_returns_what_timm_returns(option, fast_norm):
    stock, vit = hyper_pair("token" if option in STREAMS else option, **STREAMS.get(option, {}))
    with fake_h100(stock, vit, autocast=True), torch.no_grad():
        images, params = fake_inputs(vit)
        for name in ("forward_features", "__call__"):
            expected = getattr(stock, name)(images)
            for ours in (getattr(vit, name)(images), getattr(vit, name)(images, params)):
                assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), name


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", ["token", "half"])
def test_any_table_serves_any_model(stream, dtype, table_dtype, autocast):
    """Rows in 16 bits for a float32 stream, and the other way round; the output is timm's."""
    stock, vit = hyper_pair("token" if stream in STREAMS else stream, **STREAMS[stream], dtype=dtype)
    with fake_h100(stock, vit, autocast=autocast), torch.no_grad():
        images, params = fake_inputs(vit, dtype=dtype)
        rows = NormParams(params.spec, params.table.to(table_dtype), params.task_ids)
        assert vit(images, rows).dtype == stock(images).dtype


def test_a_transform_sees_the_plain_formula_and_so_does_compiled_inference(monkeypatch):
    x = fake_like_a_gpus()
    assert use_triton(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(use_triton(x)) or row)(torch.zeros(2, 1))
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "is_tracing", lambda: True)
        seen.append(use_triton(x))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen.append(use_triton(x))
    with torch.no_grad():
        seen.append(use_triton(x))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    seen.append(use_triton(x))
    assert seen == [False, False, True, False, False], "vmap, jit, compiled training, compiled inference, export"


def fake_like_a_gpus():
    with FakeTensorMode():
        return torch.empty(1, 2, 8, device="cuda")


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_attention_copies_nothing_on_a_gpu(kind, monkeypatch):
    """q, k and v go in as strided views of the packed product; the output comes as proj reads it."""
    kernel = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention")

    def attention(q, k, v, attn_mask, dropout_p, is_causal):
        biased = () if kind == "flash" else (attn_mask, False)
        return kernel(q, k, v, *biased, dropout_p, is_causal)[0]

    monkeypatch.setattr(hyper_block.F, "scaled_dot_product_attention", attention)
    _, vit = hyper_pair(dtype=torch.bfloat16)
    attn = vit.blocks[0].attn
    with fake_h100(vit), torch.no_grad(), Operators() as seen:
        packed = attn.qkv(torch.empty(BATCH, 17, 48, dtype=torch.bfloat16))
        hyper_block.run_attention(attn, *packed.unflatten(2, (3, 3, 16)).unbind(2), None, False)
    names = {name.split(".")[0] for name in seen.names}
    assert kernel.default.name() in names
    assert not names & {"aten::clone", "aten::copy_", "aten::contiguous", "aten::cat", "aten::_to_copy"}, names


@pytest.mark.gpu
@pytest.mark.parametrize("widest", [0, 48], ids=["norm_adds", "product_adds"])
def test_a_cuda_graph_replays_with_other_tasks(widest, monkeypatch):
    for kind in WIDEST["linear_add"]:
        monkeypatch.setitem(WIDEST["linear_add"], kind, widest)
    _, vit = hyper_pair("layer_scale", dtype=torch.bfloat16)
    vit, rows = vit.cuda(), random_rows(vit.norm_spec, 8).to("cuda", torch.bfloat16)
    images = torch.randn(BATCH, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([3, 1, 0, 0], device="cuda")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled before the capture
                vit(images, rows[ids])
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = vit(images, rows[ids])
        for other in ([3, 1, 0, 0], [7, 2, 2, 5]):
            ids.copy_(torch.tensor(other))
            graph.replay()
            assert_close(out, vit(images, rows[other]).double())
