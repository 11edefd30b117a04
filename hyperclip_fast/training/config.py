"""What is trained, how and on what: three dataclasses, a YAML file with a section each, and dotted changes to it.

    model: {...}     HyperCLIPConfig        train: {...}     TrainConfig        data: {...}     DataConfig

`load_config(path, ["train.lr=3e-4", "data.path=shards/{0000..0127}.tar"])`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from hyperclip_fast.configs import shipped_configs
from hyperclip_fast.data.batch import BatchShape
from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.hyperclip import load_model_config
from hyperclip_fast.hyperclip_config import HyperCLIPConfig, config_from_dict
from hyperclip_fast.utils.class_names import SHORT
from hyperclip_fast.utils.text_files import parse_yaml, read_yaml
from hyperclip_fast.utils.typed_config import check_choice, check_types, from_dict

PARTS = ("image", "text", "hypernetwork", "logit")
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass
class TrainConfig:
    """How a model is trained. The batch, its tasks and every step are those of all processes together.

    Args:
        init: what to start from, as `HyperCLIP.from_pretrained` takes it; its configuration is the model's where a
            file has no section model, and its weights must fit the section where there is one.
        steps: optimiser steps.
        tasks_per_batch: G.
        classes_per_task: K, one picture each; or the least and the most, from which each task draws its own (pictures
            and labels only).
        lr: peak learning rate, greater than 0; to leave a part as it is, see freeze.
        min_lr: learning rate at the end of the schedule.
        warmup: steps of linear warm-up.
        schedule: from lr to min_lr, "cosine" or "linear"; or "constant".
        weight_decay: of matrices; vectors and the image tower's no_weight_decay names (timm's) are spared.
        image_lr: peak for the image tower; None, here and in the next five: as the others have it.
        text_lr: peak for text tower and projection.
        hyper_lr: peak for the hypernetwork.
        image_weight_decay: of the image tower's matrices.
        text_weight_decay: of the matrices of text tower and projection.
        hyper_weight_decay: of the hypernetwork's matrices.
        image_layer_decay: the image tower's learning rate falls by this factor from each layer to the one before it
            (timm's layers), the stem's most; 1: it does not.
        image_pull: of the image tower's weights to where they start, with AdamW's decoupled weight decay as the
            measure: each step they lose learning rate x image_pull of the way. What they knew they forget less.
        row_penalty: factor of |row - base|^2, summed over the row and averaged over tasks, in the loss.
        freeze: parts that are not trained, of "image", "text", "hypernetwork", "logit" (scale and bias).
        betas: of AdamW.
        clip: largest gradient norm; 0: any.
        accumulate: parts that a batch is split into, one in memory at a time; gradients are those of the whole batch.
        precision: "float32"; or "bfloat16", "float16" by autocast, the latter with a gradient scaler.
        grad_checkpointing: run the towers' blocks again in backward instead of keeping what is in them.
        channels_last: keep the image tower's weights in that memory format, in which convolutions are faster.
        compile: torch.compile image tower and hypernetwork.
        ema: decay of an average of the weights, which then is the model that the run gives; 0: none.
        loss_chunk: images whose similarities are held at once, see `losses.siglip_loss`; 0: all.
        balance_bias: start the logit bias at `losses.balanced_bias` of K in place of the model's init_logit_bias.
        parallel: how several processes share the work, "ddp" or "fsdp" (parameters and optimiser state in shards).
        mixed_groups: share of tasks that draw names from all groups.
        seed: of initialisation, batches, augmentation and dropout.
        log_every: steps between log lines.
        eval_every: steps between swap tests on held-out names; 0: only at the end.
        save_every: steps between checkpoints.
        tensorboard: log for TensorBoard, too.
        picture_size: side of the rendered pictures.
        image_size: side of the images in training; None: the model's. Only a tower that takes any size has a choice.
            Several, for pictures: each for an equal part of the steps, in order, such as [96, 96, 96, 160].
    """

    init: str = ""
    steps: int = 4000
    tasks_per_batch: int = 8
    classes_per_task: int | tuple[int, int] = 16
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 200
    schedule: str = "cosine"
    weight_decay: float = 0.05
    image_lr: float | None = None
    text_lr: float | None = None
    hyper_lr: float | None = None
    image_weight_decay: float | None = None
    text_weight_decay: float | None = None
    hyper_weight_decay: float | None = None
    image_layer_decay: float = 1.0
    image_pull: float = 0.0
    row_penalty: float = 0.0
    freeze: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    accumulate: int = 1
    precision: str = "float32"
    grad_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    ema: float = 0.0
    loss_chunk: int = 0
    balance_bias: bool = False
    parallel: str = "ddp"
    mixed_groups: float = 0.25
    seed: int = 0
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    tensorboard: bool = False
    picture_size: int = 64
    image_size: int | tuple[int, ...] | None = None

    def __post_init__(self):
        check_types(self)
        for name in ("steps", "tasks_per_batch", "accumulate", "log_every", "save_every", "picture_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be greater than 0, got {self.lr}")
        for name in ("warmup", "clip", "loss_chunk", "eval_every", "image_pull", "row_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 2 <= self.class_range[0] <= self.class_range[1]:
            raise ValueError(f"classes_per_task must be at least 2, or two such numbers, got {self.classes_per_task}")
        if not 0 < self.image_layer_decay <= 1:
            raise ValueError(f"image_layer_decay must lie in (0, 1], got {self.image_layer_decay}")
        if self.image_size is not None and (not self.image_sizes or min(self.image_sizes) < 8):
            raise ValueError(f"image_size must be at least 8, several such sides, or None, got {self.image_size}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        check_choice(self, schedule=SCHEDULES, precision=PRECISIONS, parallel=("ddp", "fsdp"))
        if self.parallel == "fsdp" and (self.accumulate > 1 or self.ema or self.precision == "float16"):
            got = f"{self.accumulate}, {self.ema} and {self.precision}"
            raise ValueError(f"accumulate, ema and float16 go with ddp, not fsdp, got {got}")
        if not set(self.freeze) <= set(PARTS):
            raise ValueError(f"freeze must name some of {PARTS}, got {self.freeze}")

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sides of the images, each for an equal part of the steps; none: the model's."""
        sizes = self.image_size
        return () if sizes is None else (sizes,) if isinstance(sizes, int) else sizes

    @property
    def class_range(self) -> tuple[int, int]:
        """The least and the most classes of a task."""
        return self.batch_shape.class_range

    @property
    def batch_shape(self) -> BatchShape:
        """What a source needs to know of these."""
        return BatchShape(self.tasks_per_batch, self.classes_per_task, self.seed, self.mixed_groups)


@dataclass(frozen=True)
class RunConfig:
    """The three sections of a file.

    Args:
        model: what is trained.
        train: how.
        data: on what; OpenMoji and digits where nothing else is said.
    """

    model: HyperCLIPConfig = field(default_factory=HyperCLIPConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)


SECTIONS = tuple(section.name for section in fields(RunConfig))


def load_config(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read {"model": {...}, "train": {...}, "data": {...}} from a YAML or JSON file.

    Args:
        path: the file, or the name of a shipped one, see `shipped_configs`; what it leaves out keeps its default.
        changes: each "section.key=value", with the value in YAML, in place of the file's.

    Raises:
        ValueError: for a file that is neither, keys that are no fields, or values of another type.
    """
    sections = read_yaml(_find_config(path), "config")
    if not isinstance(sections, dict) or not set(sections) <= set(SECTIONS):
        got = SHORT.repr(sections) if sections else "nothing"
        raise ValueError(f"config must have the sections model and train, or data, too, got {got}")
    for change in changes:
        section, key, value = _parse_change(change)
        try:
            sections[section] = {**(sections.get(section) or {}), key: parse_yaml(value)}
        except ValueError as error:
            raise ValueError(f"{section}.{key} must be a value in YAML, got {value!r}: {error}") from error
    train = from_dict(TrainConfig, sections.get("train") or {}, "train")
    given = sections.get("model") or {}
    model = load_model_config(train.init) if train.init and not given else config_from_dict(given)
    return RunConfig(model, train, from_dict(DataConfig, sections.get("data") or {}, "data"))


def _find_config(path: str | Path) -> Path:
    shipped = shipped_configs()
    found = Path(path) if Path(path).is_file() else shipped.get(str(path), Path(path))
    if not found.is_file():
        raise ValueError(f"config must be a file, or a name among {', '.join(shipped)}, got {path}")
    return found


def _parse_change(change: str) -> tuple[str, str, str]:
    place, equals, value = change.partition("=")
    section, dot, key = place.strip().partition(".")
    if not equals or not dot or section not in SECTIONS:
        raise ValueError(f"--set must be section.key=value with a section of {SECTIONS}, got {change!r}")
    return section, key, value
