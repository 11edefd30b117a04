"""clip_benchmark's own command line on webdatasets of built-in pictures: its numbers are TaskBank's."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from examples.webdataset import write_task
from hyperclip_fast import TaskBank
from hyperclip_fast.cli.main import main
from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.integrations.clip_benchmark import load
from tests.towers import tiny_model

pytest.importorskip("clip_benchmark")
TEXT = "transformer:width=32,depth=1,heads=2,dim=24,context_length=12"
NAMES = tuple(f"thing {i}" for i in range(6))


@pytest.fixture(scope="module")
def task():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 2, (40, 4, 2, 2), generator=generator).mul(255).byte()
    images = images.repeat_interleave(16, 2).repeat_interleave(16, 3)
    images[:, 3] = 255
    return EvalTask("things", NAMES, images, torch.randint(0, 6, (40,), generator=generator))


@pytest.fixture
def model(tmp_path):
    model = tiny_model(text_tower=TEXT, templates=("a {} here",))
    model.save_pretrained(tmp_path / "model")
    return model


def evaluate(folder, name, *more):
    """Metrics of one run of clip_benchmark."""
    arguments = ["--dataset", "wds/things", "--dataset_root", f"{folder}/{{dataset}}", "--output", f"{folder}/out.json"]
    arguments += ["--model", name, "--pretrained", str(folder / "model"), "--no_amp", "--num_workers", "0"]
    assert main(["clip-benchmark", "eval", *arguments, "--batch_size", "16", *more]) == 0
    result = json.loads((folder / "out.json").read_text())
    assert result["model"] == name and result["dataset"] == "wds/things"
    return result["metrics"]


def expected(logits, labels):
    order = logits.argsort(1, descending=True)
    hits = order == labels[:, None]
    recall = torch.stack([hits[labels == i, 0].double().mean() for i in labels.unique()]).mean()
    return {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits[:, :5].any(1).double().mean().item(),
        "mean_per_class_recall": recall.item(),
    }


def test_it_prints_what_the_bank_predicts(tmp_path, model, task):
    write_task(task, tmp_path / "things", shards=2, templates=("a {c} here",))
    bank = TaskBank(model)
    bank.add("things", NAMES)
    pixels = task.images[:, :3].float() / 127.5 - 1
    ours = expected(bank.logits(pixels, ["things"] * 40), task.labels)
    with torch.no_grad():
        base = expected(model.encode_image(pixels) @ bank.class_embeddings("things").T, task.labels)
    assert ours != base
    assert evaluate(tmp_path, "hyperclip") == pytest.approx(ours)
    assert evaluate(tmp_path, "hyperclip-base") == pytest.approx(base)


def test_other_tasks_and_names_are_refused(tmp_path, model, task, capsys):
    write_task(task, tmp_path / "things", templates=("{c}",))
    arguments = ["clip-benchmark", "eval", "--dataset", "wds/things", "--dataset_root", f"{tmp_path}/{{dataset}}"]
    arguments += ["--pretrained", str(tmp_path / "model"), "--num_workers", "0", "--output", f"{tmp_path}/out.json"]
    assert main([*arguments, "--model", "ViT-B-32"]) == 2
    assert "--model must be one of hyperclip, hyperclip-base" in capsys.readouterr().err
    waiting, transform, _ = load("hyperclip", str(tmp_path / "model"))
    image = transform(Image.new("L", (40, 30)))[None]
    for encode in (waiting.encode_image, waiting.encode_text):
        with pytest.raises(ValueError, match="--task must be zeroshot_classification"):
            encode(image)
    assert load("hyperclip-base", str(tmp_path / "model"))[0].encode_image(image).shape == (1, 16)
    assert main(["clip-benchmark", "eval", "--dataset", "wds/none", "--pretrained", "no/such/model"]) == 2
    assert "got no/such/model" in capsys.readouterr().err


def test_the_example_writes_whole_archives(tmp_path, task):
    write_task(task, tmp_path / "things", shards=3)
    names, pixels = set(), {}
    for shard in range(3):
        with tarfile.open(tmp_path / "things" / "test" / f"{shard}.tar") as archive:
            for member in archive:
                names.add(member.name)
                if member.name.endswith(".png"):
                    image = Image.open(io.BytesIO(archive.extractfile(member).read()))
                    pixels[int(member.name[:6])] = (to_tensor(image) * 255).round().byte()
    assert len(names) == 80 and all(torch.equal(pixels[i], task.images[i, :3]) for i in range(40))
    assert (tmp_path / "things" / "classnames.txt").read_text().splitlines() == list(NAMES)
