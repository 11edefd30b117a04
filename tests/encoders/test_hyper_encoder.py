"""HyperEncoder's contracts: rows are never state; every kind of norm; threads, exceptions, checkpoints, compilers."""

import copy
import pickle
import threading
from functools import partial

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm import layers
from torch import nn
from torch.utils.checkpoint import checkpoint

from hyperclip_fast import HyperEncoder, HyperViT, NormParams
from hyperclip_fast.modulated_norms import ROW_NORMS, Rows, bind_rows, precompute_affine
from tests.encoders.encoder_cases import rows_of, small_pair, with_row
from tests.helpers import assert_close

IDS = [2, 0, 0, 1, 2]


def images(batch=5, seed=1, dtype=torch.float64):
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_by_one(stock, x, rows, ids):
    return torch.cat([with_row(stock, rows, task)(image[None]) for image, task in zip(x, ids)])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ROW_NORMS, ids=lambda kind: kind.__name__)
def test_every_kind_of_norm(kind, channels_last):
    """A norm with rows is the norm that holds each sample's row; also where a sample has several pieces."""
    torch.manual_seed(0)
    dtype = torch.float32 if "Fp32" in kind.__name__ else torch.float64
    norm = make_norm(kind).to(dtype).eval()
    first, pieces = ROW_NORMS[kind].channels_first, 3
    shape = {nn.BatchNorm1d: (8, 5)}.get(kind, (8, 4, 5) if first else (4, 5, 8))
    x = torch.randn(4 * pieces, *shape, dtype=dtype)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(3, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    bias = None if getattr(norm, "bias", None) is None else bias
    ids = torch.tensor([2, 0, 0, 1])
    expected = []
    for part, task in zip(x.split(pieces), ids):
        own = copy.deepcopy(norm)
        own.weight.data = weight[task]
        if bias is not None:
            own.bias.data = bias[task]
        expected.append(own(part))
    for rows in (Rows(weight, bias, ids, 4), Rows(weight[ids], None if bias is None else bias[ids], None, 4)):
        assert_close(bind_rows(norm, rows)(x), torch.cat(expected).double(), kind.__name__, slack=10)
    with pytest.raises(ValueError, match="multiple of B = 4"):
        bind_rows(norm, Rows(weight[ids], None if bias is None else bias[ids], None, 4))(x[:-1])


@pytest.mark.parametrize("kind", ROW_NORMS, ids=lambda kind: kind.__name__)
def test_every_kind_of_norm_takes_an_empty_batch(kind):
    norm, shape = make_norm(kind).eval(), (8, 4, 5) if ROW_NORMS[kind].channels_first else (4, 5, 8)
    x = torch.randn(0, *{nn.BatchNorm1d: (8, 5)}.get(kind, shape))
    bias = None if getattr(norm, "bias", None) is None else torch.randn(3, 8)
    for rows in (
        Rows(torch.randn(3, 8), bias, torch.zeros(0, dtype=torch.int64), 0),
        Rows(x.new_ones(0, 8), None, None, 0),
    ):
        with torch.no_grad():
            assert bind_rows(norm, rows)(x).shape == x.shape
        rows.weight.requires_grad_()
        out = bind_rows(norm, rows)(x)
        out.sum().backward()
        assert out.shape == x.shape and rows.weight.grad.shape == rows.weight.shape and not rows.weight.grad.any()
        with pytest.raises(ValueError, match="multiple of B = 0"):
            bind_rows(norm, rows)(torch.cat([x, x.new_ones(2, *x.shape[1:])]))


@pytest.mark.parametrize("kind", ROW_NORMS, ids=lambda kind: kind.__name__)
def test_dtype_under_autocast_is_the_stock_norms(kind):
    torch.manual_seed(0)
    norm = make_norm(kind).eval()
    x = torch.randn(2, *{nn.BatchNorm1d: (8, 5)}.get(kind, (8, 4, 8)), dtype=torch.bfloat16)
    weight = norm.weight.detach().expand(2, 8)
    bias = None if getattr(norm, "bias", None) is None else norm.bias.detach().expand(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, ref = bind_rows(norm, Rows(weight, bias, None, 2))(x), norm(x)
    assert out.dtype == ref.dtype
    assert_close(out.bfloat16(), ref.double(), kind.__name__, slack=2)


def make_norm(kind):
    arguments = {nn.GroupNorm: (4, 8), layers.GroupNorm: (8, 4), layers.GroupNormAct: (8, 4)}.get(kind, (8,))
    norm = kind(*arguments)
    if hasattr(norm, "running_mean"):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    if kind is layers.SyncBatchNormAct:  # made by timm's conversion only
        norm.drop, norm.act = nn.Identity(), nn.SiLU(inplace=True)
    return norm


@settings(max_examples=10)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_any_mix_in_any_order(ids, seed):
    stock, encoder = small_pair()
    x, rows = images(len(ids), seed), rows_of(encoder)
    assert_close(encoder(x, rows[ids]), one_by_one(stock, x, rows, ids), slack=10)
    assert_close(encoder(x, NormParams(rows.spec, rows.table[ids])), one_by_one(stock, x, rows, ids), slack=10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_evaluation_without_gradients(memory_format):
    stock, encoder = small_pair()
    x, rows = images().contiguous(memory_format=memory_format), rows_of(encoder)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        assert_close(encoder(x, rows[ids]), one_by_one(stock, x, rows, IDS), slack=10)
        assert_close(encoder(x[:1], rows[ids[:1]]), one_by_one(stock, x[:1], rows, IDS[:1]), slack=10)
        base = encoder.base_params
        for params in (base, NormParams(base.spec, base.table, torch.zeros_like(ids))):
            assert torch.equal(encoder(x, params), stock(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("eps", [[1e-5, 1e-5], [1e-5, 0.1]])
def test_norms_evaluated_together(eps, dtype):
    """What is made for all BatchNorms at once: each keeps its eps; statistics in the precision of the stock norm."""
    torch.manual_seed(0)
    norms = [make_norm(layers.BatchNormAct2d).eval(), make_norm(nn.BatchNorm2d).eval()]
    weight, bias = torch.randn(2, 4, 8, dtype=dtype), torch.randn(2, 4, 8, dtype=dtype)
    x = torch.randn(4, 8, 5, 5, dtype=dtype)
    twins = []
    for i, norm in enumerate(norms):
        norm.eps = eps[i]
        norm.to(dtype)
        twins.append(bind_rows(norm, Rows(weight[i], bias[i], None, 4), is_plain=True))
    with torch.no_grad():
        precompute_affine(twins)
        for i, (norm, twin) in enumerate(zip(norms, twins)):
            ref = copy.deepcopy(norm).double()
            expected = []
            for b in range(4):
                ref.weight.copy_(weight[i, b])
                ref.bias.copy_(bias[i, b])
                expected.append(ref(x[b : b + 1].double()))
            out = twin(x)
            assert out.dtype == dtype and twin.flat is not None
            assert_close(out, torch.cat(expected), slack=4)


@pytest.mark.parametrize("norm", [layers.BatchNormAct2d, layers.LayerNorm2d, layers.GroupNorm1Act])
def test_no_images(norm):
    stock, encoder = small_pair(norm)
    rows = rows_of(encoder)
    for params in (rows[[]], NormParams(rows.spec, rows.table[:0]), NormParams(rows.spec, rows.table[:1])):
        with torch.no_grad():
            assert torch.equal(encoder(images(0), params), stock(images(0)))
        assert torch.equal(encoder(images(0), params), stock(images(0)))


def test_threads_never_mix():
    stock, encoder = small_pair()
    x, rows, wrong = images(), rows_of(encoder, 8), []

    def work(task):
        ids = [task] * len(x) if task % 2 else [task, *IDS[1:]]
        expected = one_by_one(stock, x, rows, ids)
        for _ in range(20):
            if (encoder(x, rows[ids]) - expected).abs().max() > 1e-12:
                wrong.append(task)

    threads = [threading.Thread(target=work, args=(task,)) for task in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_pass_within_a_pass_keeps_its_own_rows():
    stock, encoder = small_pair()
    x, rows = images(), rows_of(encoder)
    inner = []

    def interleave(module, args, output):
        if not inner:
            inner.append(None)
            inner.append(encoder(x, rows[[1] * 5]))

    encoder.blocks[0].register_forward_hook(interleave)
    out = encoder(x, rows[IDS])
    assert_close(out, one_by_one(stock, x, rows, IDS), slack=10)
    assert_close(inner[1], one_by_one(stock, x, rows, [1] * 5), slack=10)


def test_an_exception_leaves_nothing_behind():
    stock, encoder = small_pair()
    x, rows = images(), rows_of(encoder)
    before = {name: dict(vars(module)) for name, module in encoder.named_modules()}
    handle = encoder.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(x, rows[IDS])
    handle.remove()
    for name, module in encoder.named_modules():
        assert vars(module).keys() == before[name].keys(), name
    assert torch.equal(encoder(x), stock(x))
    assert_close(encoder(x, rows[IDS]), one_by_one(stock, x, rows, IDS), slack=10)


def run_checkpointed(training, use_reentrant):
    """Gradients of table, images and weights; the blocks run under a checkpoint unless `use_reentrant` is None."""
    _, encoder = small_pair()
    rows, x = rows_of(encoder), images().requires_grad_()
    table = rows.table.requires_grad_()
    if use_reentrant is not None:
        kind = type(encoder.blocks)
        fields = {"forward": lambda self, x: checkpoint(partial(kind.forward, self), x, use_reentrant=use_reentrant)}
        encoder.blocks.__class__ = type("Checkpointed", (kind,), fields)
    encoder.train(training)(x, rows[IDS]).square().sum().backward()
    weights = [p.grad for name, p in encoder.named_parameters() if name not in rows.spec.keys]
    return [table.grad, x.grad, *weights]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_under_checkpointing(training):
    for ours, ref in zip(run_checkpointed(training, False), run_checkpointed(training, None), strict=True):
        assert torch.equal(ours, ref) and ref.any()
    with pytest.raises(RuntimeError, match="a second time"):  # reentrant: refused by PyTorch, not computed wrongly
        run_checkpointed(training, True)


def test_rows_in_another_dtype_and_under_autocast():
    stock, encoder = small_pair(dtype=torch.float32)
    x, rows = images(dtype=torch.float32), rows_of(encoder)
    expected = one_by_one(stock.double(), x.double(), rows.to(dtype=torch.float64), IDS)
    assert_close(encoder(x, rows.to(dtype=torch.float64)[IDS]), expected, slack=10)
    narrow = rows.to(dtype=torch.bfloat16)
    expected = one_by_one(stock, x.double(), narrow.to(dtype=torch.float64), IDS)
    assert_close(encoder(x, narrow[IDS]), expected, slack=10)
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(x, narrow[IDS])
        assert out.dtype == encoder(x).dtype
    assert_close(out, expected, slack=5)
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    assert_close(half(x.bfloat16(), rows[IDS]).bfloat16(), one_by_one(stock, x.double(), rows, IDS), slack=10)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="older releases cannot trace a module's copy"
)
@pytest.mark.parametrize("norm", [layers.BatchNormAct2d, layers.LayerNorm2d])
def test_compile_and_export(norm):
    _, encoder = small_pair(norm, torch.float32)
    rows = rows_of(encoder)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager", dynamic=True)
    for training in (False, True) if norm is layers.BatchNormAct2d else (False,):
        encoder.train(training)
        for ids in (IDS, [1, 0, 3]):
            x = images(len(ids), dtype=torch.float32)
            before = copy.deepcopy(encoder)
            table = rows.table.clone().requires_grad_()
            out = compiled(x, NormParams(rows.spec, table, torch.tensor(ids)))
            (grad,) = torch.autograd.grad(out.sum(), table)
            own = rows.table.clone().requires_grad_()
            ref = before(x, NormParams(rows.spec, own, torch.tensor(ids)))
            assert_close(out, ref.double(), slack=10)
            assert_close(grad, torch.autograd.grad(ref.sum(), own)[0].double(), slack=100)
            for ours, eager in zip(encoder.buffers(), before.buffers()):
                assert torch.allclose(ours, eager, rtol=1e-5)
    batch = torch.export.Dim("B")
    shapes = {"x": {0: batch}, "params": [{0: torch.export.Dim("T")}, {0: batch}]}
    program = torch.export.export(encoder.eval(), (images(dtype=torch.float32), rows[IDS]), dynamic_shapes=shapes)
    x, ids = images(3, dtype=torch.float32), [1, 3, 0]
    assert_close(
        program.module()(x, NormParams(rows.spec, rows.table[:4], torch.tensor(ids))), encoder(x, rows[ids]).double()
    )


def test_hooks_and_replaced_parts():
    stock, encoder = small_pair()
    x, rows, seen = images(), rows_of(encoder), []
    encoder.blocks[0][1].register_forward_hook(lambda module, args, out: seen.append(out))
    encoder(x, rows[IDS])
    assert len(seen) == 1
    assert_close(encoder(x, rows[IDS]), one_by_one(stock, x, rows, IDS), slack=10)
    encoder.blocks[0].compile(backend="eager")  # its own compilation would run the original's norms
    assert_close(encoder(x, rows[IDS]), one_by_one(stock, x, rows, IDS), slack=10)
    encoder.blocks[1].forward = encoder.blocks[1].forward
    with pytest.raises(ValueError, match=r"params cannot pass 1 \(Sequential\), whose forward was replaced"):
        encoder(x, rows[IDS])


def test_a_norm_used_twice_has_its_row_in_both_places():
    stock, _ = small_pair()
    stock.blocks[1][1] = stock.norm
    encoder, x = HyperEncoder.from_timm(stock), images()
    rows = rows_of(encoder)
    assert rows.spec.names == ("norm", "blocks.0.1")
    assert_close(encoder(x, rows[IDS]), one_by_one(stock, x, rows, IDS), slack=10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(copied):
    _, encoder = small_pair()
    x, rows = images(), rows_of(encoder)
    twin = copied(encoder)
    assert type(twin) is type(encoder) and twin.norm_spec == encoder.norm_spec
    assert torch.equal(twin(x, rows[IDS]), encoder(x, rows[IDS]))
    with torch.no_grad():
        twin.norm.weight.add_(1)
    assert not torch.equal(twin(x), encoder(x))


def test_modulate_chooses_by_name():
    stock, encoder = small_pair()
    encoder.set_modulate(["blocks.*"])
    assert encoder.norm_spec.names == ("blocks.0.1", "blocks.1.1") and encoder.norm_spec.modulate == ("blocks.*",)
    x, rows = images(), rows_of(encoder)
    assert_close(encoder(x, rows[IDS]), one_by_one(stock, x, rows, IDS), slack=10)
    for modulate in (["conv"], ["*", "blocks.7.*"], []):
        with pytest.raises(ValueError, match="modulate must match norms of Small"):
            encoder.set_modulate(modulate)


def test_methods_of_timm_take_params():
    encoder = HyperEncoder.from_timm("tinynet_e", num_classes=5).eval()
    rows, x = rows_of(encoder)[IDS], torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        out = encoder(x, rows)
        features = encoder.forward_features(x, rows)
        assert torch.equal(encoder.forward_head(features, params=rows), out)
        final, taken = encoder.forward_intermediates(x, indices=2, params=rows)
        assert torch.equal(final, features) and len(taken) == 2
        assert not torch.equal(encoder.forward_features(x), features)
    maps = HyperEncoder.from_timm(timm.create_model("resnet18", features_only=True)).eval()
    assert [len(each) for each in maps(x, rows_of(maps)[IDS])] == [5] * 5
    assert not hasattr(maps, "forward_head")


def test_bad_input_is_refused():
    _, encoder = small_pair()
    x, rows = images(), rows_of(encoder)
    with pytest.raises(ValueError, match="params must be NormParams, got Tensor"):
        encoder(x, rows.table)
    with pytest.raises(ValueError, match="batch of 5 images, got rows for 2"):
        encoder(x, rows[[0, 1]])
    other = HyperEncoder.from_timm("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="this encoder's spec"):
        encoder(x, other.base_params)
    with pytest.raises(ValueError, match="timm knows"):
        HyperEncoder.from_timm("efficientnet_b00")
    with pytest.raises(ValueError, match="go with a model's name"):
        HyperEncoder.from_timm(other, pretrained=True)
    with pytest.raises(ValueError, match="HyperViT"):
        HyperEncoder.from_timm(HyperViT(img_size=16, embed_dim=24, depth=1, num_heads=2))
