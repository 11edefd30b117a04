"""The trainer: mixed batches of G tasks x K pairs, AdamW, one process or several, exact resume.

Everything random in a step is drawn from (seed, step), so a run that is stopped and resumed is bit-equal to one that is
not. A run's folder holds config.json, log.jsonl, checkpoint.pt (for resuming) and model/ (for `from_pretrained`).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from hyperclip_fast.data.batch import Batch, Source
from hyperclip_fast.data.held_out import EvalTask
from hyperclip_fast.data.picture_source import StagedSource
from hyperclip_fast.evaluation.swapping import mean_accuracy, swap_test
from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.hyperclip import HyperCLIP, load_model
from hyperclip_fast.training import distributed
from hyperclip_fast.training.config import RunConfig
from hyperclip_fast.training.grad_cache import backward_in_parts
from hyperclip_fast.training.losses import balanced_bias
from hyperclip_fast.training.objective import Inputs, Objective
from hyperclip_fast.training.optimizer import (
    Pull,
    clip_gradients,
    create_optimizer,
    freeze,
    gradient_norms,
    learning_rate,
    set_learning_rate,
    train_mode,
)
from hyperclip_fast.training.run_folder import RunFolder
from hyperclip_fast.training.source_factory import create_source, load_run_pictures
from hyperclip_fast.utils.seeds import hash_seed, step_seed

STOP_EVERY = 10  # steps after which several processes ask each other whether one was told to stop
Callback = Callable[["Trainer", dict[str, Tensor]], None]


def new_model(run: RunConfig) -> HyperCLIP:
    """The model that a run starts from. Its weights are those of `train.init`, or follow from the seed.

    Raises:
        ValueError: for weights that do not fit the configuration.
    """
    config, start = run.model, load_model(run.train.init) if run.train.init else None
    bias = balanced_bias(sum(run.train.class_range) / 2) if run.train.balance_bias else None
    torch.manual_seed(run.train.seed)
    if start is None:
        return HyperCLIP(config if bias is None else replace(config, init_logit_bias=bias))
    model = HyperCLIP(config, start.text_tower if config.train_text else None)
    state = start.state_dict()
    if model.text is not None:
        state |= {f"text.{name}": value for name, value in start.text_tower.state_dict().items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).split("\n\t")[1]  # of a line for each tensor
        raise ValueError(f"train.init must hold weights that fit model, got {run.train.init}: {first}") from error
    model.take_text_from(start)
    if bias is not None:
        model.logit_bias.data.fill_(bias)
    return model


class Trainer:
    """One model, one data set, one run folder. In several processes, one Trainer each: see `distributed.processes`.

    Args:
        run: what is trained, how, and on what.
        out: the run's folder; a checkpoint in it is resumed.
        device: where to train.
        source: batches in place of those that `run.data` describes, see `data.batch.Source`.
        held_out: tasks that such batches leave out, for the swap test. Those of `run.data` come with it.
        model: what to train in place of a new model, such as a trained one; a checkpoint's weights replace its own.
        callback: called after every step and what is logged of it, with the trainer and the step's metrics. What it
            logs and saves stays; what it draws from torch's chance changes no run, as every step has its own seed.

    Raises:
        ValueError: if `out` holds a run with another configuration, or another process trains in it, or for held_out
            without a source.
    """

    def __init__(
        self,
        run: RunConfig,
        out: str | Path,
        device: str | torch.device = "cpu",
        source: Source | None = None,
        held_out: Sequence[EvalTask] = (),
        model: HyperCLIP | None = None,
        callback: Callback | None = None,
    ):
        self.config, self.out, self.callback = run.train, Path(out), callback
        self.device, self.share = torch.device(device), distributed.share()
        config = self.config
        self.model = (model or new_model(run)).to(self.device)
        freeze(self.model, config.freeze)
        train_mode(self.model, config.freeze)
        settings = {"model": asdict(self.model.config), "train": asdict(config)}
        if source is None:
            if held_out:
                raise ValueError("held_out must come with a source: what run.data holds out is known")
            settings["data"] = asdict(run.data)
            source, held_out = self._create_source(run)
        self.source, self.held_out = source, held_out
        self.features = self._known_features()
        self._places = {name: i for i, name in enumerate(self.source.names)}
        self._prepare_model()
        self.optimizer = create_optimizer(self.model, config)
        self._pull = Pull(self.model.image, config.image_pull) if config.image_pull else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.step, self.broken, self._images = 0, 0, 0
        self._bad_step = torch.tensor(-1, device=self.device)  # the first that was not finite; read when needed
        self.stopped: int | None = None
        self._norms: dict[str, Tensor] = {}
        self._stream: Iterator[Batch] | None = None
        self._stream_state: Any = None
        self.folder = self._open_folder(settings)
        self._load(self.folder.resume())
        steps = distributed.collect(self.step, self.share.world)
        if len(set(steps)) > 1:
            raise ValueError(f"all processes must read the same checkpoint, got those of steps {steps}")

    def _open_folder(self, settings: dict[str, Any]) -> RunFolder:
        """The run's folder; where the first process is refused, all are."""
        folder, refused = None, None
        try:
            folder = RunFolder(self.out, settings, self.config.tensorboard, writes=self.share.rank == 0)
        except ValueError as error:
            refused = error
        if distributed.any_process(refused is not None, self.share.world, self.device) or folder is None:
            raise refused or ValueError("out was refused by another process, which says why")
        return folder

    def _create_source(self, run: RunConfig) -> tuple[Source, Sequence[EvalTask]]:
        """What the configuration asks for, in images of the sides that it names, one after the other."""
        own = self.model.image_size
        sizes = run.train.image_sizes or (own,)
        if set(sizes) != {own} and isinstance(self.model.image, HyperViT):
            raise ValueError(f"image_size must be {own} or None, as a HyperViT takes no other size, got {sizes}")
        if len(sizes) > 1 and run.data.kind != "pictures":
            raise ValueError(f"image_size must be one side for data.kind {run.data.kind}, got {sizes}")
        pictures = load_run_pictures(run, self.share) if len(sizes) > 1 else None  # once for all
        made = {size: create_source(run, size, self.share, self.device, pictures) for size in dict.fromkeys(sizes)}
        sources = [made[size][0] for size in sizes]
        return sources[0] if len(sizes) == 1 else StagedSource(sources, run.train.steps), made[sizes[-1]][1]

    @property
    def _trains_text(self) -> bool:
        return self.model.text is not None and "text" not in self.config.freeze

    def _known_features(self) -> Tensor | None:
        if self._trains_text or not self.source.names:
            return None
        with torch.no_grad():
            return self.model.text_features(self.source.names)

    def _prepare_model(self) -> None:
        """Checkpoint, average, wrap, compile: what the configuration asks for."""
        config, model = self.config, self.model
        if config.channels_last:
            model.image.to(memory_format=torch.channels_last)
        if config.grad_checkpointing:
            towers: list[Any] = [model.image, *([model.text] if self._trains_text else [])]
            for tower in towers:
                tower.set_grad_checkpointing()
        self.ema = None
        if config.ema:
            self.ema = ModelEmaV3(model, decay=config.ema, use_warmup=True)
            self.ema.module._frozen_text = model._frozen_text  # one tower for both
        spans = config.tasks_per_batch == 1 and self.share.world > 1
        self.objective = Objective(model, self.share, spans, config.loss_chunk, config.precision, config.row_penalty)
        world = self.share.world if config.accumulate == 1 else 1  # parts are averaged at the end, by no wrapper
        self.wrapped = distributed.wrap(self.objective, config.parallel, world)
        if config.compile:
            for module in (model.image, model.hypernetwork):
                if module is not None:
                    module.compile()

    def _load(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        distributed.load_states(self.model, self.optimizer, state)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.step = state["step"]
        self.broken = state["broken"] if self.share.rank == 0 else 0
        streams = state["streams"]
        if len(streams) != self.share.world and any(stream is not None for stream in streams):
            raise ValueError(f"a stream is resumed by as many processes as before, {len(streams)}, got {self.share}")
        self._stream_state = streams[self.share.rank] if len(streams) == self.share.world else None

    def save(self) -> None:
        """Write the checkpoint; no process goes on before it is there. Not once the loss has not been finite."""
        self._check_loss()
        state = {
            **distributed.states(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "step": self.step,
            "broken": sum(distributed.collect(self.broken, self.share.world)),
            "streams": distributed.collect(self._stream_state, self.share.world),
        }
        self.folder.save(state)
        distributed.barrier(self.share.world)

    def _check_loss(self) -> None:
        """Raise ValueError, in all processes, where loss or gradients of one were not finite."""
        step = int(self._bad_step)
        if distributed.any_process(step >= 0, self.share.world, self.device):
            when = f"step {step}" if step >= 0 else "another process"
            what = "loss and gradients must be finite, got others at"
            raise ValueError(f"{what} {when}; the last checkpoint is from before that")

    def log(self, entry: dict) -> None:
        """Append one JSON line."""
        self.folder.log(self.step, entry)

    def next_batch(self) -> Batch:
        """The batch of this step."""
        if self._stream is None:
            self._stream = self.source.batches(self.step, self._stream_state)
        batch = next(self._stream)
        self._stream_state = batch.state
        return batch

    @torch.no_grad()
    def inputs(self, batch: Batch) -> Inputs:
        """A batch on the device; texts of a frozen tower are encoded, those that are known once for all."""
        if self.features is not None:
            return Inputs.make(batch, self._places, self.device, self.features)
        places = {text: i for i, text in enumerate(dict.fromkeys(text for task in batch.classes for text in task))}
        table = None if self._trains_text else self.model.text_features(tuple(places))
        return Inputs.make(batch, places, self.device, table)

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; everything random in it depends on (seed, step) and the process alone."""
        config, batch = self.config, self.next_batch()
        inputs, seed = self.inputs(batch), step_seed(config.seed, self.step)
        seed = hash_seed(seed, self.share.rank) if self.share.rank else seed
        torch.manual_seed(seed)
        train_mode(self.model, config.freeze)
        set_learning_rate(self.optimizer, learning_rate(self.step, config))
        self.optimizer.zero_grad(set_to_none=True)
        loss, accuracy = self._backward(inputs, seed)
        self.scaler.unscale_(self.optimizer)
        self._norms = {}
        if (self.step + 1) % config.log_every == 0:
            self._norms = {**gradient_norms(self.model), **self._row_distances(inputs)}
        norm = clip_gradients(self.model, config.clip)
        self.scaler.step(self.optimizer)
        if self._pull is not None:
            self._pull.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if not self.scaler.is_enabled():  # float16's scaler leaves such a step out
            is_bad = ~(torch.isfinite(loss.detach()) & torch.isfinite(norm)) & (self._bad_step < 0)
            self._bad_step = torch.where(is_bad, self.step, self._bad_step)
        self.broken += batch.broken
        self._images = len(batch.images)
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        return {"loss": loss.detach(), "accuracy": accuracy, "grad_norm": norm}

    @torch.no_grad()
    def _row_distances(self, inputs: Inputs) -> dict[str, Tensor]:
        """Root mean squares, over numbers of a row: of a batch's rows from the base row, and from their mean."""
        if self.model.hypernetwork is None or inputs.table is None or self.config.parallel == "fsdp":
            return {}
        rows = self.model.rows(inputs.table[inputs.index], inputs.mask).table.float()
        base = self.model.image.base_params.table
        return {
            "row_distance": (rows - base).square().mean().sqrt(),
            "row_spread": (rows - rows.mean(0)).square().mean().sqrt(),
        }

    def _backward(self, inputs: Inputs, seed: int) -> tuple[Tensor, Tensor]:
        """The mean gradients of all processes, scaled; loss and accuracy of this one."""
        config, world = self.config, self.share.world
        if config.accumulate > 1:
            done = backward_in_parts(self.objective, inputs, config.accumulate, seed, self.scaler.scale)
            distributed.average_gradients(list(self.model.parameters()), world)
            return done
        loss, accuracy = self.wrapped(inputs)
        self.scaler.scale(loss).backward()
        if config.parallel == "fsdp":
            distributed.average_gradients(distributed.scalars(self.model), world)
        return loss, accuracy

    def measures(self, metrics: dict[str, Tensor], images_per_second: float) -> dict[str, float | None]:
        """A log line: means over processes of a step's metrics, gradient norms by part, scale, bias, rate, speed.

        A number that is not finite, as the norm where float16's scaler left out a step, is None.
        """
        scalars = {"logit_scale": self.model.logit_scale.exp(), "logit_bias": self.model.logit_bias}
        values = distributed.mean({**metrics, **self._norms, **scalars}, self.share.world)
        return {
            **{name: round(value, 4) if math.isfinite(value) else None for name, value in values.items()},
            "lr": learning_rate(self.step - 1, self.config),
            "images_per_second": round(images_per_second * self.share.world, 1),
            "broken": sum(distributed.collect(self.broken, self.share.world)),
        }

    def evaluate(self, model: HyperCLIP | None = None) -> dict[str, float]:
        """Mean held-out accuracy with the right, the base and a wrong row, logged; nothing for fewer than two tasks."""
        if len(self.held_out) < 2:
            return {}
        by_row = swap_test(model or self.model, self.held_out, rows=("right", "base", "wrong"))
        result = {row: mean_accuracy(by_task) for row, by_task in by_row.items()}
        self.log({"held_out": {row: round(value, 4) for row, value in result.items()}})
        return result

    def current_model(self) -> HyperCLIP | None:
        """The model that the run gives, whole: the average of the weights where there is one.

        With FSDP in several processes the first alone gets it, the others None.
        """
        if self.ema is not None:
            return self.ema.module
        if self.share.world == 1 or self.config.parallel == "ddp":
            return self.model
        state = distributed.states(self.model, self.optimizer)["model"]
        if self.share.rank > 0:
            return None
        copy = HyperCLIP(self.model.config).to(self.device)
        copy.load_state_dict(state)
        copy.take_text_from(self.model)
        return copy

    def train(self) -> HyperCLIP | None:
        """Train to the last step, logging and saving on the way; returns the model, also written to out/model.

        With FSDP in several processes the first alone returns it, the others None.
        On SIGTERM or SIGINT the step is finished and a checkpoint written; `stopped` then holds the signal.

        Raises:
            ValueError: if loss or gradients are not finite. Checkpoints are left as they were before that step.
        """
        if self.step >= self.config.steps and (self.out / "model").is_dir():
            model = self.current_model()  # finished in an earlier run
            return model if model is None else model.eval()
        with _signals_noted() as noted:
            self._train(noted)
        self.save()
        model = self.current_model()
        if self.stopped is None and model is not None and self.share.rank == 0:
            print(f"held out {self.evaluate(model)}" if self.held_out else f"trained {self.step} steps")
            self.folder.save_model(model.eval())
        self.folder.close()
        distributed.barrier(self.share.world)
        return model

    def _train(self, noted: list[int]) -> None:
        config = self.config
        bar = tqdm(
            initial=self.step,
            total=config.steps,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=None if self.share.rank == 0 else True,
        )
        images, start = 0, time.perf_counter()
        while self.step < config.steps and self.stopped is None:
            metrics = self.train_step()
            images += self._images
            bar.update()
            if self.step % config.log_every == 0:
                self._check_loss()
                values = self.measures(metrics, images / (time.perf_counter() - start))
                self.log(values)
                bar.set_postfix({name: values[name] for name in metrics})
            paused = time.perf_counter()
            if config.eval_every and self.step % config.eval_every == 0 and self.step < config.steps and self.held_out:
                model = self.current_model()
                if self.share.rank == 0:
                    bar.write(f"step {self.step}: held out {self.evaluate(model)}")
            if self.callback is not None:
                self.callback(self, metrics)
            start += time.perf_counter() - paused
            if self.step % config.save_every == 0 and self.step < config.steps:
                self.save()
            if self.share.world == 1 or self.step % STOP_EVERY == 0:
                told = distributed.any_process(bool(noted), self.share.world, self.device)
                self.stopped = (noted or [signal.SIGTERM])[0] if told else None
        bar.close()
        self._stream = None  # ends its workers


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """SIGTERM and SIGINT inside are noted in a list. A second Ctrl-C acts as it did before; SIGTERM may come to a whole
    process group and from torchrun, too."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may set handlers
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
