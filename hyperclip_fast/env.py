"""What runs on what, and why: `python -m hyperclip_fast.env`.

Asks the same questions that the operations ask before each call, for the widths of ViT-Ti, S, B and L on every device.
"""

import importlib.metadata
import os
import platform

import torch

from hyperclip_fast.kernels.dispatch import get_backend, has_triton, prefers_triton, use_triton
from hyperclip_fast.kernels.tables import WIDEST, device_kind
from hyperclip_fast.utils.private_api import chosen_attention
from hyperclip_fast.version import __version__

WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERATIONS = ("layer_norm", "add_layer_norm", "batch_norm_act", *WIDEST, "attention")
TOKENS, HEAD_WIDTH = 197, 64


def implementation(operation: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Who computes an operation: "triton", "pytorch", or the kernel that scaled_dot_product_attention takes.

    Args:
        operation: one of OPERATIONS.
        device: where the tensors are.
        dtype: of the operation's input.
        width: D of the encoder.
    """
    if operation == "attention":
        packed = torch.empty(1, TOKENS, 3, width // HEAD_WIDTH, HEAD_WIDTH, device=device, dtype=dtype)
        q, k, v = (heads.transpose(1, 2) for heads in packed.unbind(2))
        return chosen_attention(q, k, v)
    x = torch.empty(0, device=device, dtype=dtype)
    chosen = prefers_triton(operation, x, width) if operation in WIDEST else use_triton(x)
    return "triton" if chosen else "pytorch"


def reason(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `implementation` says so, whatever the width."""
    if operation == "attention":
        return "scaled_dot_product_attention's choice"
    if get_backend() != "auto":
        return f'set_backend("{get_backend()}")'
    if not use_triton(torch.empty(0, device=device, dtype=dtype)):
        return "triton is not installed" if device.type == "cuda" and not has_triton() else "not a GPU"
    if operation not in WIDEST:
        return "a GPU"
    if dtype == torch.float32:
        return "float32 products are left to the BLAS"
    kind = device_kind(device.type, device.index)
    limit = WIDEST[operation][kind]
    return f'the table, "{kind}": up to D = {limit}' if limit else f'the table, "{kind}": never'


def rows(device: torch.device) -> list[tuple[str, ...]]:
    """The table's lines: operation, the dtypes that share one fate, the implementation for each width, the reason."""
    found = []
    for operation in OPERATIONS:
        fates: dict[tuple[str, ...], list[str]] = {}
        for name, dtype in DTYPES.items():
            fate = [implementation(operation, device, dtype, width) for width in WIDTHS.values()]
            fates.setdefault((*fate, reason(operation, device, dtype)), []).append(name)
        found += [(operation, " ".join(names), *fate) for fate, names in fates.items()]
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _heading(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu: {platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    kind = device_kind(device.type, device.index)
    return f'{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "{kind}" in the kernels\' tables'


def report() -> str:
    """Versions, the backend in force, and for each device who computes what."""
    versions = [f"{package} {_version(package)}" for package in ("torch", "triton", "timm")]
    toolkit = torch.version.hip or torch.version.cuda
    table = os.environ.get("HYPERCLIP_KERNEL_TABLE", "built in (HYPERCLIP_KERNEL_TABLE is not set)")
    lines = [
        ", ".join(
            [
                f"hyperclip_fast {__version__}",
                *versions,
                f"python {platform.python_version()}",
                f"cuda or rocm {toolkit or 'none'}",
            ]
        ),
        f'backend: "{get_backend()}"',
        f"kernels' tables: {table}",
    ]
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        header = ("operation", "dtypes", *(f"{name} {width}" for name, width in WIDTHS.items()), "why")
        cells = [header, *rows(device)]
        sizes = [max(len(line[i]) for line in cells) for i in range(len(header))]
        lines += ["", _heading(device)]
        lines += ["  ".join(cell.ljust(size) for cell, size in zip(line, sizes)).rstrip() for line in cells]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
