"""transformers' pipeline and Auto classes on a HyperCLIP's folder: the labels are the task, the answers TaskBank's."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from hyperclip_fast import HyperCLIP, TaskBank
from hyperclip_fast.hyperclip import DEMO_MODEL, load_model
from tests.towers import tiny_model

TOWER = "transformer:width=16,depth=1,heads=2,dim=24,context_length=40"  # features of any length, unlike MiniLM's
LABELS = ["cat", "dog", "yellow taxi", "café", "東京"]
BARE = {"candidate_labels": LABELS, "hypothesis_template": "{}"}
MODELS = {
    "frozen text": {},
    "trained text": {"train_text": True},
    "another encoder": {"image_tower": "test_efficientnet", "patch_size": None, "width": None, "depth": None}
    | {"num_heads": None, "crop_mode": "squash", "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6)},
    "unconditioned": {"conditioned": False},
}


def pictures(count=3):
    generator = torch.Generator().manual_seed(0)
    sizes = [(60 + 9 * i, 50) for i in range(count)]
    noise = (torch.randint(256, (3 * width * height,), generator=generator).tolist() for width, height in sizes)
    return [Image.frombytes("RGB", size, bytes(values)) for size, values in zip(sizes, noise)]


def expected(model, labels=LABELS, images=None):
    """What TaskBank says, best first, as the pipeline puts it."""
    bank = TaskBank(model)
    bank.add("task", labels)
    images = model.preprocess(images or pictures())
    return [
        [{"label": name, "score": score} for name, score in zip(each.names, each.probabilities)]
        for each in bank.classify(images, ["task"] * len(images), topk=len(labels))
    ]


def assert_same_answers(answers, reference):
    for ours, theirs in zip(answers, reference, strict=True):
        assert [each["label"] for each in ours] == [each["label"] for each in theirs]
        assert [each["score"] for each in ours] == pytest.approx([each["score"] for each in theirs], abs=1e-5)


def classifier(folder, **options):
    return pipeline("zero-shot-image-classification", model=str(folder), device="cpu", **options)


@pytest.fixture
def saved(tmp_path):
    """A tiny model, and the folder that it was saved to."""
    model = tiny_model(text_tower=TOWER)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_pipeline_answers_as_a_task_bank(tmp_path, options):
    model = tiny_model(text_tower=TOWER, **options)
    model.save_pretrained(tmp_path)
    pipe, reference = classifier(tmp_path), expected(model)
    assert len({each["score"] for each in reference[0]}) == len(LABELS)
    assert_same_answers(pipe(pictures(), **BARE), reference)
    assert_same_answers(pipe(pictures(), **BARE, batch_size=2), reference)
    assert_same_answers([pipe(pictures()[0], **BARE)], reference[:1])


def test_the_shipped_demo(tmp_path, caplog):
    reference = expected(load_model())
    assert_same_answers(classifier(DEMO_MODEL)(pictures(), **BARE), reference)
    load_model().save_pretrained(tmp_path)
    assert_same_answers(classifier(tmp_path, **{"hypothesis_template": "{}"})(pictures(), LABELS), reference)
    assert not [record for record in caplog.records if "not supported" in record.message]


def test_labels_are_filled_into_the_pipelines_template(saved):
    model, folder = saved
    reference = expected(model, [f"This is a photo of {label}." for label in LABELS])
    answers = classifier(folder)(pictures(), LABELS)
    filled = [[{**each, "label": f"This is a photo of {each['label']}."} for each in answer] for answer in answers]
    assert_same_answers(filled, reference)


@pytest.mark.parametrize("templates", [("a drawing of a {}.",), ("a photo of a {}.", "{}", "a drawing of a {}.")])
def test_lines_of_a_template_are_prompts_that_are_averaged(tmp_path, templates):
    model = tiny_model(text_tower=TOWER, templates=templates)
    model.save_pretrained(tmp_path)
    lines = "\n".join(templates).replace("{}", "{0}")
    assert_same_answers(classifier(tmp_path)(pictures(), LABELS, hypothesis_template=lines), expected(model))


def test_the_last_labels_are_adapted_to_once(saved, monkeypatch):
    _, folder = saved
    pipe, calls = classifier(folder), []
    features = HyperCLIP.text_features
    monkeypatch.setattr(HyperCLIP, "text_features", lambda *args: calls.append(args) or features(*args))
    before = pipe(pictures(), **BARE)
    assert len(calls) == 1
    assert_same_answers(pipe(pictures(), **{**BARE, "candidate_labels": LABELS[::-1]}), before)
    assert len(calls) == 2
    weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in pipe.model.state_dict().items()}
    pipe.model.load_state_dict(weights)
    assert_same_answers(pipe(pictures(), **BARE), expected(pipe.model.clip))
    with torch.no_grad():
        pipe.model.clip.text_projection.weight.neg_()
    pipe.model.eval()
    assert_same_answers(pipe(pictures(), **BARE), expected(pipe.model.clip))
    assert_same_answers(classifier(folder, dtype=torch.float64)(pictures(), **BARE), before)


def test_processor_and_model_by_themselves(saved):
    model, folder = saved
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=LABELS, images=pictures(), padding=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], model.preprocess(pictures()))
    assert torch.equal(inputs["pixel_values"], AutoImageProcessor.from_pretrained(folder)(pictures())["pixel_values"])
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        ours = auto.from_pretrained(folder)
        out = ours(**inputs)
        out.logits_per_image.square().sum().backward()
        assert all(p.grad is not None for name, p in ours.named_parameters() if "norm" not in name and p.requires_grad)
        assert torch.equal(out.logits_per_text, out.logits_per_image.T)
        bank = TaskBank(model)
        bank.add("task", LABELS)
        torch.testing.assert_close(out.logits_per_image.detach(), bank.logits(inputs["pixel_values"], ["task"] * 3))


def test_what_a_pipeline_saves_is_a_hyperclip(saved, tmp_path):
    model, folder = saved
    classifier(folder).save_pretrained(tmp_path / "again")
    assert HyperCLIP.from_pretrained(tmp_path / "again").config == model.config
    assert_same_answers(classifier(tmp_path / "again")(pictures(), **BARE), expected(model))
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((folder / name).read_text())


def test_the_model_type(saved):
    _, folder = saved
    assert AutoConfig.from_pretrained(folder).model_type == "hyperclip_fast"
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("model_type") == "hyperclip_fast"
    (folder / "config.json").write_text(json.dumps(config))  # as it was written before
    HyperCLIP.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip"}))
    with pytest.raises(ValueError, match="model_type hyperclip_fast, got 'clip'"):
        HyperCLIP.from_pretrained(folder)


@pytest.mark.parametrize("row", [[102, 100], [101, 102, 103, 1, 5], [300, 1], [0, 0], [2, 1], [230, 1]])
def test_numbers_of_another_tokenizer_are_refused(saved, row):
    model = AutoModel.from_pretrained(saved[1])
    with pytest.raises(ValueError, match="input_ids must be what the model's own tokenizer makes"):
        model(torch.tensor([row]), torch.zeros(1, 3, 32, 32))


def test_what_is_refused(saved):
    _, folder = saved
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["cat", " "], padding=True, return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="class name must be text that is not blank"):
        model(ids, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="images must be a floating point tensor"):
        model(ids[:1], torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="device_map must be None for a HyperCLIP, got 'auto'"):
        AutoModel.from_pretrained(folder, device_map="auto")
    images = AutoImageProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match='return_tensors must be "pt"'):
        images(pictures(), return_tensors="np")
    with pytest.raises(ValueError, match="source must be a file's path, its content as bytes, or a Pillow image"):
        images([torch.zeros(3, 32, 32)])


ORDERS = (
    "import hyperclip_fast; from transformers import AutoTokenizer as Auto",
    "from transformers import AutoTokenizer as Auto; import hyperclip_fast",
    "import hyperclip_fast; from transformers import AutoModel as Auto",
    "from transformers import AutoImageProcessor as Auto; import hyperclip_fast",
    "import hyperclip_fast.integrations.transformers_model; from transformers import AutoProcessor as Auto",
)


@pytest.mark.slow
def test_each_class_alone_in_any_order():
    """Each order in a process of its own, which has PyTorch from the one that it was forked from."""
    code = """
import os, sys, torch, torchvision
for order in sys.argv[2:]:
    if not os.fork():
        exec(order)
        if "Tokenizer" in order:
            assert "timm" not in sys.modules and "transformers.modeling_utils" not in sys.modules
        assert type(Auto.from_pretrained(sys.argv[1])).__name__ in (
            "ByT5Tokenizer", "HyperCLIPModel", "HyperCLIPImageProcessor", "HyperCLIPProcessor"
        )
        sys.exit()
    assert os.wait()[1] == 0, order
"""
    subprocess.run([sys.executable, "-c", code, str(DEMO_MODEL), *ORDERS], check=True)


def test_our_import_is_not_transformers():
    code = "import sys, hyperclip_fast; assert 'transformers' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
