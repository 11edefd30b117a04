"""Launch of the norm and product in one: what is allocated, which tiles, which grid."""

import torch

from ..common.launch import cdiv
from ..common.launcher import launch
from ..common.rows import Rows, row_stride
from ..tables import choose_norm_tiles
from .triton_kernels import _norm_linear_kernel

# Two for each SM of a large GPU. Fewer row tiles have their columns cut into slices, each with the whole norm to do.
PROGRAMS = 256


def launch_norm_linear(
    x: torch.Tensor, rows: Rows, eps: float, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """out (B, N, F) of weight's dtype. x, weight and bias are contiguous."""
    (B, N, K), F = x.shape, weight.shape[0]
    out = torch.empty(B, N, F, dtype=weight.dtype, device=x.device)
    tiles = choose_norm_tiles(x.device, K)
    assert tiles is not None  # the caller has checked K
    row_tiles, column_tiles = cdiv(B * N, tiles.block_m), cdiv(F, tiles.block_n)
    if x.numel():
        slices = min(column_tiles, cdiv(PROGRAMS, row_tiles))
        launch(
            _norm_linear_kernel,
            (row_tiles * slices,),
            x=x,
            norm_weight=rows.weight,
            norm_bias=rows.bias,
            task_ids=rows.task_ids,
            weight=weight,
            bias=bias,
            out=out,
            M=B * N,
            N=N,
            T=rows.weight.shape[0],
            F=F,
            slices=slices,
            norm_weight_stride=row_stride(rows.weight),
            norm_bias_stride=row_stride(rows.bias),
            eps=eps,
            GELU=gelu,
            K=K,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out
