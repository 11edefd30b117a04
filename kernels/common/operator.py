"""What the operators share: which calls go straight to the launches, and how tensors cross an operator's border."""

import torch


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with dense strides; None stays None."""
    return None if tensor is None else tensor.contiguous()


def dense_columns(table: torch.Tensor) -> torch.Tensor:
    """A table (T, D) whose rows may be strided, but not their columns."""
    return table if table.stride(1) == 1 else table.contiguous()


def filled(tensors, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An operator returns tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def is_plain(x: torch.Tensor) -> bool:
    """Whether a call with this tensor goes straight to the launches: nothing traces it, and it is no subclass."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
