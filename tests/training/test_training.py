"""The trainer learns, resumes bit for bit, and refuses what it cannot do; the swap test scores what it says."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.picture_source import picture_source
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.task_sampler import TaskSampler
from hyperclip_fast.evaluation.swapping import ELSEWHERE, ROW_SOURCES, accuracy, predict, row_names, swap_test
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams
from hyperclip_fast.training.config import RunConfig, TrainConfig, load_config
from hyperclip_fast.training.distributed import share
from hyperclip_fast.training.optimizer import learning_rate
from hyperclip_fast.training.trainer import Trainer, new_model
from tests.towers import patch_text_tower, tiny_config, tiny_model

CONFIG = TrainConfig(
    steps=6, tasks_per_batch=2, classes_per_task=4, lr=3e-3, warmup=2, log_every=1, eval_every=0, save_every=3
)


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def pictures(names_per_group=12, per_name=3):
    """Blocks of colour, one colour a name, that augmentation leaves recognisable; a third of the names held out."""
    generator = torch.Generator().manual_seed(0)
    count = 3 * names_per_group
    names = tuple(f"thing {i}" for i in range(count))
    groups = tuple("abc"[i % 3] for i in range(count))
    colours = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    rgb = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = torch.cat([rgb, torch.full((count, 1, 32, 32), 255, dtype=torch.uint8)], 1).repeat_interleave(per_name, 0)
    labels = torch.arange(count).repeat_interleave(per_name)
    return Pictures(images, labels, names, groups, labels % 6 >= 4)


def trainer_of(model_config, config, out, **options):
    """A Trainer on the pictures."""
    data = pictures()
    source = picture_source(data, config.batch_shape, Preprocessing(32), share())
    return Trainer(RunConfig(model_config, config), out, source=source, held_out=held_out_tasks(data), **options)


def trainer(out, callback=None, **changes):
    model = tiny_config(drop_path_rate=0.2, init_logit_bias=-1.0)
    return trainer_of(model, replace(CONFIG, **changes), out, callback=callback)


def test_training_learns(tmp_path):
    run = trainer(tmp_path, steps=80, warmup=10, save_every=80)
    first = torch.stack([run.train_step()["loss"] for _ in range(5)]).mean()
    while run.step < 80:
        metrics = run.train_step()
    assert metrics["loss"] < 0.7 * first
    assert not torch.equal(run.model.adapt([["a", "b"]]).table, run.model.image.base_params.table)


def test_a_resumed_run_is_bit_equal(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "parts")
    for _ in range(4):  # one step beyond what the checkpoint will hold
        first.train_step()
        first.log({})
        if first.step == 3:
            first.save()
    second = trainer(tmp_path / "parts")
    assert second.step == 3
    second.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held_out" not in line] == [1, 2, 3, 4, 5, 6]
    whole_lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line.get("step", 0) > 3 and "loss" in line] == [
        line["loss"] for line in whole_lines if line["step"] > 3 and "loss" in line
    ]
    assert not [file.name for file in (tmp_path / "parts").iterdir() if "tmp" in file.name]
    loaded = HyperCLIP.from_pretrained(str(tmp_path / "parts" / "model"))
    assert torch.equal(loaded.logit_scale, whole.model.logit_scale)


def test_a_finished_run_is_not_evaluated_again(tmp_path):
    trainer(tmp_path, steps=2).train()
    log = (tmp_path / "log.jsonl").read_text()
    again = trainer(tmp_path, steps=2)
    assert not again.train().training
    assert (tmp_path / "log.jsonl").read_text() == log


def test_a_run_killed_while_it_writes_its_model_is_not_finished(tmp_path, monkeypatch):
    def killed(model, folder):
        folder.mkdir(exist_ok=True)
        (folder / "part").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HyperCLIP, "save_pretrained", killed)
        trainer(tmp_path, steps=2).train()
    model = trainer(tmp_path, steps=2).train()
    assert torch.equal(HyperCLIP.from_pretrained(tmp_path / "model").logit_scale, model.logit_scale)
    assert not [file.name for file in tmp_path.iterdir() if "tmp" in file.name]
    assert not (tmp_path / "model" / "part").exists()


def test_a_model_takes_the_place_of_another(tmp_path):
    trainer(tmp_path, steps=2).train()
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "model" / "other").write_text("")
    trainer(tmp_path, steps=2).train()
    assert not (tmp_path / "model" / "other").exists() and (tmp_path / "model" / "model.safetensors").exists()


def test_the_trainers_own_evaluation_takes_three_rows(tmp_path):
    run = trainer(tmp_path)
    assert tuple(run.evaluate()) == ("right", "base", "wrong")


def test_seeds_differ_and_repeat(tmp_path):
    losses = [float(trainer(tmp_path / str(i), seed=seed).train_step()["loss"]) for i, seed in enumerate((0, 0, 1))]
    assert losses[0] == losses[1] != losses[2]


def test_a_trainable_text_tower_trains(tmp_path):
    run = trainer_of(tiny_config(train_text=True), CONFIG, tmp_path)
    before = run.model.text.matrix.detach().clone()
    run.train_step()
    assert not torch.equal(before, run.model.text.matrix)


def test_weight_decay_spares_vectors_and_positions(tmp_path):
    run = trainer(tmp_path)
    spared = {id(p) for group in run.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        vector = parameter.ndim <= 1 or name in ("image.pos_embed", "image.cls_token")
        assert (id(parameter) in spared) == vector, name


def test_schedule():
    config = TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == learning_rate(10, config) == 1.0
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    trainer(tmp_path)
    with pytest.raises(ValueError, match="another one"):
        trainer(tmp_path, lr=1e-4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {colour: red}", "unknown keys \\['colour'\\]"),
        ("train: {speed: 3}", "unknown keys \\['speed'\\]"),
        ("train: {steps: 0}", "steps must be at least 1"),
        ("train: {lr: 0}", "lr must be greater than 0, got 0"),
        ("train: {warmup: -1}", "warmup must not be negative"),
        ("train: {classes_per_task: [8, 4]}", "classes_per_task must be at least 2"),
        ("train: {classes_per_task: many}", "classes_per_task must be int"),
        ("train: {ema: 1.0}", "ema must lie"),
        ("train: {schedule: steep}", "schedule must be one of"),
        ("train: {precision: int8}", "precision must be one of"),
        ("train: {freeze: [head]}", "freeze must name some of"),
        ("train: {parallel: fsdp, ema: 0.9}", "go with ddp"),
        ("data: {kind: video}", "kind must be one of"),
        ("data: {crop: 0}", "crop and flip must lie"),
        ("data: {sets: []}", "sets must be distinct names from"),
        ("data: {sets: [openmoji, openmoji]}", "sets must be distinct names from"),
        ("data: {sets: [scene]}", "sets must be distinct names from .*scenes"),
        ("data: {sets: [digits, scenes]}", "sets must hold openmoji"),
        ("data: {wordings: [a picture]}", "wordings must be texts with one"),
        ("data: {group_weights: {digits: -1}}", "group_weights must be numbers of at least 0"),
        ("data: {workers: -1}", "workers must be at least 0"),
        ("train: {classes_per_task: 1}", "classes_per_task must be at least 2"),
        ("train: {steps: many}", "steps must be int, got 'many'"),
        ("train: {lr: fast}", "lr must be float, got 'fast'"),
        ("train: {betas: 0.9}", "betas must be"),
        ("train: {betas: [0.9]}", "betas must be"),
        ("train: 3", "train must be a mapping"),
        ("model: {conditioned: 1}", "conditioned must be bool"),
        ("[1, 2]", "sections model and train"),
        ("{", "must be a YAML or JSON file"),
    ],
)
def test_refused_configs(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.yaml")


def test_held_out_tasks_cover_the_held_out_names_once():
    data = pictures(names_per_group=12)
    tasks = held_out_tasks(data, classes=3, min_classes=2)
    names = [name for task in tasks for name in task.class_names]
    assert sorted(names) == sorted(name for i, name in enumerate(data.names) if i % 6 >= 4)
    for task in tasks:
        assert len(task.class_names) <= 3
        for image, label in zip(task.images, task.labels):
            source = data.names.index(task.class_names[label])
            assert torch.equal(image, data.images[data.labels == source][0])
    assert held_out_tasks(data, classes=3, min_classes=50) == []


@pytest.mark.parametrize("row", ROW_SOURCES)
def test_predictions_equal_one_image_at_a_time(row):
    model, tasks = tiny_model(), held_out_tasks(pictures(), min_classes=2)
    assert len(tasks) >= 2
    together = predict(model, tasks, row, batch_size=5)
    rows = model.adapt([task.class_names for task in tasks]).table
    table = {
        "right": rows,
        "base": model.image.base_params.table.expand(len(tasks), -1),
        "wrong": rows.roll(len(tasks) // 2, 0),
        "generic": model.adapt([["an object"]] * len(tasks)).table,
        "shuffled": model.adapt(row_names(tasks, "shuffled")).table,
    }[row]
    with torch.no_grad():
        for t, (task, best) in enumerate(zip(tasks, together)):
            params = NormParams(model.image.norm_spec, table[t : t + 1])
            rgb = task.images[:, :3].float() / 127.5 - 1  # opaque pictures
            scores = model.encode_image(rgb, params) @ model.encode_text(task.class_names).T
            assert torch.equal(best, scores.argmax(1))


def test_shuffled_names_keep_their_words_and_lengths():
    task = EvalTask("t", ("red apple", "a big black dog", "cat"), torch.zeros(1, 4, 8, 8), torch.tensor([0]))
    (shuffled,) = row_names([task], "shuffled")
    assert [len(name.split()) for name in shuffled] == [2, 4, 1] and shuffled != task.class_names
    assert sorted(" ".join(shuffled).split()) == sorted(" ".join(task.class_names).split())
    with pytest.raises(ValueError, match="row must be one of"):
        row_names([task], "base")


def test_accuracy_and_swap_test():
    task = EvalTask("t", ("a", "b"), torch.zeros(4, 4, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0]))
    assert accuracy([task], [torch.tensor([0, 1, 0, 0])]) == {"t": 0.75}
    model, tasks = tiny_model(), held_out_tasks(pictures(), min_classes=2)
    result = swap_test(model.train(), tasks)
    assert model.training
    assert tuple(result) == ROW_SOURCES
    assert swap_test(model, tasks, rows=("wrong", "right")) == {row: result[row] for row in ("wrong", "right")}
    for by_task in result.values():
        assert set(by_task) == {task.name for task in tasks}
    with pytest.raises(ValueError, match="row must be one of"):
        predict(model, tasks, "left")
    assert row_names(tasks[:1], "wrong") == [ELSEWHERE]


def test_numbers_as_yaml_reads_them(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "train: {lr: 1e-3, clip: 2, betas: [0, 0.98]}"
    )  # 1e-3 is a string in YAML 1.1
    config = load_config(tmp_path / "config.yaml").train
    assert (config.lr, config.clip, config.betas) == (1e-3, 2.0, (0.0, 0.98))


def test_a_run_starts_from_a_saved_model_with_its_own_text_tower_and_bias(tmp_path):
    start = tiny_model()
    start._own_text = True
    start.text_tower.save = lambda folder: None
    start.save_pretrained(tmp_path / "start")
    train = replace(CONFIG, init=str(tmp_path / "start"))
    model = new_model(RunConfig(start.config, train))
    assert model._own_text and model._text_folder == tmp_path / "start" / "text"
    assert torch.equal(model.logit_bias, start.logit_bias)
    balanced = new_model(RunConfig(start.config, replace(train, balance_bias=True)))
    assert balanced.logit_bias.item() == pytest.approx(-math.log(4 - 1))
    (tmp_path / "run.yaml").write_text(f"train: {{init: {tmp_path / 'start'}}}")
    assert load_config(tmp_path / "run.yaml").model == HyperCLIP.from_pretrained(tmp_path / "start").config


@pytest.mark.parametrize("weights", [{"a": 0, "b": 0, "c": 0}, {"a": math.inf}])
def test_group_weights_that_leave_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="group_weights must be finite, and leave a group"):
        TaskSampler(pictures(), group_weights=weights)
