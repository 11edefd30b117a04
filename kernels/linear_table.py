"""Products with epilogues: who computes them, with which tiles, and what is kept for backward. Data, by kind of device.

Roofline arithmetic, not timed: per token, in units of D, with MD = tokens x width x 2 bytes (16 bits).

- `linear_gelu` saves 8 MD, the GELU's own pass. It pays while the Triton product keeps t / (t + pass) of cuBLAS's
  speed, t the time of fc1 alone. At 3.0 TB/s and 600 TFLOP/s (H100) that is 38, 49, 66 and 72 % for D = 192, 384, 768,
  1024; at 1.75 TB/s and 250 TFLOP/s (A100) 40, 57, 73 and 78 %. Without TMA and warp specialisation expect about 70 %
  on sm_90, 85 % on sm_80. In float32 the product is all that counts, and cuBLAS has it.
- `linear_add` saves 1 MD against the add in `add_layer_norm`: break-even 83 to 93 % for fc2, so it is off by default.
- Backward of `linear_gelu`: recomputing the pre-activation reads x again (1 MD) where keeping it writes and reads 4 MD
  each: 7 MD and 4 MD of memory less, against one more product of 8 M D^2 FLOP. Even at D = 350 (H100) or 250 (A100).

A tile of 128 x 256 would read its operands less often, but its epilogue spills on sm_90.
"""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """One configuration of a product: the tile of the output, the step along K, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int  # row tiles that share a column tile's weights in L2
    warps: int
    stages: int


# Kind of device: {bytes of an element: (tiles while fewer than FEW_PROGRAMS large ones exist, K up to 256, larger K)}.
# "small": 99 KiB of shared memory a block (sm_86, sm_89, sm_120); "large": the others of NVIDIA; "amd": 64 KiB.
TILES = {
    "large": {
        2: (Tiles(64, 64, 64, 8, 4, 3), Tiles(64, 128, 64, 8, 4, 3), Tiles(128, 128, 64, 8, 8, 3)),
        4: (Tiles(32, 64, 32, 8, 4, 3), Tiles(64, 64, 16, 8, 4, 3), Tiles(64, 64, 16, 8, 4, 3)),
    },
    "small": {
        2: (Tiles(64, 64, 64, 8, 4, 2), Tiles(64, 128, 64, 8, 4, 2), Tiles(128, 128, 32, 8, 8, 3)),
        4: (Tiles(32, 64, 32, 8, 4, 2), Tiles(64, 64, 16, 8, 4, 2), Tiles(64, 64, 16, 8, 4, 2)),
    },
    "amd": {
        2: (Tiles(64, 64, 64, 8, 4, 2), Tiles(64, 128, 64, 8, 4, 2), Tiles(128, 128, 64, 8, 8, 2)),
        4: (Tiles(32, 64, 32, 8, 4, 2), Tiles(64, 64, 16, 8, 4, 2), Tiles(64, 64, 16, 8, 4, 2)),
    },
}
FEW_PROGRAMS = 128
# Widest D at which Triton takes the operation in 16 bits under set_backend("auto"); 0: never. Wider goes to cuBLAS.
WIDEST = {
    "linear_gelu": {"large": 768, "small": 768, "amd": 384},
    "linear_add": {"large": 0, "small": 0, "amd": 0},
}
WIDEST_RECOMPUTED = 256  # widest x whose pre-activation is computed again in backward, not kept
SMALL_NVIDIA = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@torch.compiler.assume_constant_result
def device_kind(device_type: str, index: int | None) -> str:
    """The table's word for a device: "large", "small" or "amd"; a CPU, where kernels are only simulated, is "large"."""
    if torch.version.hip is not None:
        return "amd"
    if device_type != "cuda":
        return "large"
    return "small" if torch.cuda.get_device_capability(index) in SMALL_NVIDIA else "large"


def is_chosen(operation: str, x: torch.Tensor, width: int) -> bool:
    """Whether the Triton kernel is expected to beat cuBLAS and a pass of its own.

    Args:
        operation: "linear_gelu" or "linear_add".
        x: (B, N, K), the product's input.
        width: D, the narrower side of the product.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return width <= WIDEST[operation][device_kind(x.device.type, x.device.index)]


def choose_tiles(device: torch.device, itemsize: int, rows: int, columns: int, inner: int) -> Tiles:
    """Tiles of a product (rows, inner) x (inner, columns)."""
    few, shallow, deep = TILES[device_kind(device.type, device.index)][itemsize]
    large = shallow if inner <= 256 else deep
    programs = -(-rows // large.block_m) * -(-columns // large.block_n)
    return few if programs < FEW_PROGRAMS else large
