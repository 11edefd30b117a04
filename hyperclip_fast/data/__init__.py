"""Pictures with names, and the mixed batches made of them."""

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
