"""How operations become operators, and how tensors cross an operator's border.

An eager call goes straight to its launch: PyTorch's dispatcher would cost more than that. What traces (torch.compile,
export, fake tensors) needs an operator, `hyperclip_fast::<name>`. `register` makes it, and returns a function that
chooses between the two.
"""

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "hyperclip_fast"  # each version of the kernels on the Hugging Face hub has its own in this place


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with dense strides; None stays None."""
    return None if tensor is None else tensor.contiguous()


def is_plain(x: torch.Tensor) -> bool:
    """Whether a call with this tensor goes straight to the launches: nothing traces it, and it is no subclass."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def register(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Make an operator that has no gradient.

    Args:
        name: its name in NAMESPACE.
        schema: its arguments, the first one a tensor, and its results, tensors.
        run: computes a tensor or a tuple of tensors; where it returns None, the operator returns an empty tensor.
        fake: returns what `run` would, uninitialised.

    Returns:
        A function of the same arguments, which is `run` for an eager call and the operator for what traces.
    """
    operator = _define(name, schema, run, fake)

    def call(*arguments: Any) -> Any:
        return run(*arguments) if is_plain(arguments[0]) else operator(*arguments)

    return call


def register_differentiable(
    name: str, schema: str, run: Callable, fake: Callable, setup_context: Callable, gradients: Callable
) -> Callable:
    """Make an operator that has a gradient.

    Args:
        name: as in `register`, like the next three.
        schema: its arguments and results.
        run: computes it.
        fake: returns what `run` would, uninitialised.
        setup_context: called with ctx, inputs and output, keeps there what the gradients need.
        gradients: called with ctx and the outputs' gradients, returns a gradient or None for each input.

    Returns:
        A function whose first argument says whether a gradient is needed; the others are the operator's.
    """
    operator = _define(name, schema, run, fake)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", gradients, setup_context=setup_context)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = run(*inputs)
        setup_context(ctx, inputs, output)  # as a method of the class it would bind arguments by name, 30 us a call
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    eager: Any = type(name, (torch.autograd.Function,), methods)

    def call(needs_grad: bool, *arguments: Any) -> Any:
        if not is_plain(arguments[0]):
            return operator(*arguments)
        return eager.apply(*arguments) if needs_grad else run(*arguments)

    return call


def _define(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "default")(_filled(run))
    torch.library.register_fake(qualified)(_filled(fake))
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _filled(function: Callable) -> Callable:
    """The function with an empty tensor in the place of None, for an operator returns tensors only."""

    def run(first: torch.Tensor, *rest: Any) -> Any:
        results = function(first, *rest)
        if isinstance(results, torch.Tensor):
            return results
        return tuple(first.new_empty(0) if result is None else result for result in results)

    return run
