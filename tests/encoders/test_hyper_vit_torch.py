"""HyperViT under PyTorch's transformations: checkpointing, autocast, half precision, torch.compile, torch.export."""

import copy
import io
import pickle

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from hyperclip_fast import NormParams
from tests.encoders.vit_cases import OPTIONS, assert_same, gradients, hyper_pair, make_images, random_rows

MIX = [3, 1, 0, 0, 7, 6, 1, 2]


def step(vit, images, rows, bf16=False):
    """Output and every gradient of one training step on a mixed batch."""
    images = images.clone().requires_grad_()
    table = rows.table.clone().requires_grad_()
    vit.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = vit(images, NormParams(rows.spec, table, MIX))
    out.float().square().sum().backward()
    return {"out": out.detach(), "dx": images.grad, "table": table.grad, **gradients(vit)}


@pytest.fixture(params=[False, True], ids=["non_reentrant", "reentrant"])
def reentrant(request):
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield request.param
    set_reentrant_ckpt(before)


@pytest.mark.parametrize("bf16", [False, True], ids=["f32", "autocast"])
@pytest.mark.parametrize("option", ["token", "avg", "layer_scale", "map"])
def test_checkpointing_changes_no_gradient(option, bf16, reentrant):
    _, vit = hyper_pair(option, drop_path_rate=0.3, proj_drop_rate=0.1)
    images, rows = make_images(option), random_rows(vit.norm_spec)
    plain = step(vit.train(), images, rows, bf16)
    vit.set_grad_checkpointing()
    calls = []
    vit.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    assert_same(step(vit, images, rows, bf16), plain)
    assert len(calls) == 2  # forward and recomputation: it was checkpointed


def test_checkpointing_with_a_frozen_encoder(reentrant):
    """The rows alone need gradients: reentrant checkpointing must still see them among the block's arguments."""
    _, vit = hyper_pair("token")
    vit.requires_grad_(False).set_grad_checkpointing()
    images, rows = make_images(), random_rows(vit.norm_spec)
    tables = []
    for enable in (True, False):
        vit.set_grad_checkpointing(enable)
        tables.append(rows.table.clone().requires_grad_())
        vit(images, NormParams(rows.spec, tables[-1], MIX)).square().sum().backward()
    assert tables[0].grad.abs().max() > 0
    assert torch.equal(tables[0].grad, tables[1].grad)


def test_checkpointing_of_intermediates():
    _, vit = hyper_pair("token")
    images, rows = make_images(), random_rows(vit.norm_spec)[MIX]
    grads = []
    for enable in (False, True):
        vit.zero_grad()
        vit.set_grad_checkpointing(enable)
        final, taken = vit.forward_intermediates(images, norm=True, params=rows)
        (final.sum() + sum(tokens.square().sum() for tokens in taken)).backward()
        grads.append(gradients(vit))
    assert_same(*grads)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast_rounds_as_timm_does(option, dtype):
    stock, vit = hyper_pair(option)
    images = make_images(option)
    with torch.autocast("cpu", dtype):
        ref, out, based = stock(images), vit(images), vit(images, vit.base_params)
        tokens, ref_tokens = vit.forward_features(images), stock.forward_features(images)
    assert out.dtype == ref.dtype and torch.equal(out, ref)
    assert tokens.dtype == ref_tokens.dtype and torch.equal(tokens, ref_tokens)
    assert based.dtype == ref.dtype and torch.equal(based, ref)


@pytest.mark.parametrize("option", ["token", "layer_scale"])
def test_autocast_of_a_stream_in_half_precision(option):
    """Without class token and position embedding nothing widens the residual stream."""
    stock, vit = hyper_pair(option, class_token=False, pos_embed="none", global_pool="avg")
    with torch.autocast("cpu", torch.bfloat16):
        ref, out = stock(make_images()), vit(make_images())
    assert out.dtype == ref.dtype and torch.equal(out, ref)


