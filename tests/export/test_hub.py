"""What goes to the hub and comes back: a HyperCLIP with its card, a specialised tower, the kernels. No network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from hyperclip_fast.export.hub_kernel import PUBLIC, main, write_hub_kernel
from hyperclip_fast.export.specialized import push_specialized, save_specialized
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.task_bank import TaskBank
from tests.helpers import assert_close
from tests.towers import patch_text_tower, tiny_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["cat", "dog", "parrot"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(monkeypatch):
    patch_text_tower(monkeypatch)
    return tiny_model()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder in place of the hub: uploads are copied to it, downloads read from it."""
    folder = tmp_path / "hub"

    def upload(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, **_):
        path = folder / repo_id / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, **_: False)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    for module in ("huggingface_hub.hub_mixin", "timm.models._hub"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    return folder


def test_a_model_goes_to_the_hub_and_comes_back(model, hub):
    about = {
        "data": "1,851 names of OpenMoji.",
        "tasks": {"pets": ["cat", "dog"]},
        "numbers": {"accuracy, mean over 33 tasks": 0.3},
    }
    model.push_to_hub("me/pets", model_card_kwargs=about)
    files = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in (hub / "me/pets").iterdir()} == files
    loaded = HyperCLIP.from_pretrained("me/pets")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES, [NAMES])["image_features"], model(IMAGES, [NAMES])["image_features"])
    card = ModelCard.load(hub / "me/pets/README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "zero-shot-image-classification"
    for text in (about["data"], "- pets: cat, dog", "| accuracy, mean over 33 tasks | 0.3 |"):
        assert text in card.text
    for text in (f"{model.image.norm_spec.num_params} weights of 5 norm layers", "vit_tiny_patch16_224", "32 x 32"):
        assert text in card.text


def test_a_card_claims_nothing_that_nobody_said(model):
    text = model.generate_model_card().text
    assert text.count("Not stated by whoever saved this model.") == 3
    for wrong in ({"tasks": {"pets": "cat"}}, {"numbers": {"accuracy": "good"}}):
        with pytest.raises(ValueError, match="must map names to"):
            model.generate_model_card(**wrong)


def test_weights_in_a_pickle_are_refused(model, hub):
    model.push_to_hub("me/pets")
    (hub / "me/pets/model.safetensors").unlink()
    torch.save(model.state_dict(), hub / "me/pets/pytorch_model.bin")
    with pytest.raises(ValueError, match="model must hold model"):
        HyperCLIP.from_pretrained("me/pets")


def expected_logits(model):
    bank = TaskBank(model)
    bank.add("pets", NAMES)
    return bank.logits(IMAGES, ["pets"] * len(IMAGES))


def check_classifier(folder, tower, model):
    classes = load_file(folder / "classes.safetensors")
    assert classes["class_embeddings"].shape == (3, 16)
    with torch.no_grad():
        scores = F.normalize(tower.eval()(IMAGES), dim=-1) @ classes["class_embeddings"].T
    logits = classes["logit_scale"] * scores + classes["logit_bias"]
    torch.testing.assert_close(logits, expected_logits(model), atol=1e-4, rtol=1e-4)
    assert json.loads((folder / "labels.json").read_text()) == NAMES


def test_a_specialised_tower_goes_to_the_hub_as_a_timm_model(model, hub):
    push_specialized(model, NAMES, "me/tower")
    folder = hub / "me/tower"
    files = {"README.md", "config.json", "model.safetensors", "classes.safetensors", "labels.json"}
    assert {file.name for file in folder.iterdir()} == files
    check_classifier(folder, timm.create_model("hf_hub:me/tower", pretrained=True), model)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "timm" and "cat, dog, parrot" in card.text


def test_a_specialised_tower_loads_strictly_into_timms_own(model, tmp_path):
    folder = save_specialized(model, NAMES, tmp_path / "pets")
    config = json.loads((folder / "config.json").read_text())
    arguments = {**config["model_args"], "num_classes": config["num_classes"]}
    tower = timm.create_model(config["architecture"], **arguments)
    tower.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    check_classifier(folder, tower, model)


LOAD = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
import hyperclip_fast
from hyperclip_fast.kernels.layer_norm import layer_norm
kernel = get_local_kernel(Path(sys.argv[1]))
assert Path(kernel.__file__).parent == Path(sys.argv[1]) / "build" / "torch-universal"
generator = torch.Generator().manual_seed(0)
x, delta = torch.randn(2, 3, 5, 24, generator=generator)
weight, bias = torch.randn(2, 4, 24, generator=generator)
rows = {"weight": weight, "bias": bias, "task_ids": torch.tensor([3, 1, 0]), "eps": 1e-6}
out, total = kernel.add_layer_norm(x, delta, **rows)
assert torch.equal(total, x + delta) and torch.equal(out, layer_norm(total, **rows))
torch.save({"x": x, "delta": delta, **rows, "out": out}, sys.argv[2])
names = [op for op in torch._C._dispatch_get_all_op_names() if "hyperclip_fast" in op and op.endswith("::layer_norm")]
assert len(names) == 2, names  # ours, and the kernel's own
"""


@pytest.mark.slow
def test_kernels_load_as_a_hugging_face_kernel_beside_the_package(tmp_path):
    pytest.importorskip("kernels.load", exc_type=ImportError)
    folder = write_hub_kernel(tmp_path / "kernel")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "out.pt")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out.pt")
    total = got["x"].double() + got["delta"].double()
    normed = F.layer_norm(total, (24,), eps=1e-6)
    weight, bias = (got[name].double()[got["task_ids"]].unsqueeze(1) for name in ("weight", "bias"))
    assert_close(got["out"], normed * weight + bias, "out")


def test_the_kernel_repository_is_complete_and_written_once(tmp_path, capsys):
    folder = tmp_path / "kernel"
    assert main(["--out", str(folder)]) == 0 and str(folder) in capsys.readouterr().out
    variant = folder / "build" / "torch-universal"
    modules = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    written = {path.relative_to(variant) for path in variant.rglob("*") if path.is_file()}
    assert written == modules | {Path("__init__.py"), Path("metadata.json")}
    assert set(PUBLIC) <= {path.parts[0].removesuffix(".py") for path in modules}
    text = "".join(path.read_text() for path in variant.rglob("*.py"))
    identity = json.loads((variant / "metadata.json").read_text())["id"]
    assert "hyperclip_fast::" not in text.replace(f"{identity}::", "") and f"{identity}::layer_norm" in text
    assert main(["--out", str(folder)]) == 2 and "new or an empty folder" in capsys.readouterr().err
