"""Which data a run trains on."""

from dataclasses import dataclass, field
from typing import Any

from hyperclip_fast.utils.typed_config import check_choice, check_types

KINDS = ("pictures", "folder", "table", "shards")
SCENES = "scenes"  # the set that is composed of OpenMoji's pictures
SETS = ("openmoji", "digits", SCENES)
TRANSFORMS = ("timm", "open_clip", "plain")


@dataclass
class DataConfig:
    """What a model is trained on.

    Args:
        kind: "pictures": the built-in sets; "folder": a folder of image files for each class; "table": a CSV or TSV
            file of image paths and texts; "shards": webdataset tar files, streamed.
        sets: which pictures, of "openmoji", "digits" and "scenes": half of a batch's tasks then ask for attributes of
            scenes composed of OpenMoji's pictures, with up to 6 classes; all of them, where this set is alone.
        wordings: of OpenMoji's and the digits' names, such as "a drawing of {}"; every task draws one of them.
        group_weights: by group of names, such as "digits": how many times as often tasks are drawn from it.
        path: the folder, the table, or the shards, such as "shards/{0000..0127}.tar" (several: joined by "::").
        tasks: what the texts of a folder or table are: "labels", of which each task draws a set, with one image each;
            or "captions", of which a task is the group that comes next. Shards hold captions.
        image_column: of the table; paths are relative to its folder.
        text_column: of the table.
        image_key: suffixes of the shards' images.
        text_key: suffix of the shards' texts; "json:<field>" is a field of a JSON file.
        class_names: YAML or JSON file that maps the folders' names, or the table's texts, to class names.
        transform: "timm": timm.data.create_transform; "open_clip": open_clip.image_transform; "plain": the centre
            square, as in use.
        crop: smallest share of an image's area that a random crop keeps.
        flip: share of images that timm's transform mirrors.
        color_jitter: strength of timm's colour jitter.
        auto_augment: timm's policy, such as "rand-m9-mstd0.5".
        workers: processes that load images, in each training process; 0: none.
        shuffle: samples of a stream that are read and shuffled together.
    """

    kind: str = "pictures"
    sets: tuple[str, ...] = ("openmoji", "digits")
    group_weights: dict[str, Any] = field(default_factory=dict)
    wordings: tuple[str, ...] = ("{}",)
    path: str = ""
    tasks: str = "labels"
    image_column: str = "filepath"
    text_column: str = "title"
    image_key: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    text_key: str = "txt"
    class_names: str = ""
    transform: str = "timm"
    crop: float = 0.4
    flip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str = ""
    workers: int = 0
    shuffle: int = 1000

    def __post_init__(self):
        check_types(self)
        check_choice(self, kind=KINDS, tasks=("labels", "captions"), transform=TRANSFORMS)
        if not self.sets or len(set(self.sets)) < len(self.sets) or not set(self.sets) <= set(SETS):
            raise ValueError(f"sets must be distinct names from {SETS}, got {self.sets}")
        if not self.wordings or not all(wording.count("{}") == 1 for wording in self.wordings):
            raise ValueError(f'wordings must be texts with one "{{}}" each, got {self.wordings}')
        if not all(isinstance(weight, (int, float)) and weight >= 0 for weight in self.group_weights.values()):
            raise ValueError(f"group_weights must be numbers of at least 0 by group, got {self.group_weights}")
        if SCENES in self.sets and len(self.sets) > 1 and "openmoji" not in self.sets:
            raise ValueError(f"sets must hold openmoji, of which scenes are composed, beside others, got {self.sets}")
        if not 0 < self.crop <= 1 or not 0 <= self.flip <= 1:
            raise ValueError(f"crop and flip must lie in (0, 1] and [0, 1], got {self.crop} and {self.flip}")
        if self.workers < 0 or self.shuffle < 1:
            raise ValueError(f"workers must be at least 0, shuffle at least 1, got {self.workers} and {self.shuffle}")