def test_autocast_leaves_float64_alone():
    stock, vit = hyper_pair("token", dtype=torch.float64)
    images = make_images(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out, mixed = vit(images), vit(images, random_rows(vit.norm_spec, dtype=torch.float64)[MIX])
        assert torch.equal(out, stock(images))
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("option", OPTIONS)
def test_model_in_bfloat16(option):
    stock, vit = hyper_pair(option, dtype=torch.bfloat16)
    images = make_images(option, dtype=torch.bfloat16)
    out = vit(images)
    assert out.dtype == torch.bfloat16 and torch.equal(out, stock(images))


@pytest.mark.parametrize("mode", ["model", "autocast"])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16], ids=["rows_f32", "rows_bf16"])
def test_mixed_batch_in_bfloat16(mode, row_dtype):
    """No further from float32 than a stock model with the row in bfloat16 is: a few units of bfloat16."""
    _, vit = hyper_pair("token")
    images, rows = make_images(), random_rows(vit.norm_spec)[MIX]
    rows = rows.to(dtype=row_dtype)
    ref = vit.double()(images.double(), rows.to(dtype=torch.float64))
    if mode == "model":
        out = vit.bfloat16()(images.bfloat16(), rows)
        assert out.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = vit.float()(images, rows)
    error = (out - ref).square().mean().sqrt() / ref.square().mean().sqrt()
    assert 1e-4 < error < 2e-2


def compiled(function, backend="aot_eager"):
    """The function compiled with a dynamic batch, and the counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


def batches(spec):
    """Batches of other sizes, table sizes and ids; no size equals another one of the model, which would tie them."""
    for batch, tasks, seed in ((5, 9, 0), (6, 11, 1), (6, 11, 2), (10, 2, 3)):
        rows = random_rows(spec, tasks, seed)
        rows.table.requires_grad_()
        ids = torch.randint(0, tasks, (batch,), generator=torch.Generator().manual_seed(seed))
        yield make_images(batch=batch, seed=seed), rows, ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "option"), [("aot_eager", "token"), ("aot_eager", "layer_scale"), ("inductor", "avg")]
)
def test_compile_with_dynamic_batch_and_no_recompilation(backend, option):
    _, vit = hyper_pair(option, depth=1)
    run, counter = compiled(vit, backend)
    frames = set()
    for images, rows, ids in batches(vit.norm_spec):
        tables = []
        for function in (run, vit):
            rows.table.grad = None
            out = function(images, rows[ids])
            out.square().sum().backward()
            tables.append({"out": out, "grad": rows.table.grad})
        frames.add(counter.frame_count)
        for ours, ref in zip(tables[0].values(), tables[1].values()):
            assert (ours - ref).abs().max() <= 1e-5 * ref.abs().max()
    assert len(frames) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_compile_in_16_bits_is_as_exact_as_eager(dtype):
    """float16, which only serves, without gradients."""
    _, vit = hyper_pair("avg", depth=1)
    images, rows, ids = next(batches(vit.norm_spec))
    results = {}
    for name, kind in (("exact", torch.float64), ("eager", dtype), ("compiled", dtype)):
        encoder = vit.to(kind)
        table = rows.table.detach().to(kind).requires_grad_()
        run = compiled(encoder, "inductor")[0] if name == "compiled" else encoder
        with torch.set_grad_enabled(dtype is torch.bfloat16):
            out = run(images.to(kind), NormParams(rows.spec, table, ids))
        results[name] = [out.detach().double()]
        if out.requires_grad:
            out.square().sum().backward()
            results[name].append(table.grad.double())
    for exact, eager, ours in zip(*results.values()):
        assert (ours - exact).norm() <= 1.2 * (eager - exact).norm()


def test_compile_keeps_the_widths_static():
    """Only B and T are symbols: a symbol for each width would cost guards on every call and slower kernels."""
    _, vit = hyper_pair(depth=1)
    symbols = []

    def backend(graph, inputs):
        symbols.extend(value for value in inputs if isinstance(value, torch.SymInt))
        return graph

    images, rows, ids = next(batches(vit.norm_spec))
    torch._dynamo.reset()
    torch.compile(vit, fullgraph=True, dynamic=True, backend=backend)(images, rows[ids])
    assert {int(symbol) for symbol in symbols} == {len(ids), rows.num_tasks}


@pytest.mark.slow
def test_compile_takes_rows_indexed_inside():
    _, vit = hyper_pair(depth=1)
    run, counter = compiled(lambda images, rows, ids: vit(images, rows[ids]))
    frames = set()
    for images, rows, ids in batches(vit.norm_spec):
        assert (run(images, rows, ids) - vit(images, rows[ids])).abs().max() <= 1e-5
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.slow
def test_compile_of_checkpointed_blocks():
    _, vit = hyper_pair()
    vit.set_grad_checkpointing()
    run, _ = compiled(vit)
    images, rows, ids = next(batches(vit.norm_spec))
    run(images, rows[ids]).sum().backward()
    grad, rows.table.grad = rows.table.grad, None
    vit(images, rows[ids]).sum().backward()
    assert (grad - rows.table.grad).abs().max() <= 1e-5 * grad.abs().max()


class Exportable(nn.Module):
    """A HyperViT whose inputs are plain tensors."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images, table, task_ids):
        return self.vit(images, NormParams(self.vit.norm_spec, table, task_ids))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("form", ["tensors", "params"])
