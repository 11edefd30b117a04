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

from hyperclip_fast.data.openmoji import load_openmoji
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
