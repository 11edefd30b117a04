"""Pictures with names, in groups, and the mixed batches made of them.

OpenMoji gives about 1,900 names in eleven groups, each as a colour picture and, where that still tells it apart, as a
line drawing; scikit-learn gives handwritten digits. A task is K names of one group; a mixed batch is G tasks with one
picture of each class. Pictures stay RGBA until the last moment, so that training can vary what is behind them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast.openmoji import load_openmoji
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.seeds import stable_hash

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

FIXED_GROUPS = frozenset({"digits", "flags", "symbols"})  # mirrored, these are something else, or wrong
SIDES = re.compile(r"\b(left|right|leftwards|rightwards|moon)\b")  # a waxing moon in the mirror wanes
# Words that tell apart variants of one thing: what remains is its family, which lies on one side of the split.
VARIANTS = re.compile(
    r"\b(man|men|woman|women|person|people|boy|girl|child|adult|old|older|mr|mrs|mx|santa|king|queen|prince|princess"
    r"|merman|mermaid|merperson|red|orange|yellow|green|light|dark|blue|purple|brown|black|white|grey|pink|small|medium"
    r"|large|left|right|up|down|upwards|downwards|leftwards|rightwards|facing|in|with|and|of|the|\d+(st|nd|rd)?)\b"
    r"|[^a-z ]"
)
CLOCK = re.compile(r"-thirty$| o'clock$")
SPLIT_SALT = "split 1220"  # the salt of 3,000 that gives every group a held-out share nearest to 15 %


@dataclass(frozen=True)
class Pictures:
    """M pictures, each with a name; each name with a group.

    Args:
        images: (M, 4, S, S) uint8 RGBA, not premultiplied.
        labels: (M,) int64, index into names.
        names: unique lower-case English names, such as "red apple".
        groups: the group of each name, such as "food".
        held_out: (M,) bool, pictures for evaluation. OpenMoji is split by name (whole families of variants, such as
            "man running" and "woman running", are on one side), digits by picture.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    groups: tuple[str, ...]
    held_out: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def can_flip(self) -> Tensor:
        """(len(names),) bool: names whose mirrored picture still shows them."""
        return torch.tensor(
            [group not in FIXED_GROUPS and not SIDES.search(name) for name, group in zip(self.names, self.groups)]
        )

    def subset(self, mask: Tensor) -> "Pictures":
        """Fewer pictures, the same names.

        Args:
            mask: (M,) bool, the pictures to keep.
        """
        if mask.shape != (len(self),) or mask.dtype != torch.bool:
            raise ValueError(f"mask must be ({len(self)},) bool, got {tuple(mask.shape)} {mask.dtype}")
        return Pictures(self.images[mask], self.labels[mask], self.names, self.groups, self.held_out[mask])


def load_pictures(
    sets: Sequence[str] = ("openmoji", "digits"),
    size: int = 64,
    held_out: float = 0.15,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Pictures:
    """Load sets of named pictures; OpenMoji is rendered at first use (about half a minute) and cached as one file.

    Args:
        sets: some of "openmoji" and "digits".
        size: S in pixels.
        held_out: about the share to hold out, in every group; a larger share contains a smaller one.
        cache_dir: folder of the cache; None: `hyperclip_fast` in the user's cache folder.
        progress: show a bar while rendering.

    Raises:
        ValueError: for an unknown set, or a size or share out of range.
        ImportError: where a package of the extra `train` is missing.
    """
    if isinstance(sets, str) or not sets or not set(sets) <= {"openmoji", "digits"} or len(set(sets)) != len(sets):
        raise ValueError(f"sets must be a list of distinct names from 'openmoji' and 'digits', got {sets!r}")
    if not 8 <= size <= 512:
        raise ValueError(f"size must lie in [8, 512], got {size}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
    parts = [
        _load_openmoji(size, held_out, cache_dir, progress) if name == "openmoji" else _load_digits(size, held_out)
        for name in sets
    ]
    return _join(parts)


def _join(parts: Sequence[Pictures]) -> Pictures:
    """One Pictures of several, whose names differ."""
    starts = [sum(len(part.names) for part in parts[:i]) for i in range(len(parts))]
    return Pictures(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels + start for part, start in zip(parts, starts)]),
        names=sum((part.names for part in parts), ()),
        groups=sum((part.groups for part in parts), ()),
        held_out=torch.cat([part.held_out for part in parts]),
    )


