"""Pictures with names, and the mixed batches made of them."""

from typing import TYPE_CHECKING

from hyperclip_fast.utils.lazy import lazy_names

if TYPE_CHECKING:
    from hyperclip_fast.data.augmentation import augment, resize, to_rgb
    from hyperclip_fast.data.pictures import DIGITS, Pictures, family_of, load_pictures
    from hyperclip_fast.data.task_sampler import TaskBatch, TaskSampler

__all__ = [
    "DIGITS",
    "Pictures",
    "TaskBatch",
    "TaskSampler",
    "augment",
    "family_of",
    "load_pictures",
    "resize",
    "to_rgb",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "augmentation": (
            "augment",
            "resize",
            "to_rgb",
        ),
        "pictures": (
            "DIGITS",
            "Pictures",
            "family_of",
            "load_pictures",
        ),
        "task_sampler": (
            "TaskBatch",
            "TaskSampler",
        ),
    },
)
