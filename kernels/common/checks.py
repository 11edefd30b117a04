"""Checks of arguments that several operations share: shapes here, and what only the Triton kernels refuse."""

import torch

from ..dispatch import TRITON_DTYPES
from .rows import Rows


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor has this shape, or is None."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_rows(rows: Rows, batch: int, width: int, letter: str = "D", prefix: str = "") -> None:
    """Raise ValueError unless weight and bias are tables of rows, and task_ids say which row each sample uses.

    Args:
        rows: weight (T, D); bias (T, D), weight's dtype; task_ids (B,) int64 or int32, or None where T is 1 or B.
        batch: B.
        width: D.
        letter: what the operation calls D.
        prefix: of the tables' names.
    """
    weight, bias, task_ids = rows
    shape = weight.shape  # once: each look costs 0.1 us
    if len(shape) != 2 or shape[1] != width:
        raise ValueError(f"{prefix}weight must be (T, {letter}) with {letter} = {width}, got shape {tuple(shape)}")
    if bias.shape != shape or bias.dtype != weight.dtype:
        raise ValueError(
            f"{prefix}bias must have {prefix}weight's shape and dtype {tuple(shape)}, {weight.dtype}, "
            f"got {tuple(bias.shape)}, {bias.dtype}"
        )
    if task_ids is None:
        if shape[0] not in (1, batch):
            raise ValueError(f"task_ids must be given unless T is 1 or B: T = {shape[0]}, B = {batch}")
    elif task_ids.dim() != 1 or task_ids.shape[0] != batch:
        raise ValueError(f"task_ids must be (B,) with B = {batch}, got shape {tuple(task_ids.shape)}")
    elif task_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"task_ids must be int64 or int32, got {task_ids.dtype}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype that no kernel takes."""
    if dtype not in TRITON_DTYPES:
        raise ValueError(f"{name} must be one of {TRITON_DTYPES} for the Triton kernel, got {dtype}")


def check_row_dtype(weight: torch.Tensor, x: torch.Tensor, prefix: str = "") -> None:
    """Raise ValueError unless rows have x's dtype or float32; `prefix`: of the rows' names."""
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"{prefix}weight must be torch.float32 or x's {x.dtype}, got {weight.dtype}")


def check_devices(x: torch.Tensor, prefix: str = "", /, **others: torch.Tensor | None) -> None:
    """Raise ValueError for a tensor that is not where x is; `prefix`: of the others' names."""
    index = x.get_device()  # -1 for a CPU; half as long as a look at `device`
    for name, tensor in others.items():
        if tensor is not None and (tensor.get_device() != index or (index < 0 and tensor.device != x.device)):
            raise ValueError(f"{prefix}{name} must be on x's device {x.device}, got {tensor.device}")
