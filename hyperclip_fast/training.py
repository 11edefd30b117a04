"""A trainer that is small but real: mixed batches of G tasks x K pairs, AdamW, cosine schedule, exact resume.

Everything random in a step is drawn from (seed, step), so a run that is stopped and resumed is bit-equal to one that is
not. A run's folder holds config.json, log.jsonl, checkpoint.pt (for resuming) and model/ (for `from_pretrained`).
"""

import json
import math
import os
import pickle
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from einops import rearrange
from timm.optim import param_groups_weight_decay
from torch import Tensor

from hyperclip_fast.config import check_types, from_dict
from hyperclip_fast.data import Pictures, TaskBatch, TaskSampler, augment, load_pictures, resize
from hyperclip_fast.evaluation import EvalTask, held_out_tasks, mean_accuracy, swap_test
from hyperclip_fast.extras import require
from hyperclip_fast.hyperclip import HyperCLIP, HyperCLIPConfig, config_from_dict
from hyperclip_fast.losses import siglip_loss


@dataclass
class TrainConfig:
    """How a model is trained.

    Args:
        steps: optimiser steps.
        tasks_per_batch: G.
        classes_per_task: K, one picture each.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        warmup: steps of linear warm-up.
        weight_decay: of matrices; vectors and timm's no_weight_decay names are spared.
        betas: of AdamW.
        clip: largest gradient norm.
        mixed_groups: share of tasks that draw names from all groups.
        seed: of initialisation, batches, augmentation and dropout.
        log_every: steps between log lines.
        eval_every: steps between swap tests on held-out names; 0: only at the end.
        save_every: steps between checkpoints.
        picture_size: side of the rendered pictures.
    """

    steps: int = 4000
    tasks_per_batch: int = 8
    classes_per_task: int = 16
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    mixed_groups: float = 0.25
    seed: int = 0
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    picture_size: int = 64

    def __post_init__(self):
        check_types(self)
        for name in ("steps", "tasks_per_batch", "log_every", "save_every", "picture_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.classes_per_task < 2:
            raise ValueError(f"classes_per_task must be at least 2, got {self.classes_per_task}")


def load_config(path: str | Path) -> tuple[HyperCLIPConfig, TrainConfig]:
    """Read {"model": {...}, "train": {...}} from a YAML or JSON file.

    Raises:
        ValueError: for a file that is neither, keys that are no fields, or values of another type.
    """
    import yaml

    try:
        sections = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML or JSON, {path} is not: {error}") from error
    if not isinstance(sections, dict) or not set(sections) <= {"model", "train"}:
        raise ValueError(f"config must have the sections model and train, got {sections if sections else 'nothing'}")
    return config_from_dict(sections.get("model") or {}), from_dict(TrainConfig, sections.get("train") or {}, "train")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine from lr to min_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """One model, one data set, one run folder.

    Args:
        model_config: what to train.
        config: how.
        out: the run's folder; a checkpoint in it is resumed.
        pictures: the data; None: OpenMoji and digits, rendered at `config.picture_size`.
        device: where to train.

    Raises:
        ValueError: if `out` holds a run with another configuration.
    """

    def __init__(
        self,
        model_config: HyperCLIPConfig,
        config: TrainConfig,
        out: str | Path,
        pictures: Pictures | None = None,
        device: str | torch.device = "cpu",
    ):
        self.config, self.out, self.device = config, Path(out), torch.device(device)
        torch.manual_seed(config.seed)
        self.model = HyperCLIP(model_config).to(self.device)
        self.pictures = pictures or load_pictures(size=config.picture_size)
        self.sampler = TaskSampler(
            self.pictures.subset(~self.pictures.held_out),
            tasks_per_batch=config.tasks_per_batch,
            classes_per_task=config.classes_per_task,
            seed=config.seed,
            mixed_groups=config.mixed_groups,
        )
        no_decay = [f"image.{name}" for name in self.model.image.no_weight_decay()]
        groups = param_groups_weight_decay(self.model, config.weight_decay, no_weight_decay_list=no_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.features = None if model_config.train_text else self.model.text_features(self.pictures.names)
        self.step = 0
        self._open_run()

    def _settings(self) -> dict:
        return {"model": asdict(self.model.config), "train": asdict(self.config)}

    def _open_run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(self._settings()))
        path = self.out / "config.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise ValueError(f"out must be a new folder, or a run with this configuration: {self.out} has another one")
        path.write_text(json.dumps(settings, indent=2) + "\n")
        checkpoint = self.out / "checkpoint.pt"
        if checkpoint.exists():
            state = _load_checkpoint(checkpoint)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        _cut_log(self.out / "log.jsonl", self.step)

    def save(self) -> None:
        """Write the checkpoint beside, then rename it."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        beside = self.out / f".checkpoint.{os.getpid()}.tmp"
        torch.save(state, beside)
        os.replace(beside, self.out / "checkpoint.pt")

    def log(self, entry: dict) -> None:
        """Append one JSON line."""
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **entry}) + "\n")

    def class_features(self, batch: TaskBatch) -> Tensor:
        """Text features (G, K, E_text) of the batch's classes; computed once for all where the tower is frozen."""
        if self.features is not None:
            return self.features[batch.class_ids.to(self.features.device)]
        texts = [[self.pictures.names[i] for i in task] for task in batch.class_ids.tolist()]
        return self.model.stack_tasks(texts)[0]

    def loss(self, batch: TaskBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """SigLIP loss of a batch, and its accuracy within the tasks."""
        images = resize(augment(batch.images, generator, batch.can_flip), self.model.image_size).to(self.device)
        out = self.model(images, self.class_features(batch), batch.task_ids.to(self.device))
        features = rearrange(out["image_features"], "(g k) e -> g k e", g=len(batch.class_ids))
        loss = siglip_loss(features, out["text_features"], out["logit_scale"], out["logit_bias"])
        best = (features.detach() @ out["text_features"].detach().mT).argmax(-1)
        right = (best == torch.arange(best.shape[1], device=best.device)).float().mean()
        return loss, right

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; everything random in it depends on (seed, step) alone."""
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        loss, right = self.loss(self.sampler.batch(self.step), generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.step += 1
        return {"loss": loss.detach(), "accuracy": right, "grad_norm": norm}

    def evaluate(self, tasks: list[EvalTask]) -> dict[str, float]:
        """Mean held-out accuracy with the right, the base and a wrong row, logged; nothing for fewer than two tasks."""
        if len(tasks) < 2:
            return {}
        result = {row: mean_accuracy(by_task) for row, by_task in swap_test(self.model, tasks).items()}
        self.log({"held_out": {row: round(value, 4) for row, value in result.items()}})
        return result

    def train(self) -> HyperCLIP:
        """Train to the last step, logging and saving on the way; returns the model, also written to out/model."""
        if self.step >= self.config.steps and (self.out / "model").is_dir():
            return self.model.eval()  # finished in an earlier run
        tqdm = require("tqdm", "train").tqdm
        config, tasks, images, start = self.config, held_out_tasks(self.pictures), 0, time.perf_counter()
        bar = tqdm(initial=self.step, total=config.steps, desc="train", unit="step", dynamic_ncols=True)
        while self.step < config.steps:
            metrics = self.train_step()
            images += config.tasks_per_batch * config.classes_per_task
            bar.update()
            if self.step % config.log_every == 0:
                values = {name: round(float(value), 4) for name, value in metrics.items()}
                speed = round(images / (time.perf_counter() - start), 1)
                self.log({**values, "lr": learning_rate(self.step - 1, config), "images_per_second": speed})
                bar.set_postfix(values)
            if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps:
                bar.write(f"step {self.step}: held out {self.evaluate(tasks)}")
                images, start = 0, time.perf_counter()
            if self.step % config.save_every == 0:
                self.save()
        bar.close()
        self.save()
        print(f"held out {self.evaluate(tasks)}")
        self.model.eval().save_pretrained(self.out / "model")
        return self.model


def _load_checkpoint(path: Path) -> dict:
    """Tensors and numbers only: a pickle of anything else is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"out must hold a whole checkpoint of a run, got {path}: {reason}") from error


def _cut_log(path: Path, step: int) -> None:
    """Drop log lines beyond `step`: a resumed run writes them again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in lines))
    os.replace(beside, path)
