"""What the tests share: comparing with a reference, and running kernels where this machine can."""

import contextlib
import multiprocessing
import os
import types
from unittest import mock

import torch
from torch.multiprocessing import start_processes

# Bounds on rms(ours - reference) / rms(reference), the reference in float64, by the dtype that the result is stored in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def _mode() -> str:
    for name in ("HYPERCLIP_PTXSIM", "HYPERCLIP_GUARD"):
        if os.environ.get(name, "0") != "0":
            return "guard" if name == "HYPERCLIP_GUARD" else f"ptxsim {os.environ[name]}"
    return "gpu" if torch.cuda.is_available() else "interpreter"


MODE = _mode()
DEVICE = "cuda" if MODE == "gpu" else "cpu"
# Triton's interpreter computes wrongly in bfloat16 (3.4 to 3.8): the guard repairs it, the simulator needs no repair.
KERNEL_DTYPES = (torch.float32, torch.float16) + (() if MODE == "interpreter" else (torch.bfloat16,))


def set_mode_environment() -> None:
    """Switch Triton's interpreter on or off; must come before triton is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    if MODE in ("interpreter", "guard"):
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes that import torch, too


def examples(**by_mode: int) -> int:
    """How many examples of hypothesis kernels afford in this MODE, or in an `other`; fewer in the profile `quick`."""
    most = by_mode.get(MODE, by_mode["other"])
    return min(most, 8) if os.environ.get("HYPERCLIP_HYPOTHESIS") == "quick" else most


def run_twice(worker, folder) -> None:
    """Run `worker(rank, folder)` in two processes, forked from one that has imported the worker's module."""
    multiprocessing.set_forkserver_preload([worker.__module__])
    start_processes(worker, (folder,), nprocs=2, start_method="forkserver")


def rms(tensor: torch.Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def assert_close(
    ours: torch.Tensor, reference: torch.Tensor, name: str = "", scale: float = 0.0, slack: float = 1.0
) -> None:
    """`ours` is within its dtype's rounding of `reference`.

    Args:
        ours: the result.
        reference: what it should be, float64.
        name: what to call it in a failure.
        scale: RMS of the terms whose difference the reference is, where they may cancel.
        slack: how many tolerances are allowed.
    """
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(reference.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error = rms(ours.double() - reference.double())
    bound = slack * TOLERANCE[ours.dtype] * max(rms(reference), scale)
    assert error <= bound, f"{name}: rms error {error:.3g}, allowed {bound:.3g}, rms of reference {rms(reference):.3g}"


def poisoned_empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """torch.empty whose memory is NaN, so that a value nobody wrote is seen."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def allocating(empty):
    """The kernels' launches allocate with `empty` in place of torch.empty."""

    def empty_like(tensor, dtype=None):
        return empty(*tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def zeros(*shape, **options):
        return empty(*shape, **options).zero_()

    shim = types.SimpleNamespace(**{**vars(torch), "empty": empty, "empty_like": empty_like, "zeros": zeros})
    stack = contextlib.ExitStack()
    for operation in ("layer_norm", "linear", "norm_linear", "batch_norm", "common"):
        stack.enter_context(mock.patch(f"hyperclip_fast.kernels.{operation}.launch.torch", shim))
    return stack


@contextlib.contextmanager
def kernel_run(seed: int = 0):
    """Kernels launched inside run as MODE says, with poisoned allocations; under the guard, any violation fails."""
    empty = poisoned_empty
    with contextlib.ExitStack() as stack:
        guard = None
        if MODE == "guard":
            import interp_guard

            empty = interp_guard.poisoned_empty
            guard = stack.enter_context(interp_guard.guard(order="shuffle", seed=seed, poison_masked=True))
        if MODE.startswith("ptxsim"):
            from ptxsim import simulate

            stack.enter_context(simulate(MODE.split()[1], order=seed))
        stack.enter_context(allocating(empty))
        yield
    if guard is not None:
        guard.assert_clean()
