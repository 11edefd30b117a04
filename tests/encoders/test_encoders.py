"""Every named encoder: the stock model bit for bit, and each image as if its own stock model had run it."""

import copy

import pytest
import torch
from timm.models import VisionTransformer

from hyperclip_fast import HyperEncoder, HyperViT, NormParams
from hyperclip_fast.bench.cases.towers import NaiveTower
from tests.encoders.encoder_cases import FAMILIES, MIX, NAMED, encoder_of, images_of, rows_of, stock_model, with_row
from tests.helpers import assert_close


@pytest.mark.parametrize("name", NAMED)
def test_named_encoder(name):
    stock, images = stock_model(name), images_of(name)
    encoder = encoder_of(stock)
    is_vit = isinstance(stock, VisionTransformer)
    assert isinstance(encoder, HyperViT if is_vit else HyperEncoder) and isinstance(encoder, type(stock))
    assert encoder.norm_spec.num_params == NAMED[name][1]
    assert list(encoder.state_dict()) == list(stock.state_dict())
    rows = rows_of(encoder)
    table = rows.table.requires_grad_()
    out = encoder(images, rows[MIX])
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    (grad,) = torch.autograd.grad(out, table, incoming)
    assert not grad[2].any()  # no image uses it
    with torch.no_grad():
        ref = stock(images)
        assert torch.equal(encoder(images), ref)
        assert torch.equal(encoder(images, encoder.base_params), ref)
        mixed_base = NormParams(rows.spec, encoder.base_params.table.expand(4, -1))
        assert_close(encoder(images, mixed_base[MIX]), ref, "base row", slack=10)
    for task in set(MIX):
        model, mine = with_row(stock, rows, task), [i for i, each in enumerate(MIX) if each == task]
        ref = model(images[mine])
        keys = dict(model.named_parameters())
        grads = torch.autograd.grad(ref, [keys[key] for key in rows.spec.keys], incoming[mine], allow_unused=True)
        grads = [keys[key].new_zeros(keys[key].shape) if g is None else g for key, g in zip(rows.spec.keys, grads)]
        assert_close(out[mine], ref, f"{name} task {task}", slack=10)
        assert_close(grad[task], torch.cat(grads), f"{name} d row {task}", slack=100)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_step_with_and_without_checkpointing(name):
    stock, images = copy.deepcopy(stock_model(name)), images_of(name)
    stock.set_grad_checkpointing(False)
    results = []
    for kind in ("naive", "ours", "checkpointed"):
        encoder = encoder_of(stock).train()
        encoder.set_grad_checkpointing(kind == "checkpointed")
        rows = rows_of(encoder)
        table, ids = rows.table.requires_grad_(), torch.tensor(MIX)
        torch.manual_seed(4)
        model = copy.deepcopy(stock).train()
        out = NaiveTower(model, rows.spec)(images, table, ids) if kind == "naive" else encoder(images, rows[MIX])
        weights = dict((model if kind == "naive" else encoder).named_parameters())
        leaves = [table, *(weight for key, weight in weights.items() if key not in rows.spec.keys)]
        out.square().mean().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours in results[1:]:
        for got, ref in zip(ours, results[0], strict=True):
            assert_close(got, ref, name, scale=results[0][1].abs().max().item(), slack=1000)
