"""Training: one model, one data set, one run folder."""

from hyperclip_fast.training.config import RunConfig, TrainConfig, load_config
from hyperclip_fast.training.trainer import Trainer

__all__ = ["RunConfig", "TrainConfig", "Trainer", "load_config"]
