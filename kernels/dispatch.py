"""Which implementation an operation runs: Triton on a GPU, plain PyTorch elsewhere, unless the user says otherwise.

The decision is Python on `x.device`, taken on every call: the one form that also works under torch.compile,
torch.export, ONNX and AOTInductor on machines without a GPU.
"""

import importlib.util

import torch

BACKENDS = ("auto", "reference", "triton")
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_backend = "auto"


def has_triton() -> bool:
    """Whether the triton package is installed (it need not find a GPU)."""
    return importlib.util.find_spec("triton") is not None


_has_triton = has_triton()


def set_backend(backend: str) -> None:
    """Choose the implementation of every operation in `hyperclip_fast.kernels`.

    Args:
        backend: "auto": Triton for CUDA and ROCm tensors, PyTorch for others and for float64; "reference": PyTorch for
            all;
            "triton": Triton for all, so that Triton's interpreter is reached with CPU tensors.

    Raises:
        ValueError: for another word.
        ImportError: for "triton" where it is not installed.
    """
    global _backend
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton" and not _has_triton:
        raise ImportError('set_backend("triton") needs the triton package: pip install triton')
    _backend = backend


def get_backend() -> str:
    """The word last given to `set_backend`, "auto" at first."""
    return _backend


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on `x` runs its Triton kernel."""
    return _backend == "triton" or (_backend == "auto" and x.is_cuda and _has_triton and x.dtype in TRITON_DTYPES)


def is_traced() -> bool:
    """Whether torch.compile, torch.export or a transform of torch.func (grad, vmap, jvp) sees what runs now.

    Then the plain formula runs, which all of them can differentiate, batch and fuse. PyTorch has no public question
    for its transforms: `torch._C._are_functorch_transforms_active` is what torch.autograd itself asks since 2.0.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
