"""Training: one model, one data set, one run folder."""

from typing import TYPE_CHECKING

from hyperclip_fast.utils.lazy import lazy_names

if TYPE_CHECKING:
    from hyperclip_fast.training.config import RunConfig, TrainConfig, load_config
    from hyperclip_fast.training.trainer import Trainer

__all__ = ["RunConfig", "TrainConfig", "Trainer", "load_config"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": (
            "RunConfig",
            "TrainConfig",
            "load_config",
        ),
        "trainer": ("Trainer",),
    },
)
