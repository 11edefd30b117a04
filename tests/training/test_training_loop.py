"""What the trainer does beside descending: goes on in mid-epoch, freezes, averages, has rates, precisions and logs."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hyperclip_fast.cli.main import main
from hyperclip_fast.configs import shipped_configs
from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.data.held_out import held_out_tasks
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.training.config import RunConfig, TrainConfig, load_config
from hyperclip_fast.training.optimizer import learning_rate, part_of
from hyperclip_fast.training.trainer import Trainer
from tests.image_data import write_folder, write_shards
from tests.towers import patch_text_tower, tiny_config
from tests.training.test_training import CONFIG, pictures, trainer, trainer_of

CONFIGS = list(shipped_configs().values())


@pytest.fixture
def towers(monkeypatch):
    patch_text_tower(monkeypatch)


def equal(left, right):
    for (name, ours), expected in zip(left.state_dict().items(), right.state_dict().values()):
        assert torch.equal(ours, expected), name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_a_run_stopped_in_mid_epoch_goes_on_bit_for_bit(towers, tmp_path, kind, workers):
    """9 steps of 8 pairs, stopped after the third: an epoch of the shards has 6."""
    path = write_shards(tmp_path / "set", 3, 16) if kind == "shards" else write_folder(tmp_path / "set", 12, 4)
    data = DataConfig(kind=kind, path=path, workers=workers, shuffle=5)
    train = {"tasks_per_batch": 1, "classes_per_task": 8, "steps": 9, "ema": 0.9, "accumulate": 2}
    config = replace(CONFIG, eval_every=0, save_every=100, **train)
    model = tiny_config(drop_path_rate=0.3, train_text=True)
    whole = Trainer(RunConfig(model, config, data), tmp_path / "whole")
    first = Trainer(RunConfig(model, config, data), tmp_path / "parts")
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(RunConfig(model, config, data), tmp_path / "parts")
    assert second.step == 3
    whole.train(), second.train()
    equal(second.model, whole.model)
    equal(second.ema.module, whole.ema.module)
    losses = [[json.loads(x)["loss"] for x in (t.out / "log.jsonl").read_text().splitlines()] for t in (whole, second)]
    assert losses[0][3:] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(towers, tmp_path, number):
    whole = trainer(tmp_path / "whole")
    whole.train()
    run = trainer(tmp_path / "parts", save_every=100)
    step, handler = run.train_step, signal.getsignal(number)

    def told():
        if run.step == 3:
            os.kill(os.getpid(), number)
        return step()

    run.train_step = told
    run.train()
    assert run.stopped == number and run.step == 4 and not (tmp_path / "parts" / "model").exists()
    assert signal.getsignal(number) == handler
    again = trainer(tmp_path / "parts", save_every=100)
    assert again.step == 4
    again.train()
    equal(again.model, whole.model)


@pytest.mark.slow
def test_sigterm_from_outside(tmp_path):
    """The command as it is run: workers end with it, its status tells the signal, and it goes on."""
    command = [sys.executable, "-m", "hyperclip_fast.cli", "train", "--config", "folder", "--smoke"]
    command += ["--out", str(tmp_path), "--steps", "100000"]
    log = tmp_path / "log.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Stopped at step" in output and "Traceback" not in output
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] > 2


@pytest.mark.parametrize("part", ["image", "text", "hypernetwork", "logit"])
def test_a_frozen_part_stays_as_it_is(towers, tmp_path, part):
    run = trainer_of(tiny_config(train_text=True), replace(CONFIG, freeze=(part,)), tmp_path)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(2):
        run.train_step()
    moved = {part_of(name) for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"image", "text", "hypernetwork", "logit"} - {part}
    assert run.model.image.training == (part != "image")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_text_tower_of_the_models_own(towers, tmp_path, accumulate):
    """Its projection is frozen with it, and what it gives is computed once."""
    config = replace(CONFIG, freeze=("text",), accumulate=accumulate)
    run = trainer_of(tiny_config(train_text=True), config, tmp_path)
    calls = run.model.text.calls
    run.train_step(), run.train_step()
    assert run.model.text.calls == calls == 1


@pytest.mark.parametrize("tower", ["minilm", "transformer:width=32,depth=2,heads=2"])
def test_checkpointing_a_text_tower_changes_no_gradient(tmp_path, tower):
    norms = []
    for on in (False, True):
        config = replace(CONFIG, grad_checkpointing=on, tasks_per_batch=1)
        run = trainer_of(tiny_config(text_tower=tower, train_text=True), config, tmp_path / str(on))
        torch.manual_seed(0)  # dropout: the same in both runs, and in the second forward pass
        weights, saved = {p.untyped_storage().data_ptr() for p in run.model.parameters()}, []

        def note(tensor, weights=weights, saved=saved):
            if tensor.untyped_storage().data_ptr() not in weights:
                saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run.wrapped(run.inputs(run.next_batch()))[0].backward()
        norms.append((torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item(), sum(saved)))
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4)
    assert norms[1][1] < 0.7 * norms[0][1]


def test_parts_have_rates_and_decay_of_their_own(towers, tmp_path):
    changes = {"image_lr": 1e-4, "hyper_lr": 0.0, "text_weight_decay": 0.5, "weight_decay": 0.1, "lr": 1e-3}
    run = trainer_of(tiny_config(), replace(CONFIG, warmup=4, **changes), tmp_path)
    run.train_step()
    names = {id(p): name for name, p in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            part = part_of(names[id(parameter)])
            assert group["lr"] == pytest.approx({"image": 1e-4, "hypernetwork": 0}.get(part, 1e-3) / 4)
            if parameter.ndim > 1 and "pos_embed" not in names[id(parameter)] and "token" not in names[id(parameter)]:
                assert group["weight_decay"] == (0.5 if part == "text" else 0.1)


@pytest.mark.parametrize("schedule, middle, last", [("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_schedules(schedule, middle, last):
    config = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1, schedule=schedule)
    assert learning_rate(4, config) == pytest.approx(0.5)
    assert learning_rate(60, config) == pytest.approx(middle)
    assert learning_rate(110, config) == pytest.approx(last)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_precision_trains_near_float32(towers, tmp_path, precision, accumulate):
    runs = [
        trainer(tmp_path / name, precision=name, accumulate=accumulate, warmup=1, clip=0.0, lr=1e-4)
        for name in ("float32", precision)
    ]
    if precision == "float16":
        runs[1].scaler = torch.amp.GradScaler("cpu", init_scale=64)  # the first one's 65536 overflows, and falls
    exact, rough = ([run.train_step() for _ in range(4)] for run in runs)
    for ours, expected in zip(rough, exact):
        assert float(ours["loss"]) == pytest.approx(float(expected["loss"]), rel=0.03)
        assert float(ours["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=0.15)
    if precision == "float16":
        assert runs[1].scaler.get_scale() == 64  # no step was left out
    assert next(runs[1].model.image.parameters()).dtype == torch.float32


def test_checkpointing_and_compiling_change_no_gradient(towers, tmp_path, monkeypatch):
    compiled, compile_module = [], nn.Module.compile

    def compile_eagerly(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    changes = [replace(CONFIG, grad_checkpointing=on, compile=on) for on in (False, True)]
    runs = [trainer_of(tiny_config(), change, tmp_path / str(i)) for i, change in enumerate(changes)]
    losses = [[float(run.train_step()["loss"]) for _ in range(2)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert compiled == ["HyperViT", "HyperNetwork"] and runs[1].model.image.grad_checkpointing


def test_the_average_of_the_weights_is_what_a_run_gives(towers, tmp_path):
    run = trainer(tmp_path, ema=0.5, steps=3)
    expected = None
    for step in range(1, 4):
        run.train_step()
        decay = run.ema.get_decay(step)
        now = run.model.text_projection.weight.detach()
        expected = now.clone() if expected is None else decay * expected + (1 - decay) * now
    run.train()
    saved = HyperCLIP.from_pretrained(str(tmp_path / "model"))
    torch.testing.assert_close(saved.text_projection.weight.detach(), expected)
    assert not torch.equal(saved.text_projection.weight, run.model.text_projection.weight)


def test_a_step_that_overflows_is_left_out_and_logged_as_such(towers, tmp_path):
    run = trainer(tmp_path, precision="float16", steps=2)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1e9)
    before = run.model.text_projection.weight.detach().clone()
    metrics = run.train_step()
    assert torch.equal(run.model.text_projection.weight, before) and run.scaler.get_scale() < 1e9
    assert run.measures(metrics, 1.0)["grad_norm"] is None


def test_logs_say_what_happened(towers, tmp_path):
    run = trainer(tmp_path, tensorboard=True, clip=1e-3)
    run.train()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    parts = [line[f"grad_norm_{part}"] for part in ("image", "text", "hypernetwork", "logit")]
    assert sum(norm**2 for norm in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-3)  # before clipping
    assert {"loss", "accuracy", "lr", "images_per_second", "logit_scale", "logit_bias", "broken"} <= set(line)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("logit_bias")[0].value == pytest.approx(line["logit_bias"], abs=1e-4)
    assert "held_out/right" in events.Tags()["scalars"]


def test_the_bias_follows_the_batch_where_asked(towers, tmp_path):
    model = tiny_config(init_logit_bias=-7.0)
    run = trainer_of(model, replace(CONFIG, balance_bias=True, classes_per_task=(2, 6)), tmp_path)
    assert run.model.logit_bias.item() == pytest.approx(-1.0986123)
    assert trainer(tmp_path / "other").model.logit_bias.item() == -1.0


def test_changes_from_the_command_line(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {lr: 0.1, steps: 5}")
    changes = ["train.lr=3e-4", "train.classes_per_task=[4, 8]", "model.text_tower=open_clip:ViT-B-32", "data.path=a=b"]
    run = load_config(tmp_path / "config.yaml", changes)
    assert (run.train.lr, run.train.steps, run.train.class_range) == (3e-4, 5, (4, 8))
    assert (run.model.text_tower, run.data.path) == ("open_clip:ViT-B-32", "a=b")
    for change, message in (("lr=1", "--set must be"), ("train.speed=1", "unknown keys"), ("train.lr=", "lr must be")):
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "config.yaml", [change])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_runs_as_a_rehearsal(tmp_path, config, capsys):
    assert main(["train", "--config", str(config), "--smoke", "--out", str(tmp_path)]) == 0
    assert "The model:" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    HyperCLIP.from_pretrained(str(tmp_path / "model"))


def test_a_callback_sees_every_step_and_changes_no_run(towers, tmp_path):
    seen = []

    def look(run, metrics):
        torch.rand(3)
        seen.append((run.step, sorted(metrics)))

    config = tiny_config(), replace(CONFIG, steps=3)
    watched = trainer_of(*config, tmp_path / "watched", callback=look).train()
    plain = trainer_of(*config, tmp_path / "plain").train()
    assert seen == [(step, ["accuracy", "grad_norm", "loss"]) for step in (1, 2, 3)]
    for ours, theirs in zip(watched.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)


def test_what_a_callback_logs_and_saves_comes_after_the_step(towers, tmp_path):
    def look(run, metrics):
        if run.step == 2:
            run.log({"seen": float(metrics["loss"])})
            run.save()
        if run.step == 4:
            raise KeyboardInterrupt  # after a line that the checkpoint does not know

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, callback=look, save_every=100).train()
    again = trainer(tmp_path, save_every=100)
    assert again.step == 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], "seen" in line) for line in lines] == [(1, False), (2, False), (2, True)]
    assert lines[2]["seen"] == pytest.approx(lines[1]["loss"], abs=1e-4)


def test_a_given_model_is_trained_on_and_resumed(towers, tmp_path):
    """Its own weights are where a run begins; a checkpoint's take their place."""
    given, config = tiny_config(), replace(CONFIG, steps=3, balance_bias=True)
    model = trainer_of(given, config, tmp_path / "first").train()
    start = copy.deepcopy(model)
    run = trainer_of(given, config, tmp_path / "second", model=model)
    equal(run.model, start)
    run.train_step()
    run.save()
    again = trainer_of(given, config, tmp_path / "second", model=start)
    assert again.step == 1
    equal(again.model, run.model)


@pytest.mark.parametrize("data", [None, DataConfig(sets=("digits",))])
def test_a_folder_tells_its_data_where_that_is_what_is_trained_on(towers, tmp_path, data):
    """A run's folder that an older version began is one that this version goes on with."""
    if data is None:
        trainer(tmp_path)
    else:
        run = Trainer(RunConfig(tiny_config(), CONFIG, data), tmp_path)
        assert [task.name for task in run.held_out] == ["digits"]
    known = json.loads((tmp_path / "config.json").read_text())
    assert known.get("data") == (None if data is None else json.loads(json.dumps(asdict(data))))
    assert list(known)[:2] == ["model", "train"]


def test_held_out_tasks_come_with_a_source(towers, tmp_path):
    with pytest.raises(ValueError, match="held_out must come with a source"):
        Trainer(RunConfig(tiny_config(), CONFIG), tmp_path, held_out=held_out_tasks(pictures()))
