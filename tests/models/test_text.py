"""Text towers against the libraries they come from, and what every tower promises."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_fast.text import TextTransformerConfig, create_text_tower, minilm_folder

TEXTS = ["cat", "a red apple", "the digit nine", "flag of cote d'ivoire", "person in a very long and wordy steamy room"]
SMALL = "transformer:width=32,depth=2,heads=2,dim=24,context_length=16"
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"]), min_size=1, max_size=40)


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def minilm():
    return create_text_tower("minilm")


@pytest.fixture(scope="module")
def small():
    return create_text_tower(SMALL)


@pytest.fixture(params=["minilm", "small"])
def tower(request):
    return request.getfixturevalue(request.param)


def tiny_bert(folder):
    """A folder as `save_pretrained` writes it: a BERT of random weights with MiniLM's tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 30}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return folder


def test_minilm_is_sentence_transformers(minilm):
    library = pytest.importorskip("sentence_transformers")
    reference = library.SentenceTransformer(str(minilm_folder()), device="cpu")
    expected = reference.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert minilm.dim == 384
    torch.testing.assert_close(minilm.encode(TEXTS), expected, atol=1e-5, rtol=0)


def test_minilm_knows_meaning(minilm):
    cat, kitten, lorry = minilm.encode(["cat", "kitten", "lorry"])
    assert cat @ kitten > 0.7 > 0.4 > cat @ lorry


def test_minilm_refuses_other_weights(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others")
    monkeypatch.setattr("hyperclip_fast.text.hf_tower.package_folder", lambda package, extra: tmp_path)
    with pytest.raises(ValueError, match="SHA-256"):
        create_text_tower("minilm")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("hyperclip_fast.utils.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '.\[clip\]'"):
        create_text_tower("minilm")


def test_hf_tower_is_the_mean_of_hidden_states(tmp_path):
    import transformers

    tower = create_text_tower(f"hf:{tiny_bert(tmp_path)}")
    model = transformers.AutoModel.from_pretrained(tmp_path).eval().double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        one_by_one = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1) for text in TEXTS]
    assert tower.dim == 20
    torch.testing.assert_close(tower.encode(TEXTS).double(), F.normalize(torch.cat(one_by_one)), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["RN50-quickgelu", "coca_ViT-B-32"])
def test_open_clip_tower_is_encode_text(model):
    open_clip = pytest.importorskip("open_clip")
    tower = create_text_tower(f"open_clip:{model}")
    clip = open_clip.create_model(model, force_custom_text=True, pretrained_text=False).eval()
    clip.text.load_state_dict(tower.text.state_dict())
    with torch.no_grad():
        expected = clip.encode_text(open_clip.get_tokenizer(model)(TEXTS), normalize=False)
    assert torch.equal(tower.encode(TEXTS), expected)
    assert tower.dim == expected.shape[1]


def test_scratch_tower_is_clips_architecture():
    """The tower with the weights of open_clip's own CLIP of the same sizes, whose encode_text is another code path."""
    open_clip = pytest.importorskip("open_clip")
    tower = create_text_tower(SMALL)
    sizes = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
    clip = open_clip.CLIP(24, {"layers": 1, "width": 32, "image_size": 32, "head_width": 16}, sizes).eval()
    clip.load_state_dict(tower.text.state_dict(), strict=False)
    with torch.no_grad():
        expected = clip.encode_text(open_clip.SimpleTokenizer(context_length=16)(TEXTS))
    torch.testing.assert_close(tower.encode(TEXTS), expected, atol=1e-6, rtol=0)


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(NAMES, min_size=1, max_size=5), seed=st.integers(0, 2**30))
def test_neither_order_nor_company_matters(minilm, small, texts, seed):
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    for tower in (minilm, small):
        together = tower.encode(texts)
        assert together.shape == (len(texts), tower.dim)
        torch.testing.assert_close(tower.encode([texts[i] for i in order]), together[order], atol=1e-5, rtol=0)
        alone = torch.cat([tower.encode([text]) for text in texts])
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_padding_changes_nothing(tower):
    padded = tower.encode(["cat", "word " * 200])[:1]
    torch.testing.assert_close(padded, tower.encode(["cat"]), atol=1e-5, rtol=0)


