"""Scenes composed of OpenMoji pictures, and attribute tasks on them: one image, several tasks, several right answers.

A scene shows one to six copies of a picture on a coloured ground. What a task asks for is one of six attributes: the
object, the ground's colour, how many copies, their size, how they are turned, where they stand. The class names alone
say which, in several wordings, of which one an attribute is kept for evaluation. A small encoder that knows the
question may spend all of its embedding on the answer: this is where conditioning could matter most.

One `grid_sample` renders a batch of scenes, whatever the counts: each pixel finds the copy whose cell it is in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast.data.augmentation import to_rgba
from hyperclip_fast.data.batch import BatchShape, Share
from hyperclip_fast.data.config import SCENES
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.picture_source import TaskSource
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.task_sampler import TaskBatch
from hyperclip_fast.utils.seeds import step_seed

OBJECT_GROUPS = ("activities", "animals", "food", "nature", "objects", "travel")
COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.55, 0.14),
    "yellow": (0.97, 0.89, 0.25),
    "green": (0.25, 0.66, 0.28),
    "turquoise": (0.27, 0.82, 0.80),
    "blue": (0.20, 0.38, 0.86),
    "purple": (0.56, 0.27, 0.72),
    "pink": (0.97, 0.65, 0.78),
    "brown": (0.51, 0.33, 0.19),
    "beige": (0.90, 0.82, 0.66),
    "grey": (0.58, 0.58, 0.58),
    "white": (0.97, 0.97, 0.97),
}
COUNTS = ("one", "two", "three", "four", "five", "six")
COPIES = ((1, 0), (2, 0), (2, 1), (2, 2), (3, 2), (3, 3))  # in the first and the second line, by count
SIZES = {"tiny": 0.21, "small": 0.27, "medium-sized": 0.35, "large": 0.46, "very large": 0.60, "huge": 0.79}  # of S
TURNS = (  # clockwise, by 45 degrees
    "upright",
    "leaning to the right",
    "lying on its right side",
    "toppling over to the right",
    "upside down",
    "toppling over to the left",
    "lying on its left side",
    "leaning to the left",
)
PLACES = tuple(
    f"{line} {side}".replace("middle centre", "centre").replace("middle", "centre")
    for line in ("top", "middle", "bottom")
    for side in ("left", "centre", "right")
)
VALUES = {"colour": tuple(COLOURS), "count": COUNTS, "size": tuple(SIZES), "orientation": TURNS, "place": PLACES}
ATTRIBUTES = ("object", *VALUES)
MOST_VALUES = min(map(len, VALUES.values()))  # the most classes that a task of any attribute can have
TEMPLATES = {  # the last wording of each is for evaluation only
    "object": ("{}", "a {}", "a picture of a {}", "this image shows a {}"),
    "colour": ("{} background", "on a {} background", "a {} backdrop", "in front of a {} wall"),
    "count": ("{}", "the number {}", "{} of them", "there are {}"),
    "size": ("{}", "{} in size", "a {} thing", "it looks {}"),
    "orientation": ("{}", "it is {}", "a thing that is {}", "shown {}"),
    "place": ("{} of the image", "at the {}", "placed at the {}", "found in the {}"),
}
EVALUATION = 999_983  # the step whose chance evaluation scenes have: no run is as long
SALT = 0x5CE9E5  # apart from the chance that other pictures of the same step have
FREE = 0.3  # of S: the least room in which left and right, or top and bottom, can be told apart


def _combinations() -> Tensor:
    """(C, 3): the (count, size, place) that fit into the frame, and in which the place can be seen."""
    found = []
    for count, (first, second) in enumerate(COPIES):
        for size, side in enumerate(SIZES.values()):
            room_x, room_y = 1 - first * side, 1 - (2 if second else 1) * side
            for place in range(9):
                sees_x, sees_y = place % 3 == 1 or room_x >= FREE, place // 3 == 1 or room_y >= FREE
                if min(room_x, room_y) >= 0.05 and sees_x and sees_y:
                    found.append((count, size, place))
    return torch.tensor(found)


COMBINATIONS = _combinations()


def _chances() -> Tensor:
    """(C,): every count is as frequent as another, and so are the sizes that go with it, and the places with both."""
    fits = torch.zeros(len(COUNTS), len(SIZES))
    count, size, _ = COMBINATIONS.unbind(1)
    fits.index_put_((count, size), torch.ones(len(count)), accumulate=True)
    return 1 / (fits[count, size] * (fits > 0).sum(1)[count])


CHANCES = _chances()


@dataclass(frozen=True)
class Scenes:
    """What M scenes show.

    Args:
        pictures: (M,) int64, the picture that is copied.
        objects: (M,) int64, its name.
        values: by attribute other than "object": (M,) int64, index into VALUES.
    """

    pictures: Tensor
    objects: Tensor
    values: dict[str, Tensor]

    def __getitem__(self, attribute: str) -> Tensor:
        """(M,) the value of an attribute, "object" included."""
        return self.objects if attribute == "object" else self.values[attribute]


class Composer:
    """Draws scenes and renders them.

    Args:
        pictures: what may be shown; pictures of other groups than `OBJECT_GROUPS` never are.
        size: S of a scene in pixels.

    Raises:
        ValueError: for pictures without a single one of these groups.
    """

    def __init__(self, pictures: Pictures, size: int = 48):
        self.names, self.size = pictures.names, size
        able = torch.tensor([pictures.groups[label] in OBJECT_GROUPS for label in pictures.labels.tolist()])
        if not able.any():
            raise ValueError(f"pictures must have some of the groups {OBJECT_GROUPS}, got {set(pictures.groups)}")
        self.pictures = pictures.subset(able)
        self.objects = self.pictures.labels.unique()
        self.counts = torch.bincount(self.pictures.labels, minlength=len(self.names))
        self.by_label = self.pictures.labels.argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts
        self.colours = torch.tensor(list(COLOURS.values()))

    @cached_property
    def bank(self) -> Tensor:
        """(2, M, 4, s, s) float32: pictures, colours premultiplied, and the same without detail for small copies."""
        rgba = self.pictures.images.float() / 255
        sharp = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
        soft = F.interpolate(F.avg_pool2d(sharp, 2), size=sharp.shape[-2:], mode="bilinear", align_corners=False)
        return torch.stack([sharp, soft])

    def draw(self, count: int, generator: torch.Generator, wanted: dict[str, Tensor] | None = None) -> Scenes:
        """Scenes with some attributes given and all else by chance.

        Args:
            count: M.
            generator: where all chance comes from.
            wanted: by attribute: (M,) int64, the value it must have, -1 where it is free.

        Raises:
            ValueError: for an attribute or values of another shape, or a count, size and place that do not go together.
        """
        free = torch.full((count,), -1)
        wanted = wanted or {}
        for attribute, value in wanted.items():
            if attribute not in ATTRIBUTES or value.shape != free.shape:
                raise ValueError(f"wanted must map {ATTRIBUTES} to shape ({count},), got {attribute}: {value.shape}")
        weights = CHANCES.expand(count, -1)
        for column, attribute in enumerate(("count", "size", "place")):
            value = wanted.get(attribute, free)[:, None]
            weights = weights * ((value == COMBINATIONS[:, column]) | (value < 0))
        if not (weights.sum(1) > 0).all():
            raise ValueError("wanted must be a count, size and place that fit into the frame together")
        chosen = COMBINATIONS[torch.multinomial(weights, 1, generator=generator)[:, 0]]
        values = dict(zip(("count", "size", "place"), chosen.unbind(1)))
        for attribute in ("colour", "orientation"):
            random = torch.randint(len(VALUES[attribute]), (count,), generator=generator)
            values[attribute] = torch.where(wanted.get(attribute, free) < 0, random, wanted.get(attribute, free))
        objects = self.objects[torch.randint(len(self.objects), (count,), generator=generator)]
        objects = torch.where(wanted.get("object", free) < 0, objects, wanted.get("object", free))
        which = (torch.rand(count, generator=generator, dtype=torch.float64) * self.counts[objects]).long()
        return Scenes(self.by_label[self.starts[objects] + which], objects, values)

    def render(self, scenes: Scenes, generator: torch.Generator) -> Tensor:
        """Images (M, 3, S, S) float32 in [-1, 1]; sizes, turns, places and colours vary a little."""
        count = len(scenes.objects)
        noise = torch.rand((7, count), generator=generator) * 2 - 1
        side = torch.tensor(list(SIZES.values()))[scenes["size"]] * (1 + 0.05 * noise[0])
        grid, inside = self._grid(scenes, side, noise)
        small = (side * self.size < 0.7 * self.bank.shape[-1]).long()
        copies = F.grid_sample(self.bank[small, scenes.pictures], grid, padding_mode="zeros", align_corners=False)
        copies = copies * inside[:, None]
        ground = (self.colours[scenes["colour"]] + 0.06 * noise[4:7].T).clamp(0, 1)[..., None, None]
        images = (copies[:, :3] + ground * (1 - copies[:, 3:])).mul_(2).sub_(1)
        return images.contiguous(memory_format=torch.channels_last)  # a convolution reads them faster

    def _grid(self, scenes: Scenes, side: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Where each pixel reads the picture (M, S, S, 2), and whether it is in a copy's cell (M, S, S)."""
        lines = torch.tensor(COPIES)[scenes["count"]]  # (M, 2): copies in each line
        high = (lines > 0).sum(1)
        at_x = _centre(scenes["place"] % 3, 1 - lines[:, 0] * side, noise[2])
        at_y = _centre(scenes["place"] // 3, 1 - high * side, noise[3])
        pixels = (torch.arange(self.size) + 0.5) / self.size
        down = (pixels - at_y[:, None]) / side[:, None] + high[:, None] / 2  # (M, S): in cells, from the top
        line = down.floor().clamp(0, 1).long()
        across_in = lines.gather(1, line)  # (M, S): copies in this pixel's line
        across = ((pixels - at_x[:, None]) / side[:, None])[:, None] + across_in[..., None] / 2  # (M, S, S)
        inside = ((down >= 0) & (down < high[:, None]))[..., None] & (across >= 0) & (across < across_in[..., None])
        x, y = across.frac().mul_(2).sub_(1), ((down - line).mul(2) - 1)[..., None].expand_as(across)
        angle = math.pi / 4 * scenes["orientation"] + 0.12 * noise[1]
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        return torch.stack([cos * x + sin * y, cos * y - sin * x], -1), inside


def _centre(third: Tensor, room: Tensor, noise: Tensor) -> Tensor:
    """(M,) centres for thirds 0, 1, 2 of the frame, with `room` (M,) to move in."""
    return 0.5 + room / 2 * ((third - 1) * 0.8 + 0.2 * noise)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(step_seed(seed, step) ^ SALT)


class SceneSampler:
    """An endless stream of mixed batches of attribute tasks, for `Trainer`; batch(step) depends on seed and step only.

    Task g of step s asks for the attributes in turn, in one wording; image k shows class k, all else is by chance.

    Args:
        pictures: what scenes are made of; those held out are never drawn.
        tasks_per_batch: G.
        classes_per_task: K.
        seed: of the stream.
        size: S in pixels.
        attributes: those that tasks ask for.

    Raises:
        ValueError: for a K that some attribute has not the values for, no task, or an unknown attribute.
    """

    def __init__(
        self,
        pictures: Pictures,
        tasks_per_batch: int = 12,
        classes_per_task: int = 6,
        seed: int = 0,
        size: int = 48,
        attributes: Sequence[str] = ATTRIBUTES,
    ):
        self.composer = Composer(pictures.subset(~pictures.held_out), size)
        most = min(len(self.composer.objects), MOST_VALUES)
        if not 2 <= classes_per_task <= most:
            raise ValueError(f"classes_per_task must lie in [2, {most}], got {classes_per_task}")
        if tasks_per_batch < 1:
            raise ValueError(f"tasks_per_batch must be positive, got {tasks_per_batch}")
        if not attributes or not set(attributes) <= set(ATTRIBUTES):
            raise ValueError(f"attributes must be some of {ATTRIBUTES}, got {attributes!r}")
        self.tasks_per_batch, self.classes_per_task, self.seed = tasks_per_batch, classes_per_task, seed
        self.attributes = tuple(attributes)
        self.names: tuple[str, ...] = ()
        self.starts: dict[tuple[str, int], int] = {}  # (attribute, wording) to the index of its first name
        for attribute in self.attributes:
            for wording in range(len(TEMPLATES[attribute]) - 1):
                texts = class_names(attribute, [pictures.names[i] for i in self.composer.objects.tolist()], wording)
                self.starts[attribute, wording] = len(self.names)
                self.names += texts

    def batch(self, step: int) -> TaskBatch:
        """The mixed batch of this step; images are float32 in [-1, 1], for the trainer to take as they are."""
        generator = _generator(self.seed, step)
        tasks, classes = self.tasks_per_batch, self.classes_per_task
        wanted = {attribute: torch.full((tasks, classes), -1) for attribute in ATTRIBUTES}
        class_ids = torch.empty(tasks, classes, dtype=torch.long)
        for g in range(tasks):
            attribute = self.attributes[(step * tasks + g) % len(self.attributes)]
            count = len(self.composer.objects if attribute == "object" else VALUES[attribute])
            chosen = torch.randperm(count, generator=generator)[:classes]
            wording = int(torch.randint(len(TEMPLATES[attribute]) - 1, (), generator=generator))
            class_ids[g] = self.starts[attribute, wording] + chosen
            wanted[attribute][g] = self.composer.objects[chosen] if attribute == "object" else chosen
        flat = {attribute: value.flatten() for attribute, value in wanted.items()}
        scenes = self.composer.draw(tasks * classes, generator, flat)
        images = self.composer.render(scenes, generator)
        task_ids = torch.arange(tasks).repeat_interleave(classes)
        return TaskBatch(images, task_ids, class_ids, torch.zeros(len(images), dtype=torch.bool))


def scene_source(
    pictures: Pictures,
    shape: BatchShape,
    preprocessing: Preprocessing,
    share: Share,
    attributes: Sequence[str] = ATTRIBUTES,
) -> TaskSource:
    """Batches of scenes made of Pictures' training part.

    Raises:
        ValueError: as `SceneSampler`.
    """
    most, side = shape.class_range[1], preprocessing.size
    sampler = SceneSampler(pictures, shape.tasks_per_batch, most, shape.seed, side, attributes)
    return TaskSource(sampler, sampler.names, shape, preprocessing, share)


def class_names(attribute: str, objects: Sequence[str], wording: int = 0) -> tuple[str, ...]:
    """What the values of an attribute are called, in one of its wordings; -1 is the one kept for evaluation.

    Args:
        attribute: one of ATTRIBUTES.
        objects: names of the objects.
        wording: index into TEMPLATES[attribute].

    Raises:
        ValueError: for another attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"attribute must be one of {ATTRIBUTES}, got {attribute!r}")
    values = objects if attribute == "object" else VALUES[attribute]
    return tuple(TEMPLATES[attribute][wording].replace("{}", value) for value in values)


def scene_tasks(
    pictures: Pictures, scenes: int = 960, classes: int = 8, seed: int = 0, wording: int = 0, size: int = 48
) -> list[EvalTask]:
    """The same scenes of held-out objects under all six attributes, in the order of ATTRIBUTES.

    Objects are asked for in tasks of `classes` names ("object 1", "object 2", ...), each with its part of the scenes;
    every other attribute is one task with all of its values, on all scenes.

    Args:
        pictures: what scenes are made of; only those held out are drawn.
        scenes: M, rounded down to a multiple of the number of object tasks.
        classes: names of an object task.
        seed: of the scenes.
        wording: of the class names; -1: the one that training never sees.
        size: S in pixels.

    Raises:
        ValueError: for fewer held-out objects than `classes`, or fewer scenes than object tasks.
    """
    composer = Composer(pictures.subset(pictures.held_out), size)
    sets = len(composer.objects) // classes
    if not sets or scenes < sets:
        raise ValueError(f"classes must be at most {len(composer.objects)}, scenes at least {sets}, got {scenes}")
    generator = _generator(seed, EVALUATION)
    order = composer.objects[torch.randperm(len(composer.objects), generator=generator)]
    members = order[: sets * classes].view(sets, classes)
    labels = torch.randint(classes, (sets, scenes // sets), generator=generator)
    wanted = members.gather(1, labels).flatten()
    drawn = composer.draw(len(wanted), generator, {"object": wanted})
    images = to_rgba(composer.render(drawn, generator))
    objects = class_names("object", composer.names, wording)
    tasks = [
        EvalTask(f"object {i + 1}", tuple(objects[j] for j in ids.tolist()), part, label)
        for i, (ids, part, label) in enumerate(zip(members, images.chunk(sets), labels))
    ]
    return tasks + [EvalTask(a, class_names(a, (), wording), images, drawn[a]) for a in VALUES]


def evaluation_tasks(pictures: Pictures, sets: Sequence[str]) -> list[EvalTask]:
    """The held-out part of the built-in sets as tasks: of names, and of scenes' attributes.

    Args:
        pictures: as `create_source` gave them.
        sets: of the data's configuration.
    """
    names = held_out_tasks(pictures) if set(sets) != {SCENES} else []
    side = pictures.images.shape[-1]
    return names + (scene_tasks(pictures, scenes=480, size=side) if SCENES in sets else [])
