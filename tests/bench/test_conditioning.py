"""The conditioning experiment: its queue, a run from start to log, what is scored against what, the report's sums."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from hyperclip_fast.bench.conditioning import __main__ as conditioning
from hyperclip_fast.bench.conditioning import experiment as conditioning_experiment
from hyperclip_fast.bench.conditioning import overheads as conditioning_overheads
from hyperclip_fast.bench.conditioning import scores as conditioning_scores
from hyperclip_fast.bench.conditioning.arms import Run, load_runs
from hyperclip_fast.bench.conditioning.logs import gains, grouped, read_logs, spread, verdict
from hyperclip_fast.bench.conditioning.plots import draw
from hyperclip_fast.bench.conditioning.report import (
    arms_table,
    attributes_table,
    drops_table,
    findings,
    names_table,
    report,
    shuffling,
    swap_table,
)
from hyperclip_fast.bench.conditioning.scores import SCENES, SHUFFLED, SceneTasks, all_scores, guessing
from hyperclip_fast.bench.conditioning.tuning import METHODS, tune
from hyperclip_fast.bench.conditioning.width import schedule, width_table, widths
from hyperclip_fast.data.scenes import ATTRIBUTES, CHANCES, COMBINATIONS, scene_tasks
from hyperclip_fast.training.config import TrainConfig
from tests.data.test_scenes import blocks
from tests.towers import patch_text_tower, tiny_model

PLAN = """
model: {img_size: 48, patch_size: 16, width: 32, depth: 1, num_heads: 2, embed_dim: 16, hyper_width: 32}
position_scale: 2.0
train: {steps: 4, tasks_per_batch: 6, classes_per_task: 2, log_every: 2, lr: 1.0e-3}
arms:
  baseline: {conditioned: false}
  cross: {hyper_pool: cross}
  wide: {conditioned: false}
  norms: {conditioned: false, tune: norms}
  lora: {conditioned: false, tune: lora}
  adapters: {conditioned: false, tune: adapters}
groups:
  a: {arms: [baseline, cross], seeds: [0, 1], train: {steps: 5}}
  b: {arms: [wide, norms, lora, adapters], seeds: [0], overrides: {wide: {width: 64}}}
