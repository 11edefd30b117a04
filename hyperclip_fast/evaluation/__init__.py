"""Evaluation: what the right class names are worth, zero-shot accuracy, robustness, patches."""

from typing import TYPE_CHECKING

from hyperclip_fast.utils.lazy import lazy_names

if TYPE_CHECKING:
    from hyperclip_fast.data.held_out import EvalTask, group_of, held_out_tasks
    from hyperclip_fast.evaluation.swapping import (
        ROW_SOURCES,
        accuracy,
        class_scores,
        mean_accuracy,
        partition_table,
        predict,
        swap_test,
    )

__all__ = [
    "ROW_SOURCES",
    "EvalTask",
    "accuracy",
    "class_scores",
    "group_of",
    "held_out_tasks",
    "mean_accuracy",
    "partition_table",
    "predict",
    "swap_test",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".data.held_out": ("EvalTask", "group_of", "held_out_tasks"),
        "swapping": (
            "ROW_SOURCES",
            "accuracy",
            "class_scores",
            "mean_accuracy",
            "partition_table",
            "predict",
            "swap_test",
        ),
    },
)
