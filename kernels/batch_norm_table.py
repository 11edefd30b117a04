"""Tiles of the batch norm's kernels by the width of what is contiguous: pixels, or channels in channels-last. Data."""

# Padded inner dimension: (BLOCK_O, BLOCK_I, warps); a wider one is cut into several tiles. 16 elements a thread, since
# backward keeps two float32 sums of each; nothing spills on any target of tests/test_kernel_targets.py.
CONFIGS = {16: (128, 16, 4), 32: (64, 32, 4), 64: (32, 64, 4), 128: (8, 128, 2)}
COMBINE_CONFIG = (64, 32, 4)  # lines, channels, warps of the kernels that add partials


def tile_config(inner: int) -> tuple[int, int, int]:
    """(BLOCK_O, BLOCK_I, warps) for an inner dimension of this size."""
    padded = 1 << (inner - 1).bit_length()
    return CONFIGS[min(max(padded, min(CONFIGS)), max(CONFIGS))]