"""


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


@pytest.fixture(scope="module")
def tasks():
    data = blocks()
    return [SceneTasks(scene_tasks(data, scenes=24, classes=4, wording=wording)) for wording in (0, -1)]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text(PLAN)
    monkeypatch.setattr(conditioning_experiment, "load_pictures", lambda sets, size: blocks())
    monkeypatch.setattr(
        conditioning_experiment,
        "scene_tasks",
        lambda data, **options: scene_tasks(data, **{**options, "scenes": 24, "classes": 4}),
    )
    return [
        "--config",
        str(tmp_path / "plan.yaml"),
        "--results",
        str(tmp_path / "logs"),
        "--work",
        str(tmp_path / "work"),
    ]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_queue(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    runs = load_runs(tmp_path / "plan.yaml")
    assert [run.name for run in runs][:4] == ["a-baseline-0", "a-cross-0", "a-baseline-1", "a-cross-1"]
    assert [run.tune for run in runs[4:]] == ["", "norms", "lora", "adapters"]
    assert runs[4].model.width == 64 and runs[5].model.width == 32 and runs[0].train.steps == 5
    assert not runs[0].model.conditioned and runs[1].model.conditioned and runs[1].train.seed == 0
    for text, message in (
        ("model: {}", "sections"),
        (PLAN.replace("[baseline, cross]", "[tall]"), "unknown arms"),
        (PLAN.replace("scale: 2.0", "scale: -2.0"), "position_scale must be a positive number"),
    ):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_runs(tmp_path / "plan.yaml")


def test_the_queue_in_the_repository_is_whole():
    runs = load_runs("bench/conditioning/queue.yaml")
    assert len({run.name for run in runs}) == len(runs)
    plain = {paired(run) for run in runs if run.arm in ("baseline", "wide")}
    groups = {run.group for run in runs}
    for group in groups:
        cross = [run for run in runs if (run.group, run.arm) == (group, "cross")]
        assert len(cross) >= 3 and all(paired(run) in plain for run in cross)
        baselines = {run.seed: run for run in runs if (run.group, run.arm) == (group, "baseline")}
        for run in (run for run in runs if run.group == group and run.tune):
            assert run.model == baselines[run.seed].model and run.tune in METHODS


def paired(run):
    return schedule(asdict(run.model), asdict(run.train)), run.seed


@pytest.mark.slow
def test_run_and_report(plan, tmp_path, capsys):
    assert conditioning.main(["run", *plan]) == 2  # the rivals' baseline belongs to another group
    assert "needs its group's baseline" in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text(PLAN.replace("[wide, ", "[baseline, wide, "))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "logs").iterdir()}
    assert conditioning.main(["run", *plan]) == 0
    assert all((tmp_path / "logs" / name).stat().st_mtime_ns == time for name, time in before.items())
    logs = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "logs").iterdir()
    }
    assert set(logs) == {"a-baseline-0", "a-cross-0", "a-baseline-1", "a-cross-1"} | {
        f"b-{arm}-0" for arm in ("baseline", "wide", "norms", "lora", "adapters")
    }
    first, last = logs["a-cross-0"][0], logs["a-cross-0"][-1]
    assert first["parameters"] > logs["a-baseline-0"][0]["parameters"] == first["image_parameters"] + 24 * 16 + 2
    assert set(last["scores"]["matrix"]) == set(ATTRIBUTES) and last["step"] == 5
    assert [line["step"] for line in logs["a-cross-0"][1:-1] if "accuracy" in line] == [2, 4]
    assert logs["b-norms-0"][-1]["parameters_per_task"] == 2 * 3 * 32
    assert 0 < logs["b-lora-0"][-1]["parameters_per_task"] != logs["b-norms-0"][-1]["parameters_per_task"]
    assert logs["b-adapters-0"][-1]["parameters_per_task"] == (32 + 1) * 16 + (16 + 1) * 32
    (tmp_path / "logs" / "conclusion.md").write_text("Nothing follows from four steps.\n")
    assert first["position_scale"] == 2.0
    assert conditioning.main(["report", *plan[:4]]) == 0
    text = (tmp_path / "logs.md").read_text()
    assert "start at 2 times timm's scale" in text and "](logs/arms.png)" in text and str(tmp_path) not in text
    assert (
        "cross over the baseline" in text
        and "no hypernetwork | 2 |" in text
        and "one seed only" not in text.split("## Group b")[0]
    )
    assert "| vit_tiny_patch16_224, width 32 | " in text.split("## Gain against width")[1]
    assert {path.name for path in (tmp_path / "logs").glob("*.png")} == {
        "arms.png",
        "swap.png",
        "width.png",
        "names.png",
        "curves.png",
    }


def test_a_rival_trains_its_baseline_where_there_is_its_log_alone(plan, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("[wide, ", "[baseline, "))
    only = ["--only", "b-norms-0"]
    assert conditioning.main(["run", *plan, *only]) == 0  # which trains the baseline first
    log, path = tmp_path / "logs" / "b-norms-0.jsonl", tmp_path / "logs" / "b-baseline-0.jsonl"
    first, baseline = read(log)[-1]["scores"], path.read_text()
    log.unlink()
    shutil.rmtree(tmp_path / "work")  # the baseline's log is all that is left of it
    assert conditioning.main(["run", *plan, *only]) == 0
    assert read(log)[-1]["scores"] == first and path.read_text() == baseline
    assert first["before"] == read(path)[-1]["scores"]["right"]


def test_a_stopped_rival_goes_on_where_it_was(plan, tmp_path, monkeypatch, capsys):
    """In the third attribute's second step; of the first two nothing is tuned again."""
    (tmp_path / "plan.yaml").write_text(PLAN.replace("[wide, ", "[baseline, "))
    only, log, steps = ["--only", "b-norms-0"], tmp_path / "logs" / "b-norms-0.jsonl", []
    assert conditioning.main(["run", *plan, *only]) == 0
    whole = read(log)[-1]
    log.unlink()
    shutil.rmtree(tmp_path / "work" / "b-norms-0")
    step = conditioning_experiment.Trainer.train_step

    def told(trainer):
        steps.append((trainer.out.name, trainer.step))
        if steps[-1] == (ATTRIBUTES[2], 1) and len(steps) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(conditioning_experiment.Trainer, "train_step", told)
    assert conditioning.main(["run", *plan, *only]) == 130 and not log.exists()
    assert "goes on from there" in capsys.readouterr().err
    assert conditioning.main(["run", *plan, *only]) == 0
    assert steps == [(attribute, i) for attribute in ATTRIBUTES for i in range(4)]
    assert read(log)[-1]["scores"] == whole["scores"] and read(log)[-1]["seconds"] > 0


