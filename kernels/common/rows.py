"""Rows of a table of norm weights, of which each sample uses one."""

from typing import Any, NamedTuple

import torch


class Rows(NamedTuple):
    """Tables of rows, and which of them each sample uses."""

    weight: torch.Tensor  # (T, D)
    bias: torch.Tensor  # (T, D)
    task_ids: torch.Tensor | None  # (B,), or None where T is 1 (shared row) or B (row b for sample b)

    def arguments(self) -> dict[str, Any]:
        """What every kernel that applies rows takes of them."""
        weight, bias, task_ids = self
        count = weight.size(0)
        return {
            "weight": weight,
            "bias": bias,
            "task_ids": task_ids,
            "T": count,
            "weight_stride": 0 if count == 1 else weight.stride(0),
            "bias_stride": 0 if count == 1 else bias.stride(0),
        }


def row_stride(table: torch.Tensor) -> int:
    """Elements from one row to the next; 0 for one row that all samples use."""
    return 0 if table.size(0) == 1 else table.stride(0)


def dense_columns(table: torch.Tensor) -> torch.Tensor:
    """A table (T, D) whose rows may be strided, but not their columns."""
    return table if table.stride(1) == 1 else table.contiguous()


def dense_rows(weight: torch.Tensor, bias: torch.Tensor, task_ids: torch.Tensor | None) -> Rows:
    """The rows as kernels read them."""
    ids = None if task_ids is None else task_ids.contiguous()
    return Rows(dense_columns(weight), dense_columns(bias), ids)