def test_many_texts_are_encoded_in_pieces(small, monkeypatch):
    texts = [f"thing {i}" for i in range(7)]
    whole = small.encode(texts)
    monkeypatch.setattr("hyperclip_fast.text.tower.BATCH", 3)
    torch.testing.assert_close(small.encode(texts), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["minilm", SMALL])
def test_templates_are_averaged_in_embedding_space(name, tower):
    templates = ("a photo of a {}.", "{} in the wild", "{}")
    got = create_text_tower(name, templates=templates).encode(TEXTS)
    bare = create_text_tower(name)
    each = [F.normalize(bare.encode([t.replace("{}", x) for x in TEXTS]).double(), dim=-1) for t in templates]
    expected = F.normalize(sum(each) / 3, dim=-1)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert (got - F.normalize(bare.encode(TEXTS), dim=-1)).abs().max() > 1e-3


@pytest.mark.parametrize("templates", ["a {}", ("no place",), ("{} and {}",), (3,)], ids=repr)
def test_templates_refused(templates):
    with pytest.raises(ValueError, match="templates"):
        create_text_tower(SMALL, templates=templates)


def test_frozen_tower_never_trains(tower):
    tower.train()
    assert tower.frozen and not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower.encode(["cat"]).requires_grad
    holder = torch.nn.ModuleList([tower]).train()
    assert holder.training and not tower.training


@pytest.mark.parametrize("name", ["minilm", SMALL])
def test_trainable_tower_trains(name):
    tower = create_text_tower(name, trainable=True, templates=("a {}",))
    assert not tower.frozen and all(module.training for module in tower.modules())
    tower.eval().encode(["cat", "dog"])[:, 0].sum().backward()
    silent = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_random_frozen_weights_are_repeatable_and_leave_the_seed_alone():
    torch.manual_seed(1)
    first = create_text_tower(SMALL).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's seed was changed"))
        create_text_tower(SMALL)
    assert torch.equal(drawn, torch.rand(1))
    again = create_text_tower(SMALL).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    trained = create_text_tower(SMALL, trainable=True).state_dict()
    assert not torch.equal(first["text.token_embedding.weight"], trained["text.token_embedding.weight"])


def test_transformer_config():
    assert TextTransformerConfig.parse("") == TextTransformerConfig(256, 4, 4, 256, 32)
    assert TextTransformerConfig.parse("depth=2,dim=8") == TextTransformerConfig(256, 2, 4, 8, 32)
    small = create_text_tower(SMALL)
    assert small.dim == 24 and small.tokenizer(["word " * 99]).shape == (1, 16)


@pytest.mark.parametrize("texts", ["cat", [], [b"cat"], ["cat", 3], ("cat", None)], ids=repr)
def test_encode_refuses(small, texts):
    with pytest.raises(ValueError, match="texts must be a non-empty list of strings"):
        small.encode(texts)


@pytest.mark.parametrize(
    "name, words",
    [
        ("word2vec", "minilm, hf:"),
        ("", "minilm, hf:"),
        ("hf:", "minilm, hf:"),
        ("minilm:large", "minilm, hf:"),
        ("hf:./no-such-folder", "no-such-folder"),
        ("open_clip:ViT-B-33", "ViT-B-32"),
        ("open_clip:ViT-B-32/nobody", "openai"),
        ("transformer:layers=2", "depth"),
        ("transformer:depth=0", "positive"),
        ("transformer:depth", "positive"),
        ("transformer:width=30,heads=4", "multiple of heads"),
    ],
)
def test_names_refused(name, words):
    with pytest.raises(ValueError, match=words):
        create_text_tower(name)


def test_hf_refuses_a_folder_without_weights(tmp_path):
    shutil.copytree(minilm_folder(), tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="cut"):
        create_text_tower(f"hf:{tmp_path / 'cut'}")