TOWERS = {
    "vit": {"img_size": 48, "patch_size": 16},
    "mobilenet": {"image_tower": "mobilenetv3_small_050", "img_size": 32}
    | dict.fromkeys(("patch_size", "width", "depth", "num_heads")),
}


@pytest.fixture(params=TOWERS)
def baseline(request):
    return tiny_model(conditioned=False, **TOWERS[request.param])


def tuned_names(encoder):
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_rivals_start_as_the_baseline(baseline, method):
    images = torch.randn(3, 3, *[baseline.image_size] * 2, generator=torch.Generator().manual_seed(0))
    plain = baseline.specialize(["any"])
    with torch.no_grad():
        expected = plain(images)
    encoder = METHODS[method](baseline.specialize(["any"]), baseline).eval()
    assert torch.equal(encoder(images), expected)
    norms = {f"{name}.{kind}" for name in baseline.image.norm_spec.names for kind in ("weight", "bias")}
    tuned = tuned_names(encoder)
    if method == "norms":
        assert tuned == norms
    else:
        assert tuned and all("lora_" in name or name.startswith("adapters.") for name in tuned)
    encoder(images).sum().backward()
    assert {name for name, one in encoder.named_parameters() if one.grad is not None} == tuned


@pytest.mark.parametrize(
    ("tower", "widths"),
    [("vit", [32, 32]), ("mobilenet", [8, 16, 16, 24, 24, 24, 24, 24, 48, 48, 48, 288])],
)
def test_one_adapter_a_block(tower, widths):
    model = tiny_model(conditioned=False, **TOWERS[tower])
    encoder = METHODS["adapters"](model.specialize(["any"]), model)
    counts = [sum(parameter.numel() for parameter in adapter.parameters()) for adapter in encoder.adapters]
    assert counts == [2 * width * min(width // 2, 32) + min(width // 2, 32) + width for width in widths]


@pytest.mark.parametrize("method", METHODS)
def test_tuning_moves_what_it_should_and_nothing_else(baseline, method, tmp_path):
    run = Run(
        "g", method, baseline.config, TrainConfig(steps=3, tasks_per_batch=2, classes_per_task=2, lr=1e-2), method
    )
    torch.manual_seed(run.seed)
    start = METHODS[method](baseline.specialize(["any"]), baseline).state_dict()  # with BatchNorm's statistics
    encoder, count = tune(baseline, run, "colour", blocks(), tmp_path / "run")
    state = encoder.state_dict()
    assert {name for name in state if not torch.equal(state[name], start[name])} == tuned_names(encoder)
    assert count == sum(state[name].numel() for name in tuned_names(encoder))
    with pytest.raises(ValueError, match="tune must be one of"):
        tune(baseline, replace(run, tune="prompts"), "colour", blocks(), tmp_path / "other")


def test_a_stopped_run_goes_on_where_it_was(plan, tmp_path, monkeypatch):
    only = ["--only", "a-cross-0"]
    assert conditioning.main(["run", *plan, *only]) == 0
    whole = (tmp_path / "logs" / "a-cross-0.jsonl").read_text().splitlines()
    (tmp_path / "logs" / "a-cross-0.jsonl").unlink()
    (tmp_path / "work").rename(tmp_path / "first")
    step = conditioning_experiment.Trainer.train_step

    def stop(trainer):
        if trainer.step == 3:
            raise ValueError("stopped")
        return step(trainer)

    monkeypatch.setattr(conditioning_experiment.Trainer, "train_step", stop)
    assert conditioning.main(["run", *plan, *only]) == 2
    assert not (tmp_path / "logs" / "a-cross-0.jsonl").exists()
    monkeypatch.setattr(conditioning_experiment.Trainer, "train_step", step)
    assert conditioning.main(["run", *plan, *only]) == 0
    again = (tmp_path / "logs" / "a-cross-0.jsonl").read_text().splitlines()
    assert json.loads(again[-1])["scores"] == json.loads(whole[-1])["scores"]
    assert [json.loads(line).get("held_out") for line in again] == [json.loads(line).get("held_out") for line in whole]


def test_scores_equal_one_scene_at_a_time(tasks):
    scenes, reworded = tasks
    model = tiny_model(img_size=48, patch_size=16)
    scores = all_scores(model, scenes, reworded)
    sources = {"colour": scenes.tasks["colour"][0].class_names, "size": scenes.tasks["size"][0].class_names}
    task = scenes.tasks["colour"][0]
    classes = model.encode_text(task.class_names)
    for source, names in sources.items():
        with torch.no_grad():
            row = model.adapt([names])
            best = torch.cat([(model.encode_image(image[None], row) @ classes.T).argmax(1) for image in scenes.images])
        recalls = [(best[task.labels == k] == k).double().mean() for k in task.labels.unique()]
        assert scores["matrix"][source]["colour"] == pytest.approx(float(torch.stack(recalls).mean()))
    assert scores["right"]["colour"] == scores["matrix"]["colour"]["colour"]
    wrong = [scores["matrix"][source]["colour"] for source in ATTRIBUTES if source != "colour"]
    assert scores["wrong"]["colour"] == pytest.approx(sum(wrong) / 5)
    assert tuple(scores["shuffled"]) == SHUFFLED


def test_shuffled_is_scored_where_it_gives_other_names(tasks):
    assert SHUFFLED == ("object", "colour", "size", "orientation", "place")
    for attribute in ATTRIBUTES[1:]:
        right, dealt = (sorted(tasks[0].names(attribute, row)[0]) for row in ("right", "shuffled"))
        assert (right != dealt) == (attribute in SHUFFLED)


def test_position_embeddings_start_at_the_scale(plan, tmp_path):
    run = load_runs(plan[1])[1]
    experiment = conditioning.Experiment(tmp_path, tmp_path)
    one, scaled = (
        experiment.trainer(replace(run, arm=f"{scale}", position_scale=scale)).model.image.pos_embed
        for scale in (1.0, run.position_scale)
    )
    assert torch.equal(scaled, 2 * one) and one.abs().max() > 0


@pytest.mark.parametrize("attribute", ["colour", "count", "size", "place"])
def test_guessing_is_what_guesses_give(attribute):
    generator = torch.Generator().manual_seed(0)
    classes = len(dict.fromkeys(conditioning_scores.VALUES[attribute]))
    if attribute == "colour":
        labels = torch.randint(classes, (2000, SCENES), generator=generator)
    else:
        column = ("count", "size", "place").index(attribute)
        labels = COMBINATIONS[torch.multinomial(CHANCES.expand(2000, -1), SCENES, True, generator=generator), column]
    right = torch.randint(classes, labels.shape, generator=generator) == labels
    counts, hits = torch.zeros(2000, classes), torch.zeros(2000, classes)
    counts.scatter_add_(1, labels, torch.ones(labels.shape))
    hits.scatter_add_(1, labels, right.float())
    recalls = (hits / counts).mean(1)
    chance, error = guessing(attribute)
    assert chance == pytest.approx(float(recalls.mean()), rel=0.02)
    assert error == pytest.approx(float(recalls.std()), rel=0.08)


@torch.inference_mode()
def test_objects_among_other_numbers_of_names(tasks):
    model = tiny_model(img_size=48, patch_size=16)
    scenes = tasks[0]
    by_four = conditioning_scores.object_accuracy(model, scenes, 4)
    ids, labels = scenes.set_ids("object"), torch.cat([task.labels for task in scenes.tasks["object"]])
    names = [task.class_names for task in scenes.tasks["object"]]
    table = model.adapt(names).table.detach()
    features = conditioning_scores.embed(model, scenes.images, table, ids)
    best = torch.stack([model.encode_text(part) @ f for part, f in zip([names[i] for i in ids], features)]).argmax(1)
    assert by_four == pytest.approx(float((best == labels).double().mean()))
    assert conditioning_scores.object_accuracy(model, scenes, 16) is None


def test_an_accuracy_of_zero_is_kept(tasks, monkeypatch):
    monkeypatch.setattr(conditioning_scores, "object_accuracy", lambda model, scenes, k: None if k > 4 else (4 - k) / 4)
    model = tiny_model(img_size=48, patch_size=16, conditioned=False)
    assert all_scores(model, *tasks)["objects_by_names"] == {"2": 0.5, "4": 0.0}
    old = [log("baseline", seed, 0.4) for seed in (0, 1)]
    old[0]["scores"]["objects_by_names"], old[1]["scores"]["objects_by_names"] = {"2": 0.5}, {"2": 0.5, "4": 0.3}
    assert names_table(grouped(old)["g"])[2] == ["baseline", "50.0 ± 0.0", "15.0 ± 21.2"]


def log(arm, seed, right, **more):
    scores = {"right": dict.fromkeys(ATTRIBUTES, right), **{k: dict.fromkeys(ATTRIBUTES, v) for k, v in more.items()}}
    wrong = {source: 0.0 if source == "colour" else 0.4 for source in ATTRIBUTES}
    scores["matrix"] = {source: {a: 0.3 if a == "colour" else v for a in ATTRIBUTES} for source, v in wrong.items()}
    about = {"group": "g", "arm": arm, "seed": seed, "parameters": 10, "image_parameters": 5}
    about["model"] = {"width": 0}
    return {**about, "lines": [], "last": {"step": 7}, "scores": scores}


def test_gains_are_paired_by_seed():
    swaps = {"wrong": 0.30, "shuffled": 0.5, "generic": 0.3, "base": 0.2, "reworded": 0.4, "sibling": 0.5}
    logs = [
        log("baseline", 0, 0.40),
        log("baseline", 1, 0.50),
        log("cross", 1, 0.56, **swaps),
        log("cross", 0, 0.44, **swaps),
    ]
    arms = grouped(logs)["g"]
    assert list(arms) == ["baseline", "cross"]
    line = arms_table(arms)[2]
    assert line[5] == "50.0 ± 8.5 (44.0 to 56.0)" and line[6] == "+5.0 ± 1.4 (+4.0 to +6.0)"
    assert swap_table(arms)[1][-3] == "+20.0 ± 8.5 (+14.0 to +26.0)"
    assert [row[-2] for row in arms_table(arms)] == ["steps", "7", "7", ""] and arms_table(arms)[-1][5] == "13.0"
    drops = drops_table(arms)[1:]
    assert drops[0] == ["cross", *["+20.0 ± 8.5 (+14.0 to +26.0)"] * 6]
    assert drops[1][1:3] == ["+10.0 ± 8.5 (+4.0 to +16.0)", "+20.0 ± 8.5 (+14.0 to +26.0)"]
    assert "cross over the baseline: +5.0 ± 1.4 (+4.0 to +6.0) points; all 2 seeds agree in sign" in findings(arms)
    assert (
        "right names over the same words dealt anew: +0.0 ± 8.5 (-6.0 to +6.0) points; the seeds disagree"
        in findings(arms)
    )
    assert gains({0: 1.0, 2: 5.0}, {2: 3.0, 1: 0.0}) == [2.0] and spread([2.0]) == "2.0" and spread([]) == ""


def test_rivals_seconds_come_on_top_and_are_the_quickest_seeds():
    base, *norms = log("baseline", 0, 0.4), log("norms", 0, 0.5), log("norms", 1, 0.5)
    for one, seconds in zip(norms, (1200.0, 1100.4)):
        one["last"] |= {"seconds": seconds, "parameters_per_task": 6}
    assert [row[-1] for row in arms_table(grouped([base, *norms])["g"])] == ["seconds", "", "+1,100", ""]
    assert arms_table(grouped([base, *norms])["g"])[2][4] == "6"


def test_a_rival_is_compared_with_the_model_that_it_tuned():
    logs = [log("baseline", 0, 0.40), log("norms", 0, 0.60, before=0.45), log("lora", 0, 0.60, before=0.40)]
    arms = grouped(logs)["g"]
    assert [row[6] for row in arms_table(arms)] == ["over baseline", "", "+15.0", "+20.0", ""]
    assert "norms over the model that it tuned: +15.0 points" in findings(arms)
    assert "norms: it tuned baselines trained again, 45.0 before tuning" in findings(arms)
    assert "lora: it tuned baselines trained again" not in findings(arms)


def wide_log(group, arm, seed, right, tower, size, steps=1000):
    model = {"image_tower": tower, "img_size": 48, "embed_dim": 64, "width": None, "conditioned": arm == "cross"}
    model |= dict.fromkeys(("patch_size", "depth", "num_heads", "global_pool"))
    about = {"group": group, "model": model, "train": {"steps": steps, "seed": seed}, "image_parameters": size}
    return {**log(arm, seed, right), **about}


def test_gains_against_width_are_of_pairs():
    small, large = ("mobilenetv3_small_050", 600), ("mobilenetv3_small_075", 1000)
    logs = [
        wide_log("large", "cross", 0, 0.62, *large),
        wide_log("small", "wide", 0, 0.40, *large),  # the baseline of the other group's width
        wide_log("small", "wide", 1, 0.90, *large, steps=5),  # another schedule
        wide_log("large", "cross", 1, 0.10, *large),  # whose baseline is not there
        wide_log("small", "norms", 1, 0.90, *large),  # no baseline
        wide_log("small", "cross", 1, 0.70, *small),
        wide_log("small", "cross", 0, 0.60, *small),
        wide_log("small", "baseline", 0, 0.50, *small),
        wide_log("small", "baseline", 1, 0.40, *small),
        wide_log("other", "cross", 0, 0.50, "tinynet_e", 7),  # alone
    ]
    table = width_table(widths(grouped(logs)))
    assert table[1:] == [
        [
            "mobilenetv3_small_050",
            "600",
            "1,000",
            "45.0 ± 7.1",
            "65.0 ± 7.1",
            "+20.0 ± 14.1 (+10.0 to +30.0)",
            "2",
        ],
        ["mobilenetv3_small_075", "1,000", "1,000", "40.0", "62.0", "+22.0", "1: no spread"],
    ]
    assert widths(grouped([logs[0], logs[9]])) == []
    for one in logs[:2]:
        one["train"] |= {"precision": "float32", "betas": [0.9, 0.98]}  # the defaults, which older logs leave out
    logs[1]["train"] = {"steps": 1000, "seed": 0}
    assert len(widths(grouped(logs[:2]))) == 1


def test_no_verdict_on_guesses():
    swaps = {"wrong": 0.30, "shuffled": 0.5, "generic": 0.3, "base": 0.2, "reworded": 0.4, "sibling": 0.1}
    arms = grouped([log("baseline", 0, 0.4), log("cross", 0, 0.4, **swaps)])["g"]
    assert "held-out objects: own names" in findings(arms) and "At guessing" not in findings(arms)
    arms["cross"][0]["scores"]["right"]["object"] = 0.125 + 2 * 0.0106  # scenes' standard error is 0.01067
    assert attributes_table(arms)[-1][1:3] == ["14.6 \\*", "40.0"]
    assert swap_table(arms)[1][-1] == drops_table(arms)[1][1] == drops_table(arms)[2][1] == "guesses"
    assert "At guessing, and part of every mean: object (cross)." in findings(arms)
    assert "held-out objects" not in findings(arms)


def test_zeros_are_no_agreement():
    assert "no difference in any seed" in verdict([0.0, 1e-12, 0.0], "x")
    assert "the seeds disagree" in verdict([0.0, 1.0, 2.0], "x")
    assert "all 2 seeds agree in sign" in verdict([-1.0, -2.0], "x")


def test_shuffling_leaves_out_one_word_names():
    one = log("cross", 0, 0.5, shuffled=0.4)
    one["scores"]["shuffled"]["count"] = 0.0
    assert shuffling({0: one}) == [pytest.approx(10.0)] and shuffling({0: log("baseline", 0, 0.5)}) == []


def test_plots_of_a_group_of_rivals_alone(tmp_path):
    assert "names" not in draw(grouped([log("norms", 0, 0.4)]), tmp_path)


def test_logs_without_a_position_scale_have_the_queues():
    old, new = ({**log("norms", seed, 0.4), "machine": "m"} for seed in (0, 1))
    for one in (old, new):
        one |= {"model": {"width": 0, "image_tower": "t", "img_size": 8, "embed_dim": 8}}
        one |= {"train": {"steps": 1, "tasks_per_batch": 1, "classes_per_task": 2}}
    assert "start at 10 times timm's" in report("logs", grouped([old]), (), 10.0)
    assert "start at 3 or 10 times timm's" in report("logs", grouped([old, {**new, "position_scale": 3.0}]), (), 10.0)


@pytest.mark.slow
def test_the_committed_report_is_of_the_committed_logs(tmp_path, monkeypatch):
    config, committed = Path(conditioning.CONFIG).resolve(), Path(conditioning.RESULTS).resolve()
    shutil.copytree(committed, tmp_path / conditioning.RESULTS)
    monkeypatch.chdir(tmp_path)
    assert conditioning.main(["report", "--config", str(config)]) == 0
    made = Path(conditioning.RESULTS).with_suffix(".md").read_text()
    assert made == committed.with_suffix(".md").read_text()


def test_no_logs(tmp_path):
    with pytest.raises(ValueError, match="has none"):
        read_logs(tmp_path)


def test_overheads(monkeypatch, capsys, tmp_path):
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "width": 32,
        "depth": 1,
        "num_heads": 2,
        "embed_dim": 16,
        "hyper_width": 32,
    }
    monkeypatch.setattr(conditioning_overheads, "TOWERS", {"tiny": sizes})
    assert conditioning.main(["overheads", "--results", str(tmp_path), "--seconds", "0.1"]) == 0
    figures = json.loads((tmp_path / "overheads.json").read_text())["towers"]["tiny"]
    assert figures["training"]["baseline"]["ratio"] == [1.0, 1.0, 1.0]
    saved = {arm: one["saved_megabytes"] for arm, one in figures["training"].items()}
    assert saved["cross"] > saved["baseline"]
    assert "| cross |" in capsys.readouterr().out
