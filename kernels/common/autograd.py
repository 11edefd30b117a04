"""What the operations share of autograd: whether a gradient is wanted, and gradients that have gradients."""

from collections.abc import Callable, Sequence

import torch


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward may come."""
    if not torch.is_grad_enabled():
        return False
    wanted = [t is not None and t.requires_grad for t in tensors]
    return any(wanted)  # a generator takes twice as long


def traced_gradients(
    function: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    grad: torch.Tensor,
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients that have gradients themselves, where an autograd.Function's own backward would have none.

    Args:
        function: the forward, in operations that autograd knows.
        inputs: what it is a function of. The gradient is taken at aliases of them: at the tensors themselves autograd
            would also walk what made them, such as the one split of all layers' rows, and every layer before.
        grad: the gradient of its output.
        needed: for each input, whether its gradient is wanted; more may follow.
    """
    aliases = [tensor.view_as(tensor) for tensor in inputs]
    wanted = [alias for alias, need in zip(aliases, needed) if need]
    grads = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed[: len(inputs)]]
