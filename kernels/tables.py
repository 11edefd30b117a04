"""Tables of all operations: tiles and warps, and for products who computes them and what is kept for backward.

An H100 has timed them (bench/results); for other kinds of device the products' numbers are roofline arithmetic. It
counts per token in units of D, and in 16 bits: MD = tokens x width x 2 bytes.

- `linear_gelu` saves 8 MD, the GELU's own pass. It pays while the Triton product keeps t / (t + pass) of cuBLAS's
  speed, t the time of fc1 alone. At 3.0 TB/s and 600 TFLOP/s (H100) that is 38, 49, 66 and 72 % for D = 192, 384, 768,
  1024; at 1.75 TB/s and 250 TFLOP/s (A100) 40, 57, 73 and 78 %. Without TMA and warp specialisation expect about 70 %
  on sm_90, 85 % on sm_80. In float32 the product is all that counts, and cuBLAS has it. The H100 refutes it: with erf
  in the epilogue the product takes as long as cuBLAS and a GELU pass at D = 192, and loses from there on, so large GPUs
  leave it to cuBLAS. Small ones have less bandwidth for as much arithmetic: there it stays a prediction.
- `linear_add` saves 1 MD against the add in `add_layer_norm`: break-even 83 to 93 % for fc2, so it is off by default.
- `norm_linear` saves 2 MD where the stream has nothing left to add, so after `linear_add`; else 1, for the add is then
  a pass of its own. At D = 192 and 384 QKV breaks even with 2 MD at 67 and 74 % (H100), 67 and 80 % (A100), fc1 at 71
  and 79 %, 73 and 84 %; with 1 MD all at 80 % or more. As `linear_add` is off by default, so are both.
- Backward of `linear_gelu`: recomputing the pre-activation reads x again (1 MD) where keeping it writes and reads 4 MD
  each: 7 MD and 4 MD of memory less, against one more product of 8 M D^2 FLOP. Even at D = 350 (H100) or 250 (A100).

A tile of 128 x 256 would read its operands less often, but its epilogue spills on sm_90.

Whoever has timed a machine knows better: `load` puts the numbers of a JSON file into these tables and the layer norm's,
as the environment variable HYPERCLIP_KERNEL_TABLE does on import; `save` writes what is in force.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

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
# Kind of device: {widest D: tiles of `norm_linear`}, in 16 bits. Its rows stay on the chip: wider ones do not fit. It
# walks along the columns, so group_m does not count.
NORM_TILES = {
    "large": {192: Tiles(128, 64, 64, 1, 8, 2), 384: Tiles(128, 64, 64, 1, 8, 2)},
    "small": {192: Tiles(64, 64, 64, 1, 4, 2), 384: Tiles(64, 32, 64, 1, 4, 2)},
    "amd": {192: Tiles(128, 64, 64, 1, 8, 2), 384: Tiles(128, 64, 64, 1, 8, 2)},
}
# Widest D at which Triton takes the operation in 16 bits under set_backend("auto"); 0: never. Wider goes to cuBLAS.
WIDEST = {
    "linear_gelu": {"large": 0, "small": 768, "amd": 384},
    "linear_add": {"large": 0, "small": 0, "amd": 0},
    "norm_linear": {"large": 0, "small": 0, "amd": 0},
    "norm_linear_gelu": {"large": 0, "small": 0, "amd": 0},
}
WIDEST_RECOMPUTED = 256  # widest x whose pre-activation is computed again in backward, not kept
# Padded width: (BLOCK_N, warps) forward, (BLOCK_N, warps) backward. At most 32 elements a thread forward, and 16
# backward, where two float32 accumulators stay alive; nothing spills on any target of tests/kernels/test_targets.py.
LAYER_NORM_TILES = {
    64: ((32, 4), (32, 4)),
    128: ((16, 4), (16, 4)),
    256: ((8, 4), (8, 4)),
    512: ((8, 4), (4, 4)),
    1024: ((4, 4), (2, 4)),
    2048: ((2, 4), (2, 8)),
    4096: ((1, 4), (1, 8)),
    8192: ((1, 8), (1, 16)),
}
MAX_WIDTH = max(LAYER_NORM_TILES)  # of a layer norm; wider rows do not stay in a program's registers
# Padded inner dimension: (BLOCK_O, BLOCK_I, warps); a wider one is cut into several tiles. 16 elements a thread, since
# backward keeps two float32 sums of each; nothing spills on any target of tests/kernels/test_targets.py.
BATCH_NORM_TILES = {16: (128, 16, 4), 32: (64, 32, 4), 64: (32, 64, 4), 128: (8, 128, 2)}
COMBINE_CONFIG = (64, 32, 4)  # lines, channels, warps of the kernels that add partials
# What a file may hold.
TABLES = {"widest": WIDEST, "tiles": TILES, "norm_tiles": NORM_TILES, "layer_norm": LAYER_NORM_TILES}
SMALL_NVIDIA = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@torch.compiler.assume_constant_result
def device_kind(device_type: str, index: int | None) -> str:
    """The table's word for a device: "large", "small" or "amd"; a CPU, where kernels are only simulated, is "large"."""
    if torch.version.hip is not None:
        return "amd"
    return nvidia_kind(index) if device_type == "cuda" else "large"


