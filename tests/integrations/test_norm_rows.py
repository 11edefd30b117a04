"""Rows that no hypernetwork made: from state dicts, models and peft's LN-tuning adapters, and back."""

import pytest
import timm
import torch

from examples.thousand_norm_sets import Tasks, accuracy, fine_tune, serve
from hyperclip_fast import HyperViT, NormParams, NormSpec, TaskBank
from hyperclip_fast.data.augmentation import resize, to_rgb
from hyperclip_fast.integrations.peft import load_ln_adapters, save_ln_adapter
from hyperclip_fast.integrations.transformers_names import timm_name, timm_norms
from tests.towers import patch_text_tower, tiny_model

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
KINDS = ("weight", "bias")
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def stock(state_dict=None):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    model.load_state_dict(state_dict or model.state_dict())
    return model


def tuned(seed):
    """A stock model whose norms moved."""
    model, generator = stock(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_models_become_rows_of_one_batch():
    models = [tuned(seed) for seed in range(3)]
    vit = HyperViT.from_timm(stock())
    norms_only = {name: tensor for name, tensor in models[1].state_dict().items() if "norm" in name}
    params = NormParams.from_state_dict(models[0], norms_only, models[2].state_dict(), shared=vit)
    assert params.spec == vit.norm_spec and params.num_tasks == 3 and not params.table.requires_grad
    ids = [2, 0, 1, 1, 0, 2]
    with torch.no_grad():
        out = vit(IMAGES, params[ids])
        for image, i, ours in zip(IMAGES, ids, out):
            torch.testing.assert_close(ours, models[i](image[None])[0], atol=1e-5, rtol=1e-4)
            again = stock({**stock().state_dict(), **params.state_dict(i)})
            assert torch.equal(again(image[None]), models[i](image[None]))


def test_the_spec_is_found_in_the_keys():
    model = tuned(0)
    assert NormSpec.from_state_dict(model.state_dict()) == NormSpec.from_model(model)
    only = NormSpec.from_state_dict(model.state_dict(), ["blocks.1.norm?"])
    assert only.names == ("blocks.1.norm1", "blocks.1.norm2") and only.widths == (32, 32)
    assert NormParams.from_state_dict(model, spec=only).table.shape == (1, only.num_params)
    for modulate, match in ((["nothing"], "modulate must match"), (["*.attn.qkv"], "qkv.weight of shape")):
        with pytest.raises(ValueError, match=match):
            NormSpec.from_state_dict(model.state_dict(), modulate)


def test_refused_sources():
    vit, other = HyperViT.from_timm(stock()), tuned(1)
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(ValueError, match=r"in its norms only, source 1 does in head\.bias"):
        NormParams.from_state_dict(tuned(0), other, shared=vit)
    whole = tuned(0).state_dict()
    bare = {name: tensor for name, tensor in whole.items() if not name.startswith("head.")}
    scaled = {**whole, "blocks.0.ls1.gamma": torch.ones(32)}
    for wrong, match in ((bare, r"in head\.weight \(it has none\)"), (scaled, r"ls1\.gamma \(the encoder has none\)")):
        with pytest.raises(ValueError, match=match):
            NormParams.from_state_dict(wrong, shared=vit)
    cut = {name: tensor for name, tensor in other.state_dict().items() if name != "blocks.1.norm2.bias"}
    with pytest.raises(ValueError, match=r"must hold blocks\.1\.norm2\.bias of shape \(32,\), got nothing"):
        NormParams.from_state_dict(tuned(0), cut)
    with pytest.raises(ValueError, match="at least one model"):
        NormParams.from_state_dict()
    with pytest.raises(ValueError, match="a transformers vision encoder's"):
        timm_norms(vit.state_dict())


def peft_model(folder, seed, modules):
    """An adapter trained by peft itself, saved to `folder`; the adapted model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(stock(), peft.LNTuningConfig(target_modules=modules)).train()
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(IMAGES), torch.randint(0, 5, (6,))).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


def test_adapters_trained_by_peft_become_rows(tmp_path):
    modules = [r"blocks\.\d+\.norm[12]|norm", ["blocks.1.norm2"], r"blocks\.\d+\.norm1"]
    models = [peft_model(tmp_path / str(i), i, each) for i, each in enumerate(modules)]
    vit = HyperViT.from_timm(stock())
    params = load_ln_adapters([tmp_path / "0", str(tmp_path / "1"), tmp_path / "2"], vit.base_params)
    assert (params.table != vit.base_params.table).any(1).all()
    with torch.no_grad():
        for i, model in enumerate(models):
            torch.testing.assert_close(vit(IMAGES, params[[i] * 6]), model(IMAGES), atol=1e-5, rtol=1e-4)


def test_peft_loads_a_row_that_we_wrote(tmp_path):
    peft = pytest.importorskip("peft")
    params = NormParams.from_state_dict(tuned(0), tuned(1))
    folder = save_ln_adapter(params, tmp_path / "adapter", task=1, base_model="vit_tiny_patch16_224")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    model = peft.PeftModel.from_pretrained(stock(), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), tuned(1)(IMAGES))
    back = load_ln_adapters([folder], HyperViT.from_timm(stock()).base_params)
    assert torch.equal(back.table[0], params.table[1])
    with pytest.raises(ValueError, match="new or an empty folder"):
        save_ln_adapter(params, folder)


def twins():
    """A random transformers ViT, and the timm model with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=128, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    ours = timm.create_model("vit_tiny_patch16_224", **{**SIZES, "num_classes": 0}).eval()
    state = theirs.state_dict()
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        **{f"patch_embed.proj.{kind}": state[f"embeddings.patch_embeddings.projection.{kind}"] for kind in KINDS},
        **timm_norms(state),
    }
    for i in range(2):
        for kind in KINDS:
            parts = [state[f"layers.{i}.attention.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            renamed[f"blocks.{i}.attn.proj.{kind}"] = state[f"layers.{i}.attention.o_proj.{kind}"]
            for name in ("fc1", "fc2"):
                renamed[f"blocks.{i}.mlp.{name}.{kind}"] = state[f"layers.{i}.mlp.{name}.{kind}"]
    ours.load_state_dict(renamed)
    return theirs, ours


def test_norms_tuned_in_transformers_become_rows(tmp_path):
    peft = pytest.importorskip("peft")
    theirs, ours = twins()
    vit = HyperViT.from_timm(ours)
    adapted = peft.get_peft_model(theirs, peft.LNTuningConfig(target_modules=["layernorm_before", "layernorm"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        from_adapter = load_ln_adapters([tmp_path / "adapter"], vit.base_params)
        expected = adapted(IMAGES).last_hidden_state[:, 0]
        torch.testing.assert_close(vit(IMAGES, from_adapter), expected, atol=1e-5, rtol=1e-4)
        merged = adapted.merge_and_unload()
        params = NormParams.from_state_dict(timm_norms(merged.state_dict()), shared=vit)
    assert torch.equal(params.table, from_adapter.table)


@pytest.mark.parametrize(
    "layer, name",
    [
        ("vit.encoder.layer.11.layernorm_before", "blocks.11.norm1"),
        ("deit.encoder.layer.0.layernorm_after", "blocks.0.norm2"),
        ("vision_model.encoder.layers.3.layer_norm1", "blocks.3.norm1"),
        ("encoder.layer.2.norm2", "blocks.2.norm2"),
        ("vit.layernorm", "norm"),
        ("vision_model.post_layernorm", "norm"),
        ("dinov2.layernorm", "norm"),
        ("head.layernorm", "head.layernorm"),
        ("blocks.3.norm1", "blocks.3.norm1"),
        ("vision_model.pre_layrnorm", "vision_model.pre_layrnorm"),
    ],
)
def test_names_of_norms(layer, name):
    assert timm_name(layer) == name


def test_refused_adapters(tmp_path):
    base = HyperViT.from_timm(stock()).base_params
    peft_model(tmp_path / "deep", 0, ["norm1", "norm2", "head"])
    with pytest.raises(ValueError, match="tune the rows' layers only"):
        load_ln_adapters([tmp_path / "deep"], base)
    good = save_ln_adapter(base, tmp_path / "good")
    (good / "adapter_model.safetensors").rename(good / "adapter_model.bin")  # a pickle is not even opened
    with pytest.raises(ValueError, match=r"lacks adapter_model\.safetensors"):
        load_ln_adapters([good], base)
    (good / "adapter_model.bin").rename(good / "adapter_model.safetensors")
    (good / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="adapters of LN tuning"):
        load_ln_adapters([good], base)
    for folders in ([], str(good)):
        with pytest.raises(ValueError, match="non-empty list"):
            load_ln_adapters(folders, base)


def test_a_bank_takes_ready_rows(monkeypatch):
    patch_text_tower(monkeypatch)
    model = tiny_model()
    row = NormParams(model.image.norm_spec, model.image.base_params.table * 1.3)
    bank = TaskBank(model)
    bank.add("pets", ["cat", "dog"])
    bank.add_row("tuned", ["cat", "dog", "parrot"], row)
    logits = bank.logits(IMAGES[:2], ["tuned", "pets"])
    with torch.no_grad():
        feature = torch.nn.functional.normalize(model.stock_model(row)(IMAGES[:1]), dim=-1)
        scores = feature @ model.encode_text(["cat", "dog", "parrot"]).T
        expected = model.logit_scale.exp() * scores + model.logit_bias
    torch.testing.assert_close(logits[:1], expected, atol=1e-5, rtol=1e-4)
    other = NormParams.from_state_dict(tuned(0), spec=NormSpec.from_state_dict(tuned(0).state_dict(), ["norm"]))
    for bad in (other, NormParams(row.spec, row.table.repeat(2, 1))):
        with pytest.raises(ValueError, match="row must be one row"):
            bank.add_row("bad", ["a"], bad)
    with pytest.raises(ValueError, match="a task must be"):
        bank.add_row("bad", [], row)
    assert bank.tasks == ("pets", "tuned")


def test_a_thousand_norm_sets_learn_and_serve_in_the_same_batches(monkeypatch):
    patch_text_tower(monkeypatch)
    model, generator = tiny_model(depth=1).requires_grad_(False), torch.Generator().manual_seed(0)
    names = [[f"name {i % 37}", f"name {i % 41 + 50}"] for i in range(1000)]
    train = torch.randint(0, 256, (1000, 2, 4, 16, 16), generator=generator).byte()
    train[:, 0, 0], train[:, 1, 2], train[:, :, 3] = 255, 255, 255  # the first class is reddish, the second bluish
    tasks, start = Tasks(names, train, train.flip(-1)), model.image.base_params.table.expand(1000, -1)
    table = fine_tune(model, tasks, start, steps=4, lr=3e-2, only=list(range(1000)))
    assert len(table.unique(dim=0)) == 1000
    assert accuracy(model, tasks, table) > accuracy(model, tasks, start) + 0.1
    for task in (0, 500, 999):
        alone = fine_tune(model, tasks, start, steps=4, lr=3e-2, only=[task])[0]
        torch.testing.assert_close(table[task], alone, atol=1e-4, rtol=1e-3)
    images = resize(to_rgb(train[:, 0]), 32)
    error, _, _ = serve(model, images, table)
    assert error < 1e-5