def _is_held_out(key: str, share: float) -> bool:
    """Whether the family or picture `key` is held out: by its own name only, whatever else there is."""
    return stable_hash(f"{SPLIT_SALT}:{key}") < share * 2**64


def family_of(name: str) -> str:
    """What a name shares with its trivial variants: without gender, colour, size and direction.

    >>> family_of("woman running facing right") == family_of("man running")
    True
    """
    if name.startswith("keycap") or CLOCK.search(name):
        return "keycap" if name.startswith("keycap") else "clock"
    return " ".join(VARIANTS.sub(" ", name).split()) or "person"


def _load_digits(size: int, held_out: float) -> Pictures:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, as black ink on nothing."""
    digits = require("sklearn.datasets", "train").load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    inner = max(8, round(0.85 * size))
    ink = F.interpolate(ink, size=(inner, inner), mode="bicubic", align_corners=False)
    before = (size - inner) // 2
    images = torch.zeros(len(ink), 4, size, size, dtype=torch.uint8)
    images[:, 3:, before : before + inner, before : before + inner] = ink.round().clamp(0, 255).byte()
    split = torch.tensor([_is_held_out(f"digits {i}", held_out) for i in range(len(ink))])
    names = tuple(f"the digit {word}" for word in DIGITS)
    return Pictures(images, torch.from_numpy(digits.target).long(), names, ("digits",) * 10, split)


def _load_openmoji(size: int, held_out: float, cache_dir: str | Path | None, progress: bool) -> Pictures:
    images, labels, names, groups = load_openmoji(size, cache_dir, progress)
    split = torch.tensor([_is_held_out(family_of(name), held_out) for name in names])
    return Pictures(images, labels, names, groups, split[labels])


@dataclass(frozen=True)
class TaskBatch:
    """A mixed batch of G tasks with K classes: image g * K + k shows class k of task g.

    Args:
        images: (G * K, 4, S, S) uint8 RGBA.
        task_ids: (G * K,) int64, each of 0 ... G - 1 K times.
        class_ids: (G, K) int64, index into the pictures' names.
        can_flip: (G * K,) bool, images that may be mirrored.
    """

    images: Tensor
    task_ids: Tensor
    class_ids: Tensor
    can_flip: Tensor


class TaskSampler:
    """An endless stream of mixed batches; batch(step) depends on the seed and the step only.

    Groups are drawn in proportion to the square root of their number of names. A group with fewer than K names gives
    all of them, and the task is filled up from the other groups.

    Args:
        pictures: what to draw from; names without a picture are never drawn.
        tasks_per_batch: G.
        classes_per_task: K.
        seed: of the stream.
        mixed_groups: probability of a task whose names come from all groups.

    Raises:
        ValueError: for fewer than K names, or an argument out of range.
    """

    def __init__(
        self,
        pictures: Pictures,
        tasks_per_batch: int = 8,
        classes_per_task: int = 16,
        seed: int = 0,
        mixed_groups: float = 0.25,
    ):
        self.counts = torch.bincount(pictures.labels, minlength=len(pictures.names))
        self.present = self.counts.nonzero().flatten()
        if tasks_per_batch < 1:
            raise ValueError(f"tasks_per_batch must be positive, got {tasks_per_batch}")
        if not 1 <= classes_per_task <= len(self.present):
            raise ValueError(f"classes_per_task must lie in [1, {len(self.present)}], got {classes_per_task}")
        if not 0 <= mixed_groups <= 1:
            raise ValueError(f"mixed_groups must lie in [0, 1], got {mixed_groups}")
        self.pictures, self.seed, self.mixed_groups = pictures, seed, mixed_groups
        self.tasks_per_batch, self.classes_per_task = tasks_per_batch, classes_per_task
        self.by_label = pictures.labels.argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts
        present = [pictures.groups[i] for i in self.present]
        self.groups = [
            self.present[torch.tensor([group == wanted for group in present])] for wanted in sorted(set(present))
        ]
        self.weights = torch.tensor([float(len(group)) for group in self.groups]).sqrt()

    def batch(self, step: int) -> TaskBatch:
        """The mixed batch of this step."""
        generator = torch.Generator().manual_seed(stable_hash(f"{self.seed}:{step}") >> 1)
        class_ids = torch.stack([self._draw_task(generator) for _ in range(self.tasks_per_batch)])
        classes = class_ids.flatten()
        which = (torch.rand(len(classes), generator=generator, dtype=torch.float64) * self.counts[classes]).long()
        images = self.pictures.images[self.by_label[self.starts[classes] + which]]
        task_ids = torch.arange(self.tasks_per_batch).repeat_interleave(self.classes_per_task)
        return TaskBatch(images, task_ids, class_ids, self.pictures.can_flip[classes])

    def _draw_task(self, generator: torch.Generator) -> Tensor:
        """K distinct names (K,)."""
        if torch.rand((), generator=generator) < self.mixed_groups:
            names = self.present
        else:
            names = self.groups[torch.multinomial(self.weights, 1, generator=generator)]
        drawn = _shuffled(names, generator)[: self.classes_per_task]
        if missing := self.classes_per_task - len(drawn):
            others = self.present[~torch.isin(self.present, drawn)]
            drawn = _shuffled(torch.cat([drawn, _shuffled(others, generator)[:missing]]), generator)
        return drawn


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]


def to_rgb(images: Tensor, background: int = 255) -> Tensor:
    """Pictures (B, 4, S, S) uint8 RGBA on a grey level of 0 ... 255 to (B, 3, S, S) float32 in [-1, 1]."""
    rgba = _unit_rgba(images)
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + (background / 255) * (1 - alpha)) * 2 - 1


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, S, S) to side `size`, antialiased; as they are where that is S."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def _unit_rgba(images: Tensor) -> Tensor:
    """RGBA in [0, 1] (B, 4, S, S) float32."""
    if images.dim() != 4 or images.shape[1] != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (B, 4, S, S) uint8, got {tuple(images.shape)} {images.dtype}")
    return images.float() / 255


def augment(images: Tensor, generator: torch.Generator, flip: Tensor | None = None) -> Tensor:
    """Training's view of pictures: moved, turned, scaled, mirrored, on light coloured grounds, colours jittered.

    Args:
        images: (B, 4, S, S) uint8 RGBA.
        generator: where all chance comes from.
        flip: (B,) bool, pictures of which half are mirrored; None: all.

    Returns:
        (B, 3, S, S) float32 in [-1, 1], on the images' device.
    """
    rgba = _unit_rgba(images)
    alpha = rgba[:, 3:]
    premultiplied = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)
    grid = _grid(_random_affine(len(images), generator, flip).to(images.device), images.shape[-2:])
    warped = F.grid_sample(premultiplied, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    tint = _uniform((len(images), 1, 1, 1), 0, 0.6, generator) * _uniform((len(images), 3, 1, 1), 0, 1, generator)
    rgb = torch.addcmul(warped[:, :3], 1 - tint.to(images.device), 1 - warped[:, 3:])
    return _jitter_colours(rgb, generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _random_affine(count: int, generator: torch.Generator, flip: Tensor | None) -> Tensor:
    """Maps (B, 2, 3) from output to input positions: scale 0.75 ... 1.1, 15 degrees, shift of an eighth."""
    angle = _uniform((count,), -0.26, 0.26, generator)
    scale = _uniform((count,), 0.75, 1.1, generator)
    stretch = _uniform((count,), 0.92, 1.08, generator)
    shift = _uniform((count, 2), -0.125, 0.125, generator)
    mirror = _uniform((count,), 0, 1, generator) < 0.5
    if flip is not None:
        mirror = mirror & flip.to(mirror.device)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    side = torch.where(mirror, -stretch, stretch)
    rows = [torch.stack([cos * side, -sin, shift[:, 0]], 1), torch.stack([sin * side, cos, shift[:, 1]], 1)]
    return torch.stack(rows, 1)


def _grid(theta: Tensor, size: Sequence[int]) -> Tensor:
    """F.affine_grid (B, H, W, 2) for maps (B, 2, 3); as a sum of two small tensors, four times as fast."""
    y, x = ((torch.arange(n, device=theta.device) * 2 + 1) / n - 1 for n in size)
    across, down, shift = theta[:, None, None].unbind(-1)
    return x[:, None] * across + (y[:, None, None] * down + shift)


def _jitter_colours(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """Saturation, contrast and brightness of (B, 3, S, S) in [0, 1] varied; the result is in [-1, 1]."""
    shape = (len(rgb), 1, 1, 1)
    saturation = _uniform(shape, 0.7, 1.3, generator).to(rgb.device)
    contrast = _uniform(shape, 0.8, 1.2, generator).to(rgb.device)
    brightness = _uniform(shape, -0.1, 0.1, generator).to(rgb.device)
    grey = rgb.mean(dim=1, keepdim=True)
    rgb = torch.lerp(grey, rgb, saturation)
    return rgb.sub_(0.5).mul_(2 * contrast).add_(2 * brightness).clamp_(-1, 1)
