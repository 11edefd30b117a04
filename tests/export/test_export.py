"""Files for other runtimes: what ONNX Runtime, torch.export, AOTInductor and ExecuTorch compute from them."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from hyperclip_fast.cli.main import main
from hyperclip_fast.export.formats import FORMATS, export
from hyperclip_fast.export.graphs import mixed_graph, specialized_graph, text_graph
from hyperclip_fast.export.specialized import save_specialized
from hyperclip_fast.hyperclip import load_model
from hyperclip_fast.norm_params import NormSpec
from hyperclip_fast.task_bank import TaskBank
from tests.towers import patch_text_tower, tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = "transformer:width=32,depth=1,heads=2,dim=24,context_length=8"
TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"], "one": ["thing"]}
NAMES = ["food", "pets", "one", "pets", "food"]
IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def load(path, format):
    """The file as a function on tensors, and its metadata, read by the runtime itself."""
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        names = [each.name for each in session.get_inputs()]
        return lambda *inputs: [
            torch.from_numpy(out) for out in session.run(None, dict(zip(names, (each.numpy() for each in inputs))))
        ], metadata
    if format == "executorch":
        program = pytest.importorskip("executorch.runtime").Runtime.get().load_program(path)
        methods = program.load_method("forward"), program.load_method("metadata")
        return lambda *inputs: (program, methods[0].execute(list(inputs)))[1], json.loads(methods[1].execute([])[0])
    if format == "aoti":
        package = torch._inductor.aoti_load_package(str(path))
        return lambda *inputs: _listed(package(*inputs)), package.get_metadata()
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    return lambda *inputs: _listed(program(*inputs)), json.loads(extra["metadata.json"])


def _listed(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def written(graph, folder, format):
    if format == "executorch":
        pytest.importorskip("executorch.exir")
    path = folder / f"file{FORMATS[format].suffix}"
    assert export(graph, path, format) <= 1e-4
    assert [file.name for file in folder.iterdir()] == [path.name]
    return load(path, format)


@pytest.fixture
def bank(monkeypatch):
    """Three tasks of a tiny model whose text tower is a table of strings."""
    patch_text_tower(monkeypatch)
    bank = TaskBank(tiny_model(depth=1))
    bank.add_many(TASKS)
    return bank


@pytest.mark.parametrize("format", ["onnx", "torch", pytest.param("executorch", marks=pytest.mark.slow)])
def test_specialized(bank, tmp_path, format):
    run, metadata = written(specialized_graph(bank.model, TASKS["pets"]), tmp_path, format)
    expected = bank.logits(IMAGES, ["pets"] * 5)
    for images, exact in ((IMAGES, expected), (IMAGES[1:2], expected[1:2])):
        torch.testing.assert_close(run(images)[0], exact, atol=1e-4, rtol=1e-4)
    assert json.loads(metadata["labels"]) == TASKS["pets"] and metadata["image_size"] == "32"


@pytest.mark.parametrize("format", ["onnx", "torch", pytest.param("aoti", marks=pytest.mark.slow)])
def test_mixed_serves_every_task_of_a_bank(bank, tmp_path, format):
    run, metadata = written(mixed_graph(bank.model), tmp_path, format)
    scale, bias = float(metadata["logit_scale"]), float(metadata["logit_bias"])
    assert NormSpec.from_json(metadata["norm_spec"]) == bank.model.image.norm_spec
    for names in (NAMES, NAMES[:1]):
        table, ids = bank.params.table, bank.task_ids(names)
        embeddings = run(IMAGES[: len(names)], table, ids)[0]
        exact = bank.logits(IMAGES[: len(names)], names)
        for embedding, task, row in zip(embeddings, names, exact):
            logits = scale * embedding @ bank.class_embeddings(task).T + bias
            torch.testing.assert_close(logits, row[: len(TASKS[task])], atol=1e-4, rtol=1e-4)
    alone = run(IMAGES[:2], bank.params.table[1:2].clone(), torch.zeros(2, dtype=torch.int64))[0]  # a table of one task
    torch.testing.assert_close(alone, run(IMAGES[:2], bank.params.table, torch.tensor([1, 1]))[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, templates, head",
    [("onnx", (), {"text_head": "kernel", "text_anchors": 7}), ("torch", ("a {}", "the {} here"), {})],
)
def test_text_makes_a_task(tmp_path, format, templates, head):
    model = tiny_model(text_tower=TEXT, templates=templates, depth=1, **head)
    run, metadata = written(text_graph(model), tmp_path, format)
    assert metadata["text_tower"] == TEXT and json.loads(metadata["templates"]) == list(templates)
    tower = model.text_tower
    for names in TASKS.values():
        tokens = tower.tokenize(tower.fill(names))["input_ids"].unflatten(0, (len(names), -1))
        row, embeddings = run(tokens)
        with torch.no_grad():
            torch.testing.assert_close(row, model.adapt([names]).table[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(embeddings, model.encode_text(names), atol=1e-4, rtol=1e-4)


def timm_code():
    """The block of Python in docs/export.md that loads a specialised folder."""
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    (code,) = [block for block in page.split("```python\n")[1:] if "local-dir:" in block.split("```")[0]]
    return code.split("```")[0]


def test_the_page_loads_a_specialised_folder_with_timm_alone(tmp_path, monkeypatch):
    model = load_model()
    save_specialized(model, ["cat", "dog"], tmp_path / "cat_or_dog")
    Image.new("RGB", (60, 50), "orange").save(tmp_path / "photo.jpg")
    code = timm_code()
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "hyperclip_fast", None)
    scope = {}
    exec(code, scope)
    monkeypatch.undo()
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(scope["model"]))(
        Image.open(tmp_path / "photo.jpg")
    )
    bank = TaskBank(model)
    bank.add("pets", ["cat", "dog"])
    exact = bank.logits(pixels[None], ["pets"]).softmax(-1)[0]
    torch.testing.assert_close(scope["shares"][0].detach(), exact, atol=1e-5, rtol=1e-4)


def test_a_file_that_computes_something_else_is_not_written(bank, tmp_path, monkeypatch):
    path = tmp_path / "file.pt2"
    path.write_bytes(b"before")
    wrong = FORMATS["torch"].load
    monkeypatch.setattr(
        "hyperclip_fast.export.formats.FORMATS",
        {"torch": type(FORMATS["torch"])(".pt2", FORMATS["torch"].write, lambda path: _off(wrong(path)))},
    )
    with pytest.raises(ValueError, match="torch must compute what PyTorch does"):
        export(specialized_graph(bank.model, ["a", "b"]), path, "torch")
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def _off(run):
    return lambda *inputs: tuple(F.pad(out[:, 1:], (0, 1)) for out in run(*inputs))


def test_refused_input(bank, tmp_path):
    graph = mixed_graph(bank.model)
    for format, name, match in (
        ("tflite", "a.onnx", "format must be one of onnx"),
        ("aoti", "a.onnx", "path must end in .pt2"),
        ("executorch", "a.pte", "must go with the specialized or the text graph"),
    ):
        with pytest.raises(ValueError, match=match):
            export(graph, tmp_path / name, format)
    for names in ([], "cat"):
        with pytest.raises(ValueError, match="task"):
            specialized_graph(bank.model, names)
    with pytest.raises(ValueError, match="model must be float32 on the CPU"):
        mixed_graph(bank.model.double())
    assert list(tmp_path.iterdir()) == []


def test_command_line(bank, tmp_path, capsys):
    bank.model.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model")]
    out = tmp_path / "made" / "pets.onnx"
    assert main(["export", "specialized", "--labels", "cat,dog", "--out", str(out), *model]) == 0
    assert "images to logits; within" in capsys.readouterr().out
    run, metadata = load(out, "onnx")
    assert run(IMAGES)[0].shape == (5, 2) and json.loads(metadata["labels"]) == ["cat", "dog"]
    for arguments, message in (
        (["mixed", "--labels", "a,b"], "--labels must be given for specialized, and only there"),
        (["specialized"], "--labels must be given for specialized"),
        (["mixed", "--format", "torch"], "path must end in .pt2"),
    ):
        assert main(["export", *arguments, "--out", str(out), *model]) == 2
        assert message in capsys.readouterr().err
