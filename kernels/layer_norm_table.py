"""Tiles of the layer norm's kernels by width: data; linear_table.py reads other numbers from a file."""

# Padded width: (BLOCK_N, warps) forward, (BLOCK_N, warps) backward. At most 32 elements a thread forward, and 16
# backward, where two float32 accumulators stay alive; nothing spills on any target of tests/test_kernel_targets.py.
CONFIGS = {
    64: ((32, 4), (32, 4)),
    128: ((16, 4), (16, 4)),
    256: ((8, 4), (8, 4)),
    512: ((8, 4), (4, 4)),
    1024: ((4, 4), (2, 4)),
    2048: ((2, 4), (2, 8)),
    4096: ((1, 4), (1, 8)),
    8192: ((1, 8), (1, 16)),
}


def tile_config(width: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """(padded width, (BLOCK_N, warps) forward, (BLOCK_N, warps) backward) of width D."""
    padded = 1 << (width - 1).bit_length()
    return padded, *CONFIGS[max(padded, min(CONFIGS))]