def test_export_with_dynamic_batch(form, strict):
    _, vit = hyper_pair()
    batch, tasks = Dim("batch", min=2, max=512), Dim("tasks", min=2, max=4096)
    images, rows, ids = next(batches(vit.norm_spec))
    if form == "tensors":
        model, args = Exportable(vit), (images, rows.table.detach(), ids)
        shapes = ({0: batch}, {0: tasks}, {0: batch})
    else:
        model, args = vit, (images, NormParams(rows.spec, rows.table.detach(), ids))
        shapes = ({0: batch}, [{0: tasks}, {0: batch}])
    program = torch.export.export(model, args, dynamic_shapes=shapes, strict=strict).module()
    for images, rows, ids in batches(vit.norm_spec):
        args = (rows.table, ids) if form == "tensors" else (rows[ids],)
        assert torch.equal(program(images, *args), vit(images, rows[ids]))


def test_exported_program_saves_and_loads():
    _, vit = hyper_pair()
    images, rows, ids = next(batches(vit.norm_spec))
    program = torch.export.export(Exportable(vit), (images, rows.table.detach(), ids))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(images, rows.table, ids.flip(0)), vit(images, rows[ids.flip(0)]))


def reload(vit):
    file = io.BytesIO()
    torch.save(vit, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda vit: pickle.loads(pickle.dumps(vit)), reload])
def test_copies_are_whole(copier):
    _, vit = hyper_pair("layer_scale")
    images, rows = make_images(), random_rows(vit.norm_spec)[MIX]
    copied = copier(vit)
    assert copied.norm_spec == vit.norm_spec and copied.norm_spec.modulate == vit.norm_spec.modulate
    assert torch.equal(copied(images, rows), vit(images, rows))


def test_hooks_of_modules_are_called():
    """Norms keep their hooks without params; a block's output is the stock block's, and None: nothing left to add."""
    stock, vit = hyper_pair()
    seen = {model: {} for model in (stock, vit)}
    names = ["patch_embed", "blocks.0.norm1", "blocks.0", "blocks.1.attn", "blocks.1.norm2", "blocks.1", "norm", "head"]
    for model in (stock, vit):
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_hook(lambda _, __, out, m=model, n=name: seen[m].__setitem__(n, out))
        model(make_images())
    assert all(seen[vit][name][1] is None for name in ("blocks.0", "blocks.1"))
    ours = {name: out[0] if isinstance(out, tuple) else out for name, out in seen[vit].items()}
    assert_same(ours, seen[stock])
