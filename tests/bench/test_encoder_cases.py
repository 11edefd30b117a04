"""The table of encoders, and towers other than a VisionTransformer in the model benchmark."""

import pytest
import torch

from hyperclip_fast.bench.cases import encoders
from hyperclip_fast.bench.cases import models as model_cases
from hyperclip_fast.bench.harness.runner import Case, Provider, run_case
from hyperclip_fast.cli.main import main

CPU = torch.device("cpu")


@pytest.mark.parametrize("step", ["forward", "training"])
@pytest.mark.parametrize("name", ["tinynet_e", "mobilenetv3_small_050"])  # the latter's head has another width
def test_all_towers_of_a_batch_norm_network_agree(name, step):
    """Also in training, where an image's output depends on the others of its batch."""
    (case,) = model_cases.model_cases([name], [6], [3], ["uniform"], [step], ["eager"], torch.float32, CPU, img_size=32)
    rows = {row["provider"]: row for row in run_case(case, seconds=0.01)}
    assert rows.keys() == {"stock", "naive", "ours", "single", "loop"}
    reason = rows["loop"].pop("reason", None)
    assert (reason == "one pass a task has other batch statistics") == (step == "training")
    for name, row in rows.items():
        assert row["status"] == ("unavailable" if name == "loop" and reason else "ok"), row


def test_another_row_is_wrong_in_training_though_rounding_has_slack(monkeypatch):
    def shifted(self, provider, engine):
        self.task_ids = (ids := self.task_ids).roll(1)
        try:
            return build(self, provider, engine)
        finally:
            self.task_ids = ids

    build = model_cases._Mixture._build
    monkeypatch.setattr(model_cases._Mixture, "_build", shifted)
    (case,) = model_cases.model_cases(
        ["mobilenetv3_small_050"], [6], [6], ["distinct"], ["training"], ["eager"], torch.float32, CPU, img_size=32
    )
    statuses = {row["provider"]: row["status"] for row in run_case(case, seconds=0.01)}
    assert (statuses["stock"], statuses["ours"], statuses["naive"]) == ("ok", "wrong", "wrong")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_wrong_with_any_slack(dtype):
    case = Case({}, [Provider("ours", "eager", lambda: lambda: None)], lambda provider, run: 1.0, dtype, CPU, slack=1e4)
    assert [row["status"] for row in run_case(case, seconds=0.01)] == ["wrong"]


def test_table_of_encoders(capsys):
    sizes = ["--models", "tinynet_e", "vit_tiny_patch16_224", "--img-size", "32", "--batches", "2", "3"]
    assert main(["bench", "encoders", *sizes, "--tasks", "2", "--seconds", "0.01"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[0][-2:] == ["ratio, B 2", "ratio, B 3"]
    assert [line[:4] for line in table[1:]] == [
        ["tinynet_e", "0.76 M", "14,240", "0"],
        ["vit_tiny_patch16_224", "5.49 M", "9,600", "0"],
    ]
    assert all(float(line[4]) < 1e-5 and 0.1 < float(line[-1].split()[0]) < 10 for line in table[1:])


def test_table_of_folded_encoders(capsys, monkeypatch):
    arguments = ["bench", "encoders", "--fused", "--models", "tinynet_e", "--img-size", "32", "--batches", "2"]
    assert main([*arguments, "--seconds", "0.01"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[0] == "| encoder | folded, B 2 | with norms, B 2 |"
    cells = [cell.split()[0] for cell in lines[1].strip("| ").split(" | ")]
    assert cells[0] == "tinynet_e" and all(0.1 < float(cell) < 10 for cell in cells[1:])
    monkeypatch.setattr(encoders, "fuse_batch_norms", lambda model, image: torch.nn.Flatten())
    assert main([*arguments, "--seconds", "0.01"]) == 1


def test_a_wrong_encoder_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(encoders, "run_case", lambda case, seconds: [{}, {"reason": "relative error 1e0"}])
    assert main(["bench", "encoders", "--models", "tinynet_e", "--img-size", "32", "--batches", "2"]) == 1
    assert "relative error 1e0" in capsys.readouterr().out
