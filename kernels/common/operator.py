"""What the operators share: whether a call is eager, and the forms of tensors that cross an operator's border."""

import torch


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dense_columns(table: torch.Tensor) -> torch.Tensor:
    return table if table.stride(1) == 1 else table.contiguous()


def filled(tensors, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An operator returns tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def is_eager(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()
