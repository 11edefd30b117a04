"""A Triton driver whose launches do nothing: what is left is the host's time, and it needs no GPU.

Kernels are compiled for sm_90 as ever; tensors lie on the CPU, and results are whatever lay in their memory.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

_launched: list[tuple[str, Any, tuple]] = []


class _Launcher:
    """What Triton calls in the place of a compiled launcher."""

    def __init__(self, source: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *arguments: Any) -> None:
        _, metadata, enter, leave, *values = arguments
        _launched.append((self.name, function, tuple(values)))
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)


class _Utils:
    def load_binary(self, *_: Any) -> tuple:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class IdleDriver(DriverBase):
    """Compiles for an H100 and runs nothing."""

    def __init__(self):
        self.utils, self.launcher_cls = _Utils(), _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


@contextlib.contextmanager
def idle_launches() -> Iterator[list[tuple[str, Any, tuple]]]:
    """Launches do nothing; yields a list that grows: name, compiled function and arguments of each."""
    before = driver._active
    driver.set_active(IdleDriver())
    _launched.clear()
    try:
        yield _launched
    finally:
        driver._active = before
