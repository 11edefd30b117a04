"""TaskBank: named tasks, each a row of norm parameters with class embeddings and names; any mix of them in one batch.

Adding a task costs one pass of text tower and hypernetwork, and no training. `classify` runs the encoder once over all
images, each with its own task's row, and scores each image against its own task's classes only.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.norm_params import NormParams, NormSpec
from hyperclip_fast.tasks import AdaptedTask, Ranked, adapt_tasks, class_logits, classify_tasks, rank
from hyperclip_fast.utils.class_names import check_name, check_named_tasks, check_task
from hyperclip_fast.utils.files import load_safetensors, save_safetensors


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image.

    Args:
        task: the task it was scored in.
        names: class names, best first.
        probabilities: their softmax probabilities within the task.
        scores: the sigmoid of each one's logit: how well it fits by itself, where the model was trained with the
            sigmoid loss. If all are low, the image may be none of these.
    """

    task: str
    names: tuple[str, ...]
    probabilities: tuple[float, ...]
    scores: tuple[float, ...]


class TaskBank:
    """Named tasks of one HyperCLIP, for one thread; ThreadSafeTaskBank is for several.

    Args:
        model: the model that made, or will make, the rows; put in eval mode. It must not change afterwards.
        chunk: tasks adapted in one pass by `add_many`.
    """

    def __init__(self, model: HyperCLIP, chunk: int = 64):
        self.model, self.chunk = model.eval(), chunk
        self._index: dict[str, int] = {}  # task -> its row in the table, and its place in the lists
        self._names: list[str] = []
        self._classes: list[tuple[str, ...]] = []
        self._embeddings: list[Tensor] = []  # (K_t, E) each
        spec = model.image.norm_spec
        dtype = torch.promote_types(model.logit_scale.dtype, torch.float32)
        self._table = torch.empty(0, spec.num_params, device=model.device, dtype=dtype)  # len(self) rows in use

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, task: str) -> bool:
        return task in self._index

    def __iter__(self) -> Iterator[str]:
        """Names of the tasks, in the order they were added."""
        return iter(self._index)

    def __getitem__(self, task: str) -> AdaptedTask:
        """A copy of a task that outlives its removal from the bank.

        Raises:
            KeyError: for an unknown name.
        """
        self._follow_model()
        try:
            place = self._find(task)
        except ValueError as error:
            raise KeyError(str(error)) from error
        return AdaptedTask(self._classes[place], self._embeddings[place].clone(), self._table[place].clone())

    def __repr__(self) -> str:
        shown = ", ".join(f"{task!r}: {len(self.classes(task))} classes" for task in islice(self, 4))
        more = ", ..." if len(self) > 4 else ""
        return f"TaskBank({self.model.config.image_tower}, {len(self)} tasks{': ' if shown else ''}{shown}{more})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order they were added."""
        return tuple(self._index)

    def classes(self, task: str) -> tuple[str, ...]:
        """Class names of a task."""
        return self._classes[self._find(task)]

    def class_embeddings(self, task: str) -> Tensor:
        """Class embeddings (K, E) of a task."""
        self._follow_model()
        return self._embeddings[self._find(task)]

    @property
    def params(self) -> NormParams:
        """All rows; index it with `task_ids` to get a batch's."""
        self._follow_model()
        return NormParams(self.model.image.norm_spec, self._table[: len(self)])

    def task_ids(self, tasks: Sequence[str]) -> Tensor:
        """Row (B,) of each named task.

        Raises:
            ValueError: for an unknown name.
        """
        return torch.tensor([self._find(task) for task in tasks], dtype=torch.int64, device=self.model.device)

    def add(self, task: str, class_names: Sequence[str]) -> None:
        """Add a task, or replace the one of that name.

        Raises:
            ValueError: for a name, or class names, that `check_named_tasks` refuses: a class name twice, for one.
        """
        self.add_many({task: class_names})

    @torch.inference_mode(False)  # what is made in inference mode could not be changed outside it
    @torch.no_grad()
    def add_many(self, tasks: Mapping[str, Sequence[str]]) -> None:
        """Add or replace many tasks, `chunk` of them in a pass. Nothing changes if one of them is refused.

        Raises:
            ValueError: for a name, or class names, that `check_named_tasks` refuses: a class name twice, for one.
        """
        check_named_tasks(tasks)
        names, made = list(tasks), []
        for start in range(0, len(names), self.chunk):
            made += adapt_tasks(self.model, [tasks[name] for name in names[start : start + self.chunk]])
        self._follow_model()
        for name, task in zip(names, made):
            self._put(name, task.classes, task.row, task.embeddings)

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_row(self, task: str, class_names: Sequence[str], row: NormParams) -> None:
        """Add or replace a task whose row comes from elsewhere, such as from fine-tuning; its names are still embedded.

        Args:
            task: its name.
            class_names: K of them.
            row: the row (T = 1), of this encoder's spec.

        Raises:
            ValueError: for a name or class names that are refused, see `class_names`, or a row of another spec.
        """
        if row.spec != self.model.image.norm_spec or row.num_tasks != 1:
            raise ValueError(f"row must be one row of {self.model.image.norm_spec.num_params} parameters, got {row}")
        check_name(task)
        check_task(class_names)
        features, _ = self.model.stack_tasks([class_names])
        self._follow_model()
        self._put(task, tuple(class_names), row.table[0], self.model.project_text(features)[0])

    def remove(self, task: str) -> None:
        """Remove a task; the last row moves into its place.

        Raises:
            ValueError: for an unknown name.
        """
        hole, last = self._find(task), len(self) - 1
        self._table[hole] = self._table[last]
        columns: tuple[list[Any], ...] = (self._names, self._classes, self._embeddings)
        for column in columns:
            column[hole] = column[last]
            column.pop()
        del self._index[task]
        if hole < last:
            self._index[self._names[hole]] = hole

    @torch.no_grad()
    def classify(self, images: Tensor, tasks: Sequence[str], topk: int = 1) -> list[Prediction]:
        """Classify a mixed batch in one forward pass, each image against its own task's classes.

        Args:
            images: (B, 3, S, S), as the model was trained on them.
            tasks: name of each image's task.
            topk: classes to report at most.

        Raises:
            ValueError: for an unknown task, another number of tasks than images, images of another kind or shape, or
                topk < 1.
        """
        _check_question(self.model, images, tasks, topk)
        if not len(images):
            return []
        ranked = rank(self._logits(images, tasks), [self.classes(task) for task in tasks], [topk] * len(tasks))
        return _predictions(tasks, ranked)

    def classify_files(
        self,
        images: Iterable[Any],
        tasks: str | Sequence[str],
        topk: int = 1,
        batch_size: int = 64,
        on_error: Callable[[Any, ValueError], None] | None = None,
    ) -> Iterator[tuple[Any, Prediction]]:
        """Classify pictures batch by batch, each against its own task's classes; results come as batches finish.

        Args:
            images: paths, or bytes or Pillow images; read as they are needed. One may come several times.
            tasks: name of each picture's task, or of the one task of all.
            topk: classes to report at most.
            batch_size: pictures in a forward pass.
            on_error: called with a picture that cannot be read and the reason, and the picture is left out; None: the
                error is raised.

        Returns:
            An iterator of pairs, (what `images` held, its Prediction).

        Raises:
            ValueError: as `classify`; from the iterator.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pairs = zip(images, repeat(tasks)) if isinstance(tasks, str) else zip(images, tasks, strict=True)
        whole: list[tuple[Any, str]] = []  # held, so that nothing else gets their ids
        loaded: dict[int, Tensor] = {}
        while whole := list(islice(pairs, batch_size)):
            loaded = self._load({id(image): image for image, _ in whole}.values(), loaded, on_error)
            part = [(image, task) for image, task in whole if id(image) in loaded]
            if part:
                batch = torch.stack([loaded[id(image)] for image, _ in part])
                predictions = self.classify(batch, [task for _, task in part], topk)
                yield from ((image, prediction) for (image, _), prediction in zip(part, predictions))

    def _load(
        self, images: Iterable[Any], known: dict[int, Tensor], on_error: Callable[[Any, ValueError], None] | None
    ) -> dict[int, Tensor]:
        """Pictures (3, S, S) by their id, those of the last batch as they are; without those that cannot be read."""
        loaded = {}
        for image in images:
            try:
                loaded[id(image)] = known[id(image)] if id(image) in known else self.model.preprocess(image)
            except ValueError as error:
                if on_error is None:
                    raise
                on_error(image, error)
        return loaded

    @torch.no_grad()
    def logits(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        """Scaled similarities (B, K) of each image with its own task's classes, -inf beyond a smaller task's classes.

        Raises:
            ValueError: for an unknown task, or images of another kind or shape.
        """
        self.model.check_images(images)
        return self._logits(images, tasks)

    @torch.no_grad()
    def _logits(self, images: Tensor, tasks: Sequence[str]) -> Tensor:
        params = self.params[self.task_ids(tasks)]
        places = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
        embeddings = [self._embeddings[self._find(task)] for task in places]
        index = torch.tensor([places[task] for task in tasks], device=self.model.device)
        return class_logits(self.model, images, params, embeddings, index)

    def save(self, path: str | Path) -> None:
        """Write every task into one safetensors file (beside, then renamed)."""
        self._follow_model()
        parts = zip(self._names, self._classes, self._embeddings, self._table)
        tasks = {name: AdaptedTask(classes, embeddings, row) for name, classes, embeddings, row in parts}
        save_tasks(path, self.model, {name: tasks[name] for name in self})

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | Path, model: HyperCLIP) -> "TaskBank":
        """Read what `save` wrote, for the same model.

        Raises:
            ValueError: if the file is no bank, is cut short, or was made by another model.
        """
        tensors, metadata = load_safetensors(path)
        if missing := {"tasks", "norm_spec", "model"} - set(metadata):
            raise ValueError(f"path must be a saved TaskBank, {path} lacks {sorted(missing)}")
        if metadata["model"] != fingerprint(model) or metadata.get("config", _config(model)) != _config(model):
            raise ValueError(f"path must hold a bank made by this model, {path} was made by another one")
        if NormSpec.from_json(metadata["norm_spec"]) != model.image.norm_spec:
            raise ValueError(f"path must hold rows for the layers that this model modulates, {path} has other layers")
        tasks = _tasks(metadata["tasks"], path)
        sizes = [len(classes) for classes in tasks.values()]
        shapes = {
            "table": (len(tasks), model.image.norm_spec.num_params),
            "class_embeddings": (sum(sizes), model.config.embed_dim),
        }
        for name, shape in shapes.items():
            found = tensors.get(name, torch.empty(0))
            if tuple(found.shape) != shape or not found.is_floating_point() or not found.isfinite().all():
                raise ValueError(f"path must hold {name} {shape} of finite numbers, {path} has {tuple(found.shape)}")
        table, embeddings = tensors["table"], tensors["class_embeddings"]
        parts = embeddings.to(model.device).split(sizes)
        return cls._filled(model, dict(zip(tasks, zip(tasks.values(), parts))), table.to(model.device))

    @classmethod
    @torch.inference_mode(False)
    def of(cls, model: HyperCLIP, tasks: Mapping[str, AdaptedTask]) -> "TaskBank":
        """A bank of ready tasks that the same model made."""
        parts = {name: (task.classes, task.embeddings.to(model.device)) for name, task in tasks.items()}
        rows = [task.row.to(model.device) for task in tasks.values()]
        return cls._filled(model, parts, _stack(rows, model.image.norm_spec.num_params).to(model.device))

    @classmethod
    def _filled(
        cls, model: HyperCLIP, tasks: Mapping[str, tuple[tuple[str, ...], Tensor]], table: Tensor
    ) -> "TaskBank":
        """A bank of classes and class embeddings by task, and their rows (T, P)."""
        bank = cls(model)
        bank._index = {task: i for i, task in enumerate(tasks)}
        bank._names, bank._classes = list(tasks), [classes for classes, _ in tasks.values()]
        bank._embeddings, bank._table = [embeddings for _, embeddings in tasks.values()], table
        return bank

    def _find(self, task: str) -> int:
        return _get(self._index, task)

    @torch.inference_mode(False)
    def _follow_model(self) -> None:
        """Rows and embeddings go to the device that the model went to."""
        device = self.model.device
        if self._table.device != device:
            self._table = self._table.to(device)
            self._embeddings = [embeddings.to(device) for embeddings in self._embeddings]

    def _put(self, task: str, classes: tuple[str, ...], row: Tensor, embeddings: Tensor) -> None:
        if task not in self._index:
            if len(self) == len(self._table):
                room = self._table.new_zeros(max(8, len(self)), self._table.shape[1])
                self._table = torch.cat([self._table, room])
            self._index[task] = len(self)
            self._names.append(task)
            self._classes.append(())
            self._embeddings.append(embeddings)
        place = self._index[task]
        self._table[place] = row
        self._classes[place], self._embeddings[place] = classes, embeddings


class ThreadSafeTaskBank:
    """Named tasks of one HyperCLIP that threads share: any of them may classify while others change tasks.

    What is known lies in a dictionary that never changes: a change makes another one and puts it in place in one step,
    and `classify` takes it once. So each call is answered by the tasks as they were at one moment, before or after any
    change (all tasks of an `add_many` together). Changes wait for each other, and nothing waits for `classify`. Rows
    are gathered for each call, where a TaskBank holds them in a table. It can be sent to another process (pickle,
    spawn); a process may be forked where no thread is changing tasks.

    Args:
        model: the model that makes the rows; put in eval mode. It must not change afterwards.
        chunk: tasks adapted in one pass by `add_many`.
    """

    def __init__(self, model: HyperCLIP, chunk: int = 64):
        self.model, self.chunk = model.eval(), chunk
        self._known: dict[str, AdaptedTask] = {}
        self._changing = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, task: str) -> bool:
        return task in self._known

    def __iter__(self) -> Iterator[str]:
        """Names of the tasks, in the order they were added, as they are now."""
        return iter(self._known)

    def __getitem__(self, task: str) -> AdaptedTask:
        """A task, as a value that outlives its removal.

        Raises:
            KeyError: for an unknown name.
        """
        return self._known[task]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_changing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._changing = threading.Lock()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order they were added."""
        return tuple(self._known)

    def classes(self, task: str) -> tuple[str, ...]:
        """Class names of a task."""
        return _get(self._known, task).classes

    def add(self, task: str, class_names: Sequence[str]) -> None:
        """Add a task, or replace the one of that name.

        Raises:
            ValueError: for a name, or class names, that `check_named_tasks` refuses: a class name twice, for one.
        """
        self.add_many({task: class_names})

    def add_many(self, tasks: Mapping[str, Sequence[str]]) -> None:
        """Add or replace many tasks, all at one moment, or none of them if one is refused.

        Raises:
            ValueError: for a name, or class names, that `check_named_tasks` refuses: a class name twice, for one.
        """
        check_named_tasks(tasks)
        names, made = list(tasks), []
        with self._changing:  # text towers are no threads' to share
            for start in range(0, len(names), self.chunk):
                made += adapt_tasks(self.model, [tasks[name] for name in names[start : start + self.chunk]])
            self._known = {**self._known, **dict(zip(names, made))}

    def remove(self, task: str) -> None:
        """Remove a task.

        Raises:
            ValueError: for an unknown name.
        """
        with self._changing:
            _get(self._known, task)
            self._known = {name: value for name, value in self._known.items() if name != task}

    def classify(self, images: Tensor, tasks: Sequence[str], topk: int = 1) -> list[Prediction]:
        """Classify a mixed batch in one forward pass, as `TaskBank.classify` does."""
        _check_question(self.model, images, tasks, topk)
        known = self._known
        asked = [_get(known, task) for task in tasks]
        return _predictions(tasks, classify_tasks(self.model, images, asked, [topk] * len(asked))) if asked else []

    def save(self, path: str | Path) -> None:
        """Write every task, as they are now, into one safetensors file (beside, then renamed)."""
        save_tasks(path, self.model, self._known)

    @classmethod
    def load(cls, path: str | Path, model: HyperCLIP) -> "ThreadSafeTaskBank":
        """Read what `save`, `TaskBank.save` or the server wrote, for the same model.

        Raises:
            ValueError: if the file is no bank, is cut short, or was made by another model.
        """
        saved, bank = TaskBank.load(path, model), cls(model)
        bank._known = {name: saved[name] for name in saved}
        return bank


