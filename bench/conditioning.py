"""What conditioning on class names is worth: `python -m hyperclip_fast.bench.conditioning run | report | overheads`.

`run` works through the queue of configs/conditioning.yaml, one run after the other; a run that was stopped goes on
where it was, one that has its log is not run again. `report` makes the tables and plots from the logs alone.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hyperclip_fast.data.pictures import load_pictures
from hyperclip_fast.data.scenes import ATTRIBUTES, SceneSampler, scene_tasks
from hyperclip_fast.evaluation.eval_sets import load_eval_set
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.training.trainer import Trainer
from hyperclip_fast.utils.extras import require

from .conditioning_arms import Run, load_plan, load_runs
from .conditioning_names import PICTURE_SIZE, SETS, NameData, held_out_scores, name_scores, names_section
from .conditioning_overheads import measure_overheads, overheads_table
from .conditioning_plots import draw
from .conditioning_report import grouped, markdown, read_logs, report
from .conditioning_scores import OBJECTS, SCENES, SceneTasks, Scores, all_scores, mean, right_scores
from .conditioning_tuning import tune_all
from .conditioning_width import width_table, widths
from .machine import device_name

CONFIG = "configs/conditioning.yaml"
RESULTS = "bench/results/conditioning"
OVERHEADS, CONCLUSION = "overheads.json", "conclusion.md"  # beside the logs; the report quotes both
LOOKS = 5  # times that held-out scenes are scored in a run, the end included


class Experiment:
    """Pictures and evaluation scenes, shared by all runs.

    Args:
        results: folder of the logs.
        work: folder of checkpoints and models.
    """

    def __init__(self, results: str | Path = RESULTS, work: str | Path = "runs/conditioning"):
        self.results, self.work = Path(results), Path(work)
        self.pictures = load_pictures(("openmoji",), size=32)
        self.scenes = SceneTasks(scene_tasks(self.pictures, scenes=SCENES, classes=OBJECTS))
        self.reworded = SceneTasks(scene_tasks(self.pictures, scenes=SCENES, classes=OBJECTS, wording=-1))
        self.few = SceneTasks(scene_tasks(self.pictures, scenes=480, seed=1))

    def run(self, run: Run, baseline: Run | None = None) -> None:
        """Train, score, and write the log; nothing for a run that has one.

        Args:
            run: what is trained.
            baseline: the run whose model a rival tunes; of no use to other runs.
        """
        path = self.results / f"{run.name}.jsonl"
        if not path.exists():
            write_log(path, self.tune(run, baseline) if run.tune else self.fit(run))

    def fit(self, run: Run) -> list[dict[str, Any]]:
        """The log of a training; its model is saved."""
        trainer = self.trainer(run)
        self.train(trainer, run)
        trainer.model.save_pretrained(self.work / run.name / "model")
        scores = self.scores(run, trainer.model)
        lines = [json.loads(line) for line in (self.work / run.name / "log.jsonl").read_text().splitlines()]
        return [_about(run, trainer.model), *lines, {"step": trainer.step, "scores": _rounded(scores)}]

    @cached_property
    def names(self) -> NameData:
        """Named pictures and digits, for runs on names."""
        return NameData.make(load_pictures(SETS, size=PICTURE_SIZE), load_eval_set("skin-tones", PICTURE_SIZE))

    def scores(self, run: Run, model: HyperCLIP) -> dict[str, Any]:
        """Every figure of a run's model, on the run's kind of data."""
        if run.data == "names":
            return name_scores(model, self.names)
        return all_scores(model, self.scenes, self.reworded)

    def look(self, run: Run, model: HyperCLIP) -> Scores:
        """What is looked at during a run."""
        return held_out_scores(model, self.names) if run.data == "names" else right_scores(model, self.few)

    def tune(self, run: Run, baseline: Run | None) -> list[dict[str, Any]]:
        """The log of a rival that tunes the baseline of its group and seed for each attribute."""
        if baseline is None:
            raise ValueError(f"the run {run.name} needs its group's baseline of the same seed, the queue has none")
        model = self.trained(baseline)
        before = right_scores(model, self.scenes)
        result = tune_all(model, run, self.pictures, self.scenes, self.reworded)
        scores = _rounded({**result["scores"], "before": before})
        return [_about(run, model), {"step": run.train.steps * len(ATTRIBUTES), **result, "scores": scores}]

    def trained(self, run: Run) -> HyperCLIP:
        """The model of a run, trained if need be, and trained again where there is its log alone."""
        self.run(run)
        folder = self.work / run.name / "model"
        if not folder.is_dir():
            self.fit(run)
        return load_model(folder)

    def trainer(self, run: Run) -> Trainer:
        """A trainer on the run's kind of data; position embeddings start at the run's scale."""
        config, side = run.train, run.model.img_size
        if run.data == "names":
            given = {"pictures": self.names.pictures}
        else:
            sizes = config.tasks_per_batch, config.classes_per_task
            given = {"sampler": SceneSampler(self.pictures, *sizes, config.seed, side)}
        trainer = Trainer(run.model, config, self.work / run.name, **given)
        if trainer.step == 0 and hasattr(trainer.model.image, "pos_embed"):
            trainer.model.image.pos_embed.data.mul_(run.position_scale)
        return trainer

    def train(self, trainer: Trainer, run: Run) -> None:
        """Train to the last step; log training's figures as means over the steps since the last line."""
        config, sums, count = trainer.config, {}, 0
        look = max(1, config.steps // LOOKS)
        tqdm = require("tqdm", "train").tqdm
        for _ in (bar := tqdm(range(trainer.step, config.steps), desc=run.name, unit="step", dynamic_ncols=True)):
            metrics = trainer.train_step()
            sums = {key: sums.get(key, 0.0) + float(value) for key, value in metrics.items()}
            count += 1
            if trainer.step % config.log_every == 0:
                trainer.log({key: round(value / count, 4) for key, value in sums.items()})
                bar.set_postfix(accuracy=round(sums["accuracy"] / count, 3))
                sums, count = {}, 0
            if trainer.step % look == 0 and trainer.step < config.steps:
                trainer.log({"held_out": _rounded(self.look(run, trainer.model))})
                trainer.save()


def _about(run: Run, model: HyperCLIP) -> dict[str, Any]:
    return {
        "run": run.name,
        "group": run.group,
        "arm": run.arm,
        "seed": run.seed,
        "model": asdict(run.model),
        "train": asdict(run.train),
        "position_scale": run.position_scale,
        "data": run.data,
        "parameters": _count(model),
        "image_parameters": _count(model.image),
        "machine": f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 4)


def write_log(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines beside, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m hyperclip_fast.bench.conditioning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and score what the queue still holds")
    run.add_argument("--only", nargs="+", metavar="NAME", help="groups or runs, such as w64 or w64-cross-0")
    report = commands.add_parser("report", help="make conditioning.md and the plots from the logs")
    report.add_argument("--results", default=RESULTS, metavar="DIR", help="logs; default: %(default)s")
    report.add_argument("--config", default=CONFIG, metavar="FILE", help="the queue; default: %(default)s")
    overheads = commands.add_parser("overheads", help="time the arms side by side, and the hypernetwork")
    overheads.add_argument("--results", default=RESULTS, metavar="DIR", help="default: %(default)s")
    overheads.add_argument("--seconds", type=float, default=60.0, help="of the training steps; default: %(default)s")
    run.add_argument("--config", default=CONFIG, metavar="FILE", help="default: %(default)s")
    run.add_argument("--results", default=RESULTS, metavar="DIR", help="logs; default: %(default)s")
    run.add_argument("--work", default="runs/conditioning", metavar="DIR", help="models; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        return {"run": _run, "report": _report, "overheads": _overheads}[args.command](args)
    except (ValueError, ImportError, OSError) as error:
        print(f"conditioning {args.command}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    queue = load_runs(args.config)
    baselines = {(run.group, run.seed): run for run in queue if run.arm == "baseline"}
    experiment = Experiment(args.results, args.work)
    for run in (run for run in queue if not args.only or {run.group, run.name} & set(args.only)):
        experiment.run(run, baselines.get((run.group, run.seed)))
        scores = json.loads((Path(args.results) / f"{run.name}.jsonl").read_text().splitlines()[-1])["scores"]
        print(f"{run.name}: right {mean(scores['right']):.3f}", flush=True)
    return 0


def _report(args: argparse.Namespace) -> int:
    folder, scale = Path(args.results), load_plan(args.config)["position_scale"]
    logs = read_logs(folder)
    groups, named = (grouped(log for log in logs if (log.get("data") == "names") == names) for names in (False, True))
    if not groups:
        raise ValueError(f"results must have logs of runs on scenes, {folder} has those of {sorted(named)} alone")
    plots, pairs = draw(groups, folder), widths(groups)
    gains = markdown(width_table(pairs)) if pairs else ""
    measured = folder / OVERHEADS
    overheads = overheads_table(json.loads(measured.read_text())) if measured.exists() else ""
    words = folder / CONCLUSION
    conclusion = words.read_text(encoding="utf-8") if words.exists() else ""
    path = folder.with_suffix(".md")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    sections = [names_section(group, arms, folder) for group, arms in named.items()]
    text = report(folder, groups, plots, scale, overheads, conclusion, gains)
    beside.write_text("\n".join([text, *sections]), encoding="utf-8")
    os.replace(beside, path)
    print(path)
    return 0


def _overheads(args: argparse.Namespace) -> int:
    figures = measure_overheads(args.seconds)
    write_log(Path(args.results) / OVERHEADS, [figures])
    print(overheads_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