@functools.cache
def nvidia_kind(index: int | None) -> str:
    """`device_kind` of an NVIDIA GPU: asked several times a block, and answered by the driver once."""
    return "small" if torch.cuda.get_device_capability(index) in SMALL_NVIDIA else "large"


def is_chosen(operation: str, x: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> bool:
    """Whether the Triton kernel is expected to beat cuBLAS and a pass of its own.

    Args:
        operation: a key of WIDEST.
        x: (B, N, K), the product's input.
        width: D, the narrower side of the product.
        dtype: the dtype that the product computes in, x's by default.
    """
    if (dtype or x.dtype) not in (torch.bfloat16, torch.float16):
        return False
    return width <= WIDEST[operation][device_kind(x.device.type, x.device.index)]


def choose_tiles(device: torch.device, itemsize: int, rows: int, columns: int, inner: int) -> Tiles:
    """Tiles of a product (rows, inner) x (inner, columns)."""
    few, shallow, deep = TILES[device_kind(device.type, device.index)][itemsize]
    large = shallow if inner <= 256 else deep
    programs = -(-rows // large.block_m) * -(-columns // large.block_n)
    return few if programs < FEW_PROGRAMS else large


def choose_norm_tiles(device: torch.device, width: int) -> Tiles | None:
    """Tiles of `norm_linear` for rows of D = `width`; None where they are too wide for it."""
    tiles = NORM_TILES[device_kind(device.type, device.index)]
    return tiles[min(limit for limit in tiles if width <= limit)] if width <= max(tiles) else None


def layer_norm_tiles(width: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """(padded width, (BLOCK_N, warps) forward, (BLOCK_N, warps) backward) of width D."""
    padded = 1 << (width - 1).bit_length()
    return padded, *LAYER_NORM_TILES[padded if padded in LAYER_NORM_TILES else min(LAYER_NORM_TILES)]


def batch_norm_tiles(inner: int) -> tuple[int, int, int]:
    """(BLOCK_O, BLOCK_I, warps) for an inner dimension of this size."""
    padded = 1 << (inner - 1).bit_length()
    return BATCH_NORM_TILES[min(max(padded, min(BATCH_NORM_TILES)), max(BATCH_NORM_TILES))]


def load(path: str | Path) -> None:
    """Put a file's numbers into the tables, which keep what it leaves out; kernels launched from now on follow them.

    The file is JSON, shaped as `save` writes it: {"widest": {operation: {kind of device: D}},
    "tiles": {kind of device: {bytes of an element: [few, shallow, deep]}},
    "norm_tiles": {kind of device: {widest D: tiles}}, "layer_norm": {padded width: [forward, backward]}}. Every part
    may be left out.

    Raises:
        ValueError: if it is not such a file; no table has changed then.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path must be a JSON file of kernel tables, got {path}: {error}") from error
    _update(TABLES, _parse(str(path), given, TABLES))


def save(path: str | Path) -> None:
    """Write the tables in force to a JSON file that `load` reads (beside, then renamed)."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(TABLES, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _parse(name: str, given: Any, current: Any) -> Any:
    """JSON's `given` in the form of the `current` value that it replaces; a dictionary may be a part of it."""
    if isinstance(current, dict):
        keys = {str(key): key for key in current}
        if not isinstance(given, dict) or not given.keys() <= keys.keys():
            raise ValueError(f"{name} must have keys among {list(keys)}, got {given}")
        return {keys[key]: _parse(f"{name}: {key}", value, current[keys[key]]) for key, value in given.items()}
    if isinstance(current, int):
        if type(given) is not int or given < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {given!r}")
        return given
    if not isinstance(given, list) or len(given) != len(current):
        raise ValueError(f"{name} must be a list of {len(current)}, got {given!r}")
    values = tuple(_parse(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(given, current)))
    if isinstance(current[0], int) and not all(value and value & (value - 1) == 0 for value in values[:5]):
        raise ValueError(f"{name} must hold powers of two, got {given}")  # but for Tiles' last, its stages
    if isinstance(current, Tiles):
        if min(values[:3]) < 16 or not values[5]:
            raise ValueError(f"{name} must have blocks of at least 16 and at least one stage, got {given}")
        return Tiles(*values)
    return values


def _update(table: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            _update(table[key], value)
        else:
            table[key] = value


if "HYPERCLIP_KERNEL_TABLE" in os.environ:
    load(os.environ["HYPERCLIP_KERNEL_TABLE"])
