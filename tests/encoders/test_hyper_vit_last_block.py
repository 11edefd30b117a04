"""A mixed batch pooled by its class token: the last block computes that token alone, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

from hyperclip_fast import NormParams
from tests.encoders.vit_cases import hyper_pair, make_images, random_rows
from tests.helpers import DEVICE, assert_close

MIX = torch.tensor([2, 0, 0, 1], device=DEVICE)
QUERIES = {"token": 1, "layer_scale": 1, "no_biases": 1, "registers": 1, "token_fc_norm": 1, "quick_gelu": 1, "avg": 17}


@pytest.fixture
def queries(monkeypatch):
    """How many tokens asked in each attention that ran."""
    seen, attention = [], F.scaled_dot_product_attention

    def count(q, *args, **kwargs):
        seen.append(q.shape[2])
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    return seen


def make_case(option="token", dtype=torch.float64):
    vit = hyper_pair(option, dtype=dtype)[1].to(DEVICE)
    images = make_images(batch=4, dtype=dtype).to(DEVICE)
    return vit, images, NormParams(vit.norm_spec, random_rows(vit.norm_spec, 3, dtype=dtype).table.to(DEVICE), MIX)


def in_full(vit, images, params, **masks):
    """The head on the features of all tokens."""
    return vit.forward_head(vit.forward_features(images, params, **masks), params=params)


@pytest.mark.parametrize("option", QUERIES)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_outputs_and_gradients_are_those_of_all_tokens(option, checkpointed, queries):
    vit, images, params = make_case(option)
    vit.set_grad_checkpointing(checkpointed)
    params.table.requires_grad_()
    leaves = [params.table, *vit.parameters()]
    out = vit(images, params)
    assert queries[-1] == QUERIES[option] and queries[0] > 1
    expected = in_full(vit, images, params)
    assert_close(out, expected)
    head = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, head, allow_unused=True)
    for ours, full in zip(grads, torch.autograd.grad(expected, leaves, head, allow_unused=True), strict=True):
        assert (ours is None) == (full is None)
        if full is not None:
            assert_close(ours, full)


def test_drop_path_draws_the_same_numbers(queries):
    vit, images, params = make_case()
    for block in vit.train().blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    torch.manual_seed(0)
    out = vit(images, params)
    assert queries[-1] == 1
    torch.manual_seed(0)
    assert_close(out, in_full(vit, images, params))


def listen(vit):
    vit.blocks[-1].mlp.act.register_forward_hook(lambda *_: None)


def drop(vit):
    vit.blocks[-1].attn.proj_drop.p = 0.5
    vit.train()


def replace_product(vit):
    vit.blocks[-1].attn.qkv = torch.nn.Sequential(vit.blocks[-1].attn.qkv)


@pytest.mark.parametrize("change", [listen, drop, replace_product])
def test_what_others_may_see_stays_whole(change, queries):
    vit, images, params = make_case()
    change(vit)
    torch.manual_seed(0)
    out = vit(images, params)
    assert min(queries) > 1
    torch.manual_seed(0)
    assert torch.equal(out, in_full(vit, images, params))


def test_masks_and_single_rows_keep_every_token(queries):
    vit, images, params = make_case()
    tokens = vit.forward_features(images).shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE)
    mask[0, 5:] = False
    queries.clear()
    masked = vit(images, params, attn_mask=mask)
    assert torch.equal(masked, in_full(vit, images, params, attn_mask=mask))
    assert torch.equal(vit(images, params, is_causal=True), in_full(vit, images, params, is_causal=True))
    vit(images), vit(images, vit.base_params)
    assert min(queries) == tokens
