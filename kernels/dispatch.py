"""Which implementation an operation runs: Triton on a GPU, plain PyTorch elsewhere, unless the user says otherwise.

The decision is Python on `x.device`, taken on every call: the one form that also works under torch.compile,
torch.export, ONNX and AOTInductor on machines without a GPU.
"""

import importlib.util

import torch

from .common.private_api import is_functorch_active
from .tables import is_chosen

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
            all; "triton": Triton for all, so that Triton's interpreter is reached with CPU tensors.

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
    """Whether an operation on `x` runs its Triton kernel.

    Under "auto" what torch.export, torch.jit, torch.func and, for inference, torch.compile see is the plain formula:
    Inductor fuses it with what surrounds it, where a kernel of ours is a wall. On an H100 a compiled ViT-S of 64 images
    ran at 0.59 of the stock model's speed with our operators, and at 1.00 with the formula (bench/results).
    """
    if _backend != "auto":
        return _backend == "triton"
    if isinstance(x, torch.fx.Proxy) or not (x.is_cuda and _has_triton and x.dtype in TRITON_DTYPES):
        return False
    if is_functorch_active() or torch.jit.is_tracing():
        return False
    return not torch.compiler.is_compiling() or (torch.is_grad_enabled() and not torch.compiler.is_exporting())


def prefers_triton(operation: str, x: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> bool:
    """Whether Triton computes an operation: because it was asked for, or because the table expects it to be faster.

    Args:
        operation: a key of tables.WIDEST.
        x: (B, N, K), the operation's input.
        width: D, the narrower side of the product.
        dtype: what the product computes in, x's by default.
    """
    return use_triton(x) and is_preferred(operation, x, width, dtype)


def is_preferred(operation: str, x: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> bool:
    """The rest of `prefers_triton`'s question, for a caller that knows what `use_triton` says of x."""
    return get_backend() == "triton" or is_chosen(operation, x, width, dtype)


def is_traced() -> bool:
    """Whether torch.compile, torch.export, torch.jit or a transform of torch.func (grad, vmap, jvp) sees what runs now.

    Then the plain formula runs, which all of them can differentiate, batch and fuse.
    """
    return torch.compiler.is_compiling() or is_functorch_active() or torch.jit.is_tracing()
