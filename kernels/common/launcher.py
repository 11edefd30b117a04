"""Launching a compiled kernel for what a launch costs.

On every call Triton's own path binds the arguments, computes what it specialises on and looks the kernel up: 12 us,
where the launch itself takes 1. `launch` keeps what Triton compiled for a kind of call, and from then on calls it
directly. A kind of call is all that Triton specialises on: device, options, constants, each tensor's dtype and 16-byte
alignment, on AMD whether its storage is below 2 GiB, and whether an integer is 1, a multiple of 16, or longer than 31
bits. A float is always a float.

Triton's own path runs where the kernel is not compiled (its interpreter) and where somebody listens to launches. With
another driver (a simulator) all begins anew. What this file knows of a compiled kernel (`run` and what it takes) has
been the same from Triton 3.4 to 3.8, for NVIDIA and AMD, but is not documented.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from triton import knobs
from triton.runtime import JITFunction, driver

IS_AMD = torch.version.hip is not None
_kept: dict[tuple, Any] = {}  # kind of call: the compiled kernel
_kept_for: Any = None  # the driver that compiled them
_plans: dict[Any, tuple[Callable, tuple[bool, ...]]] = {}  # kernel's function: what `_plan_of` says


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Launch a Triton kernel on the device of its first parameter, a tensor.

    Args:
        kernel: what triton.jit returned.
        grid: programs along one to three axes.
        arguments: the kernel's, all by name, and the options num_warps and, where it is not Triton's own, num_stages.
    """
    if type(kernel) is not JITFunction or _is_heard(kernel):
        kernel[grid](**arguments)
        return
    function, active = kernel.fn, driver.active
    plan = _plans.get(function) or _plan_of(kernel)
    values = plan[0](arguments)
    current, device = active.get_current_device(), values[0].get_device()
    if device not in (current, -1):  # -1: a CPU's, where a simulator runs the kernel
        with torch.cuda.device(device):
            launch(kernel, grid, **arguments)
        return
    if active is not _kept_for:
        _forget(active)
    kind = [function, current, arguments["num_warps"], arguments.get("num_stages")]
    for value, is_constant in zip(values, plan[1]):
        if is_constant or value is None:
            kind.append(value)
        elif type(value) is int:
            kind.append("1" if value == 1 else 2 * (value >> 31) + (value & 15 == 0))
        elif not isinstance(value, float):
            kind.append((value.dtype,) if value.data_ptr() & 15 else value.dtype)
            if IS_AMD:
                kind.append(value.untyped_storage().nbytes() >> 31 == 0)
    compiled = _kept.get(key := tuple(kind))
    if compiled is None:
        _kept[key] = kernel[grid](**arguments)
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(current)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def _is_heard(kernel: Any) -> bool:
    """Whether a profiler or a hook listens; if Triton's knobs take another form, it says yes, and launches are slow."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        kernel.pre_run_hooks
        or (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


def _plan_of(kernel: Any) -> tuple[Callable, tuple[bool, ...]]:
    """What puts arguments in the kernel's order, and which of these are constants."""
    get = operator.itemgetter(*(parameter.name for parameter in kernel.params))
    return _plans.setdefault(kernel.fn, (get, tuple(parameter.is_constexpr for parameter in kernel.params)))


def _forget(active: Any) -> None:
    global _kept_for
    _kept.clear()
    _kept_for = active
