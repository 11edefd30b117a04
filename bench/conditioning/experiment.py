"""One run of the experiment: what it is asked, and the log that it leaves."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.bench.conditioning.arms import Run
from hyperclip_fast.bench.conditioning.names import PICTURE_SIZE, SETS, NameData, held_out_scores, name_scores
from hyperclip_fast.bench.conditioning.scores import (
    OBJECTS,
    SCENES,
    SceneTasks,
    Scores,
    all_scores,
    right_scores,
)
from hyperclip_fast.bench.conditioning.tuning import finish, tune_all
from hyperclip_fast.bench.harness.machine import device_name
from hyperclip_fast.data.batch import Share
from hyperclip_fast.data.picture_source import picture_source
from hyperclip_fast.data.pictures import load_pictures
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.scenes import ATTRIBUTES, scene_source, scene_tasks
from hyperclip_fast.evaluation.eval_sets import load_eval_set
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.training.config import RunConfig
from hyperclip_fast.training.trainer import Trainer, new_model
from hyperclip_fast.utils.files import write_file

RESULTS = "bench/results/conditioning"
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
        finish(trainer)
        scores = self.scores(run, trainer.model.eval())
        lines = [json.loads(line) for line in (self.work / run.name / "log.jsonl").read_text().splitlines()]
        return [_about(run, trainer.model), *lines, {"step": trainer.step, "scores": _rounded(scores)}]

    @cached_property
    def names(self) -> NameData:
        """Named pictures and digits, for runs on names."""
        tones = load_eval_set("skin-tones", Preprocessing(PICTURE_SIZE))
        return NameData.make(load_pictures(SETS, size=PICTURE_SIZE), tones)

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
        result = tune_all(model, run, self.pictures, self.scenes, self.reworded, self.work / run.name)
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
        config = RunConfig(run.model, run.train)
        model = new_model(config)
        if hasattr(model.image, "pos_embed"):
            model.image.pos_embed.data.mul_(run.position_scale)
        draw, pictures = (picture_source, self.names.pictures) if run.data == "names" else (scene_source, self.pictures)
        source = draw(pictures, run.train.batch_shape, model.preprocessing, Share())
        look = max(1, run.train.steps // LOOKS)

        def looks(trainer: Trainer, metrics: dict[str, Tensor]) -> None:
            if trainer.step % look == 0 and trainer.step < run.train.steps:
                trainer.log({"held_out": _rounded(self.look(run, trainer.model))})
                trainer.save()

        return Trainer(config, self.work / run.name, source=source, model=model, callback=looks)


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
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))