def _check_question(model: HyperCLIP, images: Tensor, tasks: Sequence[str], topk: int) -> None:
    """Raise ValueError unless there is a task for each of the images, and a class to report."""
    model.check_images(images)
    if isinstance(tasks, str) or len(tasks) != len(images):
        raise ValueError(f"tasks must name a task for each of {len(images)} images, got {tasks!r}")
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")


def _predictions(tasks: Sequence[str], ranked: Sequence[Ranked]) -> list[Prediction]:
    return [Prediction(task, *map(tuple, zip(*best))) for task, best in zip(tasks, ranked)]


def _get(known: Mapping[str, Any], task: str) -> Any:
    if task not in known:
        some = ", ".join(islice(known, 8)) or "none"
        raise ValueError(f"task must be one of the bank's {len(known)} tasks ({some}...), got {task!r}")
    return known[task]


def save_tasks(
    path: str | Path, model: HyperCLIP, tasks: Mapping[str, AdaptedTask], made_by: str | None = None
) -> None:
    """Write tasks as `TaskBank.load` reads them (beside, then renamed); on a GPU they need no further room.

    Args:
        path: the file.
        model: what made them.
        tasks: by name, in their order.
        made_by: the model's `fingerprint`, where it is known: it reads every weight.
    """
    metadata = {
        "tasks": json.dumps({name: task.classes for name, task in tasks.items()}),
        "norm_spec": model.image.norm_spec.to_json(),
        "model": made_by or fingerprint(model),
        "config": _config(model),
    }
    embeddings = [task.embeddings.cpu() for task in tasks.values()]
    tensors = {
        "table": _stack([task.row.cpu() for task in tasks.values()], model.image.norm_spec.num_params),
        "class_embeddings": torch.cat(embeddings) if embeddings else torch.empty(0, model.config.embed_dim),
    }
    save_safetensors(tensors, path, metadata)


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows as a table (T, width), whose T may be 0."""
    return torch.stack(list(rows)) if rows else torch.empty(0, width)


def _tasks(text: str, path: str | Path) -> dict[str, tuple[str, ...]]:
    """Class names by task, from a bank's metadata."""
    try:
        tasks = {task: tuple(classes) for task, classes in json.loads(text).items()}
        for classes in tasks.values():
            check_task(classes)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"path must be a saved TaskBank, {path} has damaged tasks: {error}") from error
    return tasks


def fingerprint(model: HyperCLIP) -> str:
    """A hash of what makes rows and embeddings, weights and text tower: a bank fits no other model."""
    text = model.config.text_sha256 or model.config.text_tower
    digest = hashlib.sha256(repr((text, model.config.templates)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config(model: HyperCLIP) -> str:
    """What else makes results, and shows in no weight, as JSON; files from before it was kept have none."""
    config = model.config
    names = ("img_size", "num_heads", "global_pool", "hyper_heads", "hyper_pool")
    values = {name: getattr(config, name) for name in names}
    if config.text_head == "kernel":
        values["text_gamma"] = config.text_gamma
    if config.image_kwargs:
        values["image_kwargs"] = config.image_kwargs
    return json.dumps({"image_tower": config.image_tower.removeprefix("hyper_"), **values})
