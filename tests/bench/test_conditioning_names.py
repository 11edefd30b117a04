"""The conditioning experiment on OpenMoji names and digits: a run from start to log, its scores, its report."""

import json

import pytest
import torch

from hyperclip_fast.bench.conditioning import __main__ as conditioning
from hyperclip_fast.bench.conditioning import experiment as conditioning_experiment
from hyperclip_fast.bench.conditioning.arms import load_runs
from hyperclip_fast.bench.conditioning.logs import grouped, read_logs
from hyperclip_fast.bench.conditioning.names import (
    DIGITS,
    PARTITIONS,
    NameData,
    by_names,
    name_scores,
    partitions,
    sized_tasks,
    task_accuracies,
)
from hyperclip_fast.bench.conditioning.names_report import (
    by_group,
    names_arms_table,
    names_findings,
    names_section,
    names_swap_table,
    numbers_table,
)
from hyperclip_fast.data.augmentation import resize, to_rgb
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.openmoji import line_drawings
from hyperclip_fast.data.pictures import Pictures, _join
from hyperclip_fast.evaluation.corruptions import CORRUPTIONS
from hyperclip_fast.evaluation.eval_sets import EvalSet
from hyperclip_fast.evaluation.swapping import ROW_SOURCES, row_names
from tests.bench.test_conditioning import PLAN
from tests.data.test_scenes import blocks
from tests.towers import patch_text_tower, tiny_model

