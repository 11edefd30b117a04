"""The last products of a HyperBlock's sub-layers: when they write the stream themselves, and that attention copies
nothing on its way there."""

import copy

import pytest
import torch
from timm.layers import Attention, LayerNorm, RmsNorm
from timm.models.vision_transformer import Block
from torch import nn
from torch.profiler import profile

from hyperclip_fast import hyper_block
from hyperclip_fast.hyper_block import HyperBlock, run_attention
from hyperclip_fast.kernels import dispatch
from hyperclip_fast.kernels.layer_norm import functional as layer_norm
from hyperclip_fast.kernels.norm_linear import functional as norm_linear
from tests.helpers import DEVICE, KERNEL_DTYPES, assert_close, kernel_run

B, N, D, HEADS = 3, 9, 32, 2
OPTIONS = {
    "plain": {},
    "layer_scale": {"init_values": 0.4},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "qk_norm": {"qk_norm": True},
    "norms": {"qk_norm": True, "scale_attn_norm": True},
}
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.eye(N, dtype=torch.bool) | (torch.arange(N) % 3 > 0)},
    "additive": {"attn_mask": torch.linspace(-2, 2, N * N).view(N, N)},
}
LISTENERS = {  # on a block: sub-layers whose product still writes the stream itself
    "a hook on proj": (lambda block: block.attn.proj.register_forward_hook(lambda *_: None), ["mlp"]),
    "a hook on proj_drop": (lambda block: block.attn.proj_drop.register_forward_pre_hook(lambda *_: None), ["mlp"]),
    "a hook on the attention": (lambda block: block.attn.register_forward_hook(lambda *_: None), ["mlp"]),
    "a hook on ls2": (lambda block: block.ls2.register_full_backward_hook(lambda *_: None), ["attn"]),
    "a hook on drop_path2": (lambda block: block.drop_path2.register_forward_hook(lambda *_: None), ["attn"]),
    "a hook on fc1": (lambda block: block.mlp.fc1.register_forward_hook(lambda *_: None), ["attn"]),
    "a forward of proj's own": (lambda block: setattr(block.attn.proj, "forward", block.attn.proj.forward), ["mlp"]),
    "another Linear": (lambda block: setattr(block.mlp, "fc2", type("Lora", (nn.Linear,), {})(4 * D, D)), ["attn"]),
    "another Attention": (lambda block: setattr(block.attn, "__class__", type("My", (Attention,), {})), ["mlp"]),
    "unfused attention": (lambda block: setattr(block.attn, "fused_attn", False), ["mlp"]),
    "another q_norm": (lambda block: setattr(block.attn, "q_norm", RmsNorm(D // HEADS)), ["mlp"]),
    "another LayerScale": (lambda block: setattr(block, "ls1", nn.Sequential()), ["mlp"]),
    "another DropPath": (lambda block: setattr(block, "drop_path2", nn.Dropout(0.5)), ["attn"]),
}
if hasattr(Attention(D, HEADS), "gate"):  # timm 1.0.26 knows no gate
    LISTENERS["gated attention"] = (lambda block: setattr(block.attn, "gate", nn.Linear(D, D)), ["mlp"])


@pytest.fixture
def epilogues(monkeypatch):
    """The sub-layers whose last product was a linear_add, in order."""
    calls, original = [], hyper_block.run_linear_add

    def counting(h, *rest, **more):
        calls.append("mlp" if h.shape[2] == 4 * D else "attn")
        return original(h, *rest, **more)

    monkeypatch.setattr(hyper_block, "run_linear_add", counting)
    return calls


def make(option="plain", **more):
    """A stock block and the HyperBlock with its weights, every one of them random, and a stream."""
    torch.manual_seed(0)
    stock = Block(D, HEADS, **{"qkv_bias": True, "norm_layer": LayerNorm, **OPTIONS[option], **more}).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    hyper = copy.deepcopy(stock)
    hyper.__class__ = HyperBlock
    return stock, hyper.to(DEVICE), torch.randn(B, N, D)


def run(block, x, **masks):
    """The stock block's output and its gradients, from either kind of block."""
    x = x.detach().requires_grad_()
    out = block(x, **{name: mask.to(x.device) if name == "attn_mask" else mask for name, mask in masks.items()})
    if isinstance(out, tuple):
        out, delta = out
        out = out if delta is None else out + delta
    head = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return out.detach(), torch.autograd.grad(out, [x, *block.parameters()], head)


def exact(stock, x, **masks):
    mask = masks.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        masks["attn_mask"] = mask.double()
    return run(copy.deepcopy(stock).double(), x.double(), **masks)


def compare(stock, hyper, x, masks, half=None):
    """A HyperBlock's output and gradients against those of the stock block in float64; under autocast where `half`."""
    with torch.autocast(DEVICE, half, enabled=half is not None), kernel_run():
        out, grads = run(hyper, x.to(DEVICE), **masks)
    assert out.dtype == x.dtype
    expected, expected_grads = exact(stock, x, **masks)
    assert_close(out.to("cpu", half), expected, "out", slack=1 if half is None else 2)
    scale = max(grad.abs().mean().item() for grad in expected_grads)
    for name, ours, reference in zip(["x", *dict(stock.named_parameters())], grads, expected_grads):
        assert_close(ours.to("cpu", half), reference, f"d {name}", scale, slack=1 if half is None else 3)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_products_that_write_the_stream(option, mask, epilogues, triton_backend):
    pytest.importorskip("triton")
    stock, hyper, x = make(option)
    compare(stock, hyper, x, MASKS[mask])
    assert epilogues == ["attn", "mlp"]


def test_the_block_returns_a_stream_without_delta(triton_backend):
    pytest.importorskip("triton")
    _, hyper, x = make()
    with torch.no_grad(), kernel_run():
        out, delta = hyper(x.to(DEVICE))
    assert delta is None and out.dtype == x.dtype


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("option", ["plain", "layer_scale"])
def test_drop_path_draws_what_timm_draws(option, scale_by_keep, epilogues, triton_backend):
    """The same samples lose the same branches under the same seed, also after the attention's own dropout."""
    pytest.importorskip("triton")
    stock, hyper, x = make(option, drop_path=0.5, attn_drop=0.1)
    x = torch.cat([x, x + 1, x - 1])
    if DEVICE == "cpu":
        stock = stock.double()  # a CPU draws the same numbers for float64
    else:
        stock = stock.to(DEVICE)
    streams = []
    for block in (stock, hyper):
        block.train().drop_path1.scale_by_keep = block.drop_path2.scale_by_keep = scale_by_keep
        torch.manual_seed(5)
        with torch.no_grad(), kernel_run():
            out = block(x.to(next(block.parameters())))
        streams.append(out[0] if isinstance(out, tuple) else out)
    assert epilogues == ["attn", "mlp"]
    assert_close(streams[1], streams[0].double())
    kept = (streams[1] != x.to(DEVICE)).flatten(1).any(1)
    assert 0 < kept.sum() < len(x)  # some samples lost both branches


@pytest.mark.parametrize("listener", LISTENERS)
def test_what_is_not_timms_own_or_is_heard_runs_as_it_is(listener, epilogues, triton_backend):
    pytest.importorskip("triton")
    stock, hyper, x = make("layer_scale", drop_path=0.1)
    for block in (stock, hyper):
        torch.manual_seed(1)
        LISTENERS[listener][0](block)
        block.to(DEVICE if block is hyper else "cpu").eval()
    compare(stock, hyper, x, {})
    assert epilogues == LISTENERS[listener][1]


def test_active_dropout_is_left_to_the_modules(epilogues, triton_backend):
    pytest.importorskip("triton")
    _, hyper, x = make(proj_drop=0.1)
    with torch.no_grad(), kernel_run():
        _, delta = hyper.train()(x.to(DEVICE))
    assert epilogues == [] and delta is not None  # the next norm adds it


@pytest.mark.parametrize("stream", [torch.float32, KERNEL_DTYPES[-1]], ids=str)
def test_autocast(stream, epilogues, triton_backend):
    """Products in 16 bits; the stream keeps its dtype."""
    pytest.importorskip("triton")
    stock, hyper, x = make("layer_scale")
    compare(stock, hyper, x.to(stream), {}, half=KERNEL_DTYPES[-1])
    assert epilogues == ["attn", "mlp"]


COPIES = ("aten::clone", "aten::contiguous", "aten::cat", "aten::_to_copy")


def copies(function):
    """Shapes of the tensors that a call copies or concatenates, inside of operators, too."""
    with profile(record_shapes=True) as recorded:
        result = function()
    events = [event for event in recorded.events() if event.name in COPIES]
    inner = {id(child) for event in events for child in event.cpu_children}
    return result, [(event.name, event.input_shapes[0]) for event in events if id(event) not in inner]


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's attention; test_cuda_paths.py has CUDA's")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", ["plain", "norms"])
def test_attention_copies_nothing_on_its_way(option, mask):
    """From the packed product to proj's input, and back but for the one pass that packs d q, d k and d v."""
    _, hyper, x = make(option)
    masks = {"attn_mask": None, "is_causal": False, **MASKS[mask]}
    packed = hyper.attn.qkv(x).unflatten(2, (3, HEADS, D // HEADS))
    h, forward = copies(lambda: run_attention(hyper.attn, *packed.unbind(2), **masks))
    assert_close(hyper.attn.proj(h), hyper.attn(x, **MASKS[mask]).double())
    _, backward = copies(lambda: h.backward(torch.ones_like(h)))
    stacked, inside_norm = ("aten::cat", []), ("aten::contiguous", [B, N, HEADS, D // HEADS])
    norms = [inside_norm] * 2 if option == "norms" else []  # PyTorch's layer norm wants its q, and its k, dense
    assert forward == norms
    assert [copy for copy in backward if copy != inside_norm] == [stacked]


@pytest.fixture
def prologues(monkeypatch):
    """The products that took a norm as their prologue, in order."""
    calls, original = [], hyper_block.run_norm_linear

    def counting(*args, gelu, fused):
        calls.append("norm_linear_gelu" if gelu else "norm_linear")
        return original(*args, gelu=gelu, fused=fused)

    monkeypatch.setattr(hyper_block, "run_norm_linear", counting)
    return calls


@pytest.mark.parametrize("mixed", [False, True], ids=["own", "mixed"])
@pytest.mark.parametrize("option", OPTIONS)
def test_norms_join_the_products_in_inference(option, mixed, prologues, triton_backend):
    pytest.importorskip("triton")
    _, hyper, x = make(option)
    x, rows, task_ids = x.half(), [torch.rand(3, D) for _ in range(4)] if mixed else [None] * 4, torch.tensor([2, 0, 2])
    with torch.no_grad(), kernel_run():
        half = copy.deepcopy(hyper).half()
        out, delta = half(
            x.to(DEVICE), None, *(row if row is None else row.to(DEVICE) for row in rows), task_ids.to(DEVICE)
        )
    assert delta is None and prologues == ["norm_linear", "norm_linear_gelu"]
    exact = half.double().cpu()
    exact.__class__ = Block
    for b in range(B):
        for i, norm in enumerate((exact.norm1, exact.norm2)):
            if mixed:
                norm.weight.data, norm.bias.data = (rows[2 * i + j][task_ids[b]].double() for j in range(2))
        assert_close(out[b : b + 1], exact(x[b : b + 1].double()).detach(), f"sample {b}", slack=2)


STAYS = {
    "a gradient is wanted": lambda block, x: block(x),
    "something is left to add": lambda block, x: no_grad(block, x, x),
    "a hook on qkv and fc1": lambda block, x: (
        [product.register_forward_hook(lambda *_: None) for product in (block.attn.qkv, block.mlp.fc1)]
        and no_grad(block, x)
    ),
}


def no_grad(block, *inputs):
    with torch.no_grad():
        return block(*inputs)


@pytest.mark.parametrize("reason", STAYS)
def test_a_norm_stays_apart_where(reason, prologues, triton_backend):
    pytest.importorskip("triton")
    _, hyper, x = make()
    with kernel_run():
        STAYS[reason](hyper.half(), x.half().to(DEVICE))
    assert prologues == (["norm_linear_gelu"] if "left to add" in reason else [])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_block_asks_once_who_computes(backend, grad, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    _, hyper, x = make()
    asked = []
    for module in (hyper_block, dispatch, layer_norm, norm_linear):
        monkeypatch.setattr(module, "use_triton", lambda x: asked.append(x.shape) or backend == "triton")
    monkeypatch.setattr(dispatch, "_backend", backend)
    with kernel_run(), torch.set_grad_enabled(grad):
        hyper.half()(x.half().to(DEVICE))
    assert asked == [x.shape]
