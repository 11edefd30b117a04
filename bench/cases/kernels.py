"""Cases of `hyperclip bench kernels`: each operation's providers on one shape, forward alone or with backward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.bench.cases.engines import captured
from hyperclip_fast.bench.cases.operations import OPERATIONS, Inputs, Operation, Shape
from hyperclip_fast.bench.harness.runner import Case, Provider, Run, relative_error
from hyperclip_fast.utils.private_api import mark_maybe_dynamic
from hyperclip_fast.utils.timing import ColdClock, wall_seconds

TOKENS = 197  # of a 224-pixel image in patches of 16, and the class token
ENGINES = ("eager", "compiled", "graph")


def kernel_cases(
    operations: Sequence[str],
    widths: Sequence[int],
    batches: Sequence[int],
    tasks: Sequence[int],
    mixes: Sequence[str],
    steps: Sequence[str],
    engines: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int = TOKENS,
) -> Iterator[Case]:
    """One case for each operation, width, batch and step, and, where rows belong to samples, for each T and mix."""
    clock = ColdClock(device) if device.type == "cuda" else wall_seconds
    for name in operations:
        operation = OPERATIONS[name]
        for step in steps:
            for width in widths:
                for batch in batches:
                    torch.compiler.reset()  # compiled for this shape, not for whatever came before
                    functions = _functions(operation, engines)
                    for count, mix in _mixtures(operation, tasks, mixes):
                        shape = Shape(batch, tokens, width, count, mix, dtype, device)
                        labels = {"operation": name, "step": step, "width": width, "batch": batch, "tokens": tokens}
                        labels |= {"tasks": count, "mix": mix} if operation.is_modulated else {}
                        yield _case(operation, shape, labels, functions, clock)


def _mixtures(operation: Operation, tasks: Sequence[int], mixes: Sequence[str]) -> list[tuple[int, str]]:
    """T and mix of each case; with one task all mixes are the same."""
    if not operation.is_modulated:
        return [(1, "identical")]
    return [(count, mix) for count in tasks for mix in (mixes if count > 1 else mixes[:1])]


def _functions(operation: Operation, engines: Sequence[str]) -> dict[tuple[str, str], Callable]:
    """Each provider's function on each engine."""
    functions = {}
    for engine in engines:
        for name, function in operation.providers.items():
            if engine != "compiled":
                functions[name, engine] = function
            elif name not in operation.eager_only:
                functions[name, engine] = torch.compile(function, fullgraph=True)
    return functions


def _case(operation: Operation, shape: Shape, labels: dict, functions: dict, clock) -> Case:
    torch.manual_seed(0)
    inputs = operation.inputs(shape)
    training = labels["step"] == "training"
    providers: list[Provider] = []
    pool: list[Any] = []
    for (name, engine), function in functions.items():
        mine = operation.named_inputs(name, inputs)
        moved, flops = operation.work(mine, training)
        run = _step(function, mine, training, shape.dtype)
        providers.append(
            Provider(name, engine, _builder(run, engine, shape.device, pool), {"bytes": moved, "flops": flops})
        )
    exact: dict[Callable, tuple[Tensor, ...]] = {}

    def check(provider: Provider, run: Run) -> float:
        reference = operation.exact(provider.name)
        if reference not in exact:
            named = operation.named_inputs(provider.name, inputs).items()
            mine = {key: value.double() if value.is_floating_point() else value for key, value in named}
            exact[reference] = _step(reference, mine, training, shape.dtype)()
        return max(relative_error(ours, value) for ours, value in zip(run(), exact[reference], strict=True))

    return Case(labels, providers, check, shape.dtype, shape.device, clock)


def _builder(run: Run, engine: str, device: torch.device, pool: list[Any]) -> Callable[[], Run]:
    return lambda: captured(run, device, pool) if engine == "graph" else run


def _step(function: Callable, inputs: Inputs, training: bool, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """Call it on `inputs`: returns its outputs, and in training the gradients of all its inputs as well.

    The gradients that come in are random, rounded to `dtype`, and the same for every provider and its reference.
    """
    inputs = {
        name: value.detach().clone().requires_grad_(training) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    if "task_ids" in inputs and inputs["weight"].shape[0] > 1:
        for name in ("weight", "bias"):
            mark_maybe_dynamic(inputs[name], 0)  # one compilation for every T
    if not training:

        def forward():
            with torch.no_grad():
                return _tuple(function(**inputs))

        return forward
    leaves = [value for value in inputs.values() if value.requires_grad]
    incoming: list[Tensor] = []

    def forward_backward():
        outputs = _tuple(function(**inputs))
        if not incoming:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            options: dict[str, Any] = {"generator": generator, "device": outputs[0].device}
            incoming.extend(torch.randn(out.shape, **options).to(dtype).to(out.dtype) for out in outputs)
        return (*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, incoming))

    return forward_backward


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