NAMED = """
  n: {arms: [baseline, cross], seeds: [0], data: names, train: {classes_per_task: 4}}
"""
OPTIONS = ("--config", "--results", "--work")


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def pictures(count: int = 24) -> Pictures:
    """Flat colours: things of two groups, each in colour and as a black drawing, then digits; a third is held out."""
    things, generator = blocks(2 * count), torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * count, 4, 1, 1), generator=generator, dtype=torch.uint8).repeat(1, 1, 32, 32)
    images[:, 3] = 255
    images[1::2, :3] = 0
    labels, held_out = (of.repeat_interleave(2) for of in (things.labels, things.held_out))
    openmoji = Pictures(images, labels, things.names, ("food",) * count + ("animals",) * count, held_out)
    ink = torch.randint(256, (40, 4, 32, 32), generator=generator, dtype=torch.uint8)
    digits = tuple(f"the digit {i}" for i in range(4))
    return _join([openmoji, Pictures(ink, torch.arange(40) // 10, digits, (DIGITS,) * 4, torch.arange(40) % 3 == 2)])


def tones() -> EvalSet:
    images = torch.randint(256, (6, 4, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    task = EvalTask("skin-tones", ("fist", "palm", "thumb"), images, torch.arange(3).repeat_interleave(2))
    return EvalSet("skin-tones", [task], [("light", "dark") * 3])


@pytest.fixture(scope="module")
def data():
    return NameData.make(pictures(), tones())


@pytest.fixture
def plan(tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text(PLAN.rstrip() + NAMED)
    monkeypatch.setattr(
        conditioning_experiment, "load_pictures", lambda sets, size: pictures() if DIGITS in sets else blocks()
    )
    monkeypatch.setattr(conditioning_experiment, "load_eval_set", lambda name, size: tones())
    tasks = conditioning_experiment.scene_tasks
    fewer = {"scenes": 24, "classes": 4}
    monkeypatch.setattr(conditioning_experiment, "scene_tasks", lambda of, **options: tasks(of, **{**options, **fewer}))
    return [
        part
        for pair in zip(OPTIONS, map(str, (tmp_path / "plan.yaml", tmp_path / "logs", tmp_path / "work")))
        for part in pair
    ]


def test_training_sees_colour_pictures_of_training_names(data):
    names = data.pictures.names
    assert len(data.drawings) == 48 and len(data.pictures) == 48 + 40
    assert (data.drawings.images[:, :3] == 0).all() and len(data.openmoji.labels.unique()) == len(data.openmoji) == 48
    assert {names[i] for i in data.drawings.labels} == {names[i] for i in data.openmoji.labels}
    assert line_drawings(torch.tensor([0, 0, 1, 2, 2])).tolist() == [False, True, False, False, True]


def test_queue(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.rstrip() + NAMED)
    assert [run.data for run in load_runs(tmp_path / "plan.yaml")][-3:] == ["scenes", "names", "names"]
    for change, message in (
        (("data: names", "data: sounds"), "data of group n must be one of .*'sounds'"),
        (("[baseline, cross], seeds: [0], data", "[baseline, lora], data"), "must not tune .* names, got .*'lora'"),
    ):
        (tmp_path / "plan.yaml").write_text((PLAN.rstrip() + NAMED).replace(*change))
        with pytest.raises(ValueError, match=message):
            load_runs(tmp_path / "plan.yaml")


@pytest.mark.slow
def test_run_and_report(plan, tmp_path, capsys):
    assert conditioning.main(["run", *plan, "--only", "n"]) == 0
    assert conditioning.main(["report", *plan[:4]]) == 2  # the report's head is of scenes
    assert "must have logs of runs on scenes" in capsys.readouterr().err
    first, *lines, last = [json.loads(line) for line in (tmp_path / "logs/n-cross-0.jsonl").read_text().splitlines()]
    assert first["data"] == "names" and last["step"] == 4 and set(ROW_SOURCES) < set(last["scores"])
    assert {key for line in lines for key in line.get("held_out", {})} == set(last["scores"]["right"])
    baseline = json.loads((tmp_path / "logs/n-baseline-0.jsonl").read_text().splitlines()[-1])["scores"]
    assert set(baseline) & set(ROW_SOURCES) == {"right"}
    assert conditioning.main(["run", *plan, "--only", "a"]) == 0
    assert conditioning.main(["report", *plan[:4]]) == 0
    scenes, names = (tmp_path / "logs.md").read_text().split("## Group n: OpenMoji names and digits")
    assert "## Group a" in scenes and "## Group n" not in scenes and "held-out names" in names
    assert "](logs/n-numbers.png)" in names and (tmp_path / "logs/n-numbers.png").stat().st_size > 1000
    for path in (tmp_path / "logs").glob("n-*.jsonl"):
        path.unlink()
    assert conditioning.main(["report", *plan[:4]]) == 0
    assert (tmp_path / "logs.md").read_text().rstrip() == scenes.rstrip()  # names change nothing of the scenes


def test_a_run_on_names_goes_on_where_it_was(plan, tmp_path, monkeypatch):
    only = ["--only", "n-cross-0"]
    assert conditioning.main(["run", *plan, *only]) == 0
    path, step = tmp_path / "logs/n-cross-0.jsonl", conditioning_experiment.Trainer.train_step
    whole = json.loads(path.read_text().splitlines()[-1])["scores"]
    path.unlink()
    (tmp_path / "work").rename(tmp_path / "first")

    def stop(trainer):
        if trainer.step == 3:
            raise ValueError("stopped")
        return step(trainer)

    monkeypatch.setattr(conditioning_experiment.Trainer, "train_step", stop)
    assert conditioning.main(["run", *plan, *only]) == 2 and not path.exists()
    monkeypatch.setattr(conditioning_experiment.Trainer, "train_step", step)
    assert conditioning.main(["run", *plan, *only]) == 0
    assert json.loads(path.read_text().splitlines()[-1])["scores"] == whole


@torch.inference_mode()
def test_scores_equal_one_picture_at_a_time(data):
    model = tiny_model(img_size=48, patch_size=16)
    for parameter in model.parameters():  # far from the start, where all pictures look alike
        parameter.add_(0.5 * torch.randn_like(parameter))
    scores = name_scores(model, data)
    for source in ("right", "wrong"):
        found: dict[str, list[float]] = {}
        tasks = [task for seed in range(PARTITIONS) for task in held_out_tasks(data.pictures, seed=seed)]
        for task, names in zip(tasks, row_names(tasks, source), strict=True):
            row, classes = model.adapt([names]), model.encode_text(task.class_names)
            images = resize(to_rgb(task.images), 48)
            best = torch.cat([(model.encode_image(image[None], row) @ classes.T).argmax(1) for image in images])
            found.setdefault(task.name, []).append(float((best == task.labels).double().mean()))
        means = {name: sum(shares) / len(shares) for name, shares in found.items()}
        assert {**scores[source], DIGITS: scores[DIGITS][source]} == pytest.approx(means)
    assert scores["chance"]["right"] == {"animals": 1 / 8, "food": 1 / 8} and scores["held_out"] == 16
    assert scores["chance"][DIGITS] == 1 / 4 and scores["chance"]["tones"] == pytest.approx(1 / 3)
    assert set(scores["corrupted"]) == set(CORRUPTIONS) and set(scores["tones"]) == {"light", "dark"}
    assert scores["corrupted"]["noise"] == pytest.approx(
        sum(task_accuracies(model, partitions(data.openmoji), change="noise").values()) / 2
    )
    assert list(scores["by_names"]) == ["2", "4", "8", "16"] and scores["wrong"] != scores["right"]


def test_wrong_names_are_of_another_group(data):
    tasks = partitions(data.pictures)
    group = dict(zip(data.pictures.names, data.pictures.groups))
    for task, names in zip(tasks, row_names(tasks, "wrong"), strict=True):
        assert not {group[name] for name in task.class_names} & {group[name] for name in names}


def test_tasks_of_an_exact_size(data):
    tasks = sized_tasks(data.openmoji, 3)
    assert [len(task.class_names) for task in tasks] == [3] * 5 and sized_tasks(data.openmoji, 17) == []
    assert len({name for task in tasks for name in task.class_names}) == 15
    assert {name for task in tasks for name in task.class_names} < {f"thing {i}" for i in range(2, 48, 3)}
    assert by_names(tiny_model(img_size=48, patch_size=16), data.openmoji, 17) is None


def log(arm, seed, right, **rows):
    """A made-up log: `right` on food, 0.2 more on animals."""
    shares = {
        row: {"animals 1": v + 0.2, "animals 2": v + 0.2, "food": v} for row, v in {"right": right, **rows}.items()
    }
    chance = {
        "right": {"animals 1": 0.1, "animals 2": 0.1, "food": 0.125},
        DIGITS: 0.1,
        "drawings": 0.125,
        "tones": 0.02,
    }
    scores = {**shares, DIGITS: {row: value["food"] / 2 for row, value in shares.items()}, "drawings": {"food": 0.3}}
    scores |= {"corrupted": dict.fromkeys(CORRUPTIONS, 0.25), "tones": {"light": 0.5, "dark": 0.4}, "chance": chance}
    scores |= {"by_names": {"2": 0.75, "4": 0.5}, "held_out": 25}
    about = {"group": "n", "arm": arm, "seed": seed, "data": "names", "parameters": 1234}
    about["model"] = {"image_tower": "t", "img_size": 48, "embed_dim": 64}
    about["train"] = {"steps": 4, "tasks_per_batch": 2, "classes_per_task": 8}
    return {**about, "lines": [], "last": {"step": 4}, "scores": scores}


def test_report_of_made_up_logs(tmp_path):
    swaps = {"base": 0.2, "wrong": 0.3, "shuffled": 0.4, "generic": 0.25}
    logs = [
        log("baseline", 0, 0.3),
        log("baseline", 1, 0.3),
        log("cross", 0, 0.4, **swaps),
        log("cross", 1, 0.5, **swaps),
    ]
    arms = grouped(logs)["n"]
    baseline, cross, guess = names_arms_table(arms)[1:]
    assert baseline[1:5] == ["2", "1,234", "43.3 ± 0.0 (43.3 to 43.3)", ""]
    assert cross[4] == "+15.0 ± 7.1 (+10.0 to +20.0)" and cross[5] == "22.5 ± 3.5" and cross[8] == "45.0 ± 7.1"
    assert cross[6:8] == ["30.0 ± 0.0", "25.0 ± 0.0"] and cross[9:] == ["45.0 ± 0.0", "40.0 ± 0.0"]
    assert guess[3:] == ["10.8", "", "10.0", "12.5", "10.8", "10.0", "2.0", "2.0"]
    swap = names_swap_table(arms)
    assert len(swap) == 3 and swap[1][0] == "cross, held-out names" and swap[2][0] == "cross, digits"
    assert swap[1][-2] == "+15.0 ± 7.1 (+10.0 to +20.0)" and swap[2][-2] == "+7.5 ± 3.5 (+5.0 to +10.0)"
    assert numbers_table(arms)[1:] == [["guessing", "50.0", "25.0"]] + [[a, "75.0 ± 0.0", "50.0 ± 0.0"] for a in arms]
    text = names_findings(arms)
    assert "cross over the baseline: +15.0 ± 7.1 (+10.0 to +20.0) points; all 2 seeds agree" in text
    assert "shuffled" not in text and "dealt anew: +5.0 ± 7.1 (+0.0 to +10.0) points; the seeds disagree" in text
    assert by_group(logs[0]["scores"]["right"]) == pytest.approx({"animals": 0.5, "food": 0.3})
    assert "6.2 points where a model guesses" in " ".join(names_section("n", arms, tmp_path).split())
    assert "learned" not in text and names_section("n", grouped(logs[:1])["n"], tmp_path).count("swap test") == 0


def test_logs_of_the_repository_say_their_data():
    logs = read_logs(conditioning.RESULTS)
    of_names = [log for log in logs if log["group"] == "names"]
    assert of_names and all("corrupted" in log["last"]["scores"] for log in of_names)
    assert all((log.get("data", "scenes") == "names") == (log["group"] == "names") for log in logs)
