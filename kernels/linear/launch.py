"""Launches of the products with epilogues: what is allocated, which tiles, which grid."""

import torch

from ..common.launch import cdiv
from ..common.launcher import launch
from ..tables import Tiles, choose_tiles
from .triton_kernels import (
    _gelu_bwd_kernel,
    _linear_add_bwd_kernel,
    _linear_add_kernel,
    _linear_gelu_bwd_kernel,
    _linear_gelu_kernel,
)

PASS_CONFIG = (16, 128, 4)  # BLOCK_M, BLOCK_N, warps of the passes: 16 elements a thread
PASS_PROGRAMS = 2048  # enough to fill a large GPU; the rows are cut into slices until there are as many


def _precision(dtype: torch.dtype) -> str:
    """Triton's "tf32" where PyTorch's own float32 products may use it, else "ieee".

    torch 2.9 renamed the flag, and reading the older name raises once the newer one was set.
    """
    matmul = torch.backends.cuda.matmul
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _product_options(x: torch.Tensor, weight: torch.Tensor) -> tuple[Tiles, tuple[int], dict]:
    """Tiles, grid and the arguments that every product kernel takes, for x (B, N, K) and weight (F, K)."""
    (F, K), rows = weight.shape, x.shape[0] * x.shape[1]
    tiles = choose_tiles(x.device, x.element_size(), rows, F, K)
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m}
    options = {"x": x, "weight": weight, "M": rows, "F": F, "K": K, "PRECISION": _precision(x.dtype), **blocks}
    grid = (cdiv(rows, tiles.block_m) * cdiv(F, tiles.block_n),)
    return tiles, grid, {**options, "num_warps": tiles.warps, "num_stages": tiles.stages}


def launch_linear_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, keep_pre: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out (B, N, F) and the pre-activation (B, N, F), None unless `keep_pre`. All inputs are contiguous."""
    shape = (*x.shape[:2], weight.shape[0])
    out = torch.empty(*shape, dtype=x.dtype, device=x.device)
    pre = torch.empty(*shape, dtype=x.dtype, device=x.device) if keep_pre else None
    if x.numel():
        _, grid, options = _product_options(x, weight)
        launch(_linear_gelu_kernel, grid, bias=bias, out=out, pre=pre, **options)
    return out, pre


def launch_linear_gelu_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre: torch.Tensor | None,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the pre-activation (B, N, F) and of bias (F,), None unless `need_bias`; pre None: computed again."""
    grad_pre = torch.empty(*grad_out.shape, dtype=x.dtype, device=x.device)
    if pre is not None:
        partial = _gelu_backward_pass(grad_out, pre, grad_pre, need_bias)
    else:
        tiles, grid, options = _product_options(x, weight)
        lines = cdiv(options["M"], tiles.block_m)
        partial = _partials(lines, weight.shape[0], x) if need_bias else None
        if grad_out.numel():
            outputs = {"grad_pre": grad_pre, "partial_bias": partial}
            launch(_linear_gelu_bwd_kernel, grid, bias=bias, grad_out=grad_out, **outputs, **options)
    return grad_pre, None if partial is None or bias is None else partial.sum(0).to(bias.dtype)


def _gelu_backward_pass(grad_out, pre, grad_pre, need_bias) -> torch.Tensor | None:
    slices, grid, options = _pass_options(pre)
    partial = _partials(slices, pre.shape[2], pre) if need_bias else None
    if pre.numel():
        launch(_gelu_bwd_kernel, grid, grad_out=grad_out, pre=pre, grad_pre=grad_pre, partial_bias=partial, **options)
    return partial


def _partials(lines: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(lines, columns, dtype=torch.float32, device=like.device)


def _pass_options(grad: torch.Tensor) -> tuple[int, tuple[int], dict]:
    """Slices of the rows, grid and the arguments that both passes take, for a gradient (B, N, F)."""
    F, rows = grad.shape[2], grad.shape[0] * grad.shape[1]
    block_m, block_n, warps = PASS_CONFIG
    columns = cdiv(F, block_n)
    slices = min(cdiv(rows, block_m), cdiv(PASS_PROGRAMS, columns))
    options = {"M": rows, "slices": slices, "F": F, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps}
    return slices, (columns * slices,), options


def launch_linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    keep: torch.Tensor | None,
    keep_y: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out (B, N, D) of residual's dtype and the product y (B, N, D), None unless `keep_y`; inputs are contiguous."""
    out = torch.empty(*residual.shape, dtype=residual.dtype, device=x.device)
    y = torch.empty(*residual.shape, dtype=x.dtype, device=x.device) if keep_y else None
    if x.numel():
        _, grid, options = _product_options(x, weight)
        epilogue = {"bias": bias, "residual": residual, "scale": scale, "keep": keep, "out": out, "y": y}
        launch(_linear_add_kernel, grid, N=x.shape[1], **epilogue, **options)
    return out, y


def launch_linear_add_backward(
    grad_out: torch.Tensor,
    y: torch.Tensor | None,
    scale: torch.Tensor | None,
    keep: torch.Tensor | None,
    y_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of y (B, N, D) in `y_dtype`, of bias (D,) in `bias_dtype`, and of scale (D,) where y is given."""
    grad_y = None if y_dtype is None else torch.empty(*grad_out.shape, dtype=y_dtype, device=grad_out.device)
    slices, grid, options = _pass_options(grad_out)
    D = grad_out.shape[2]
    partial_bias = None if bias_dtype is None else _partials(slices, D, grad_out)
    partial_scale = None if y is None else _partials(slices, D, grad_out)
    if grad_out.numel():
        inputs = {"grad_out": grad_out, "y": y, "scale": scale, "keep": keep, "N": grad_out.shape[1]}
        outputs = {"grad_y": grad_y, "partial_bias": partial_bias, "partial_scale": partial_scale}
        launch(_linear_add_bwd_kernel, grid, **inputs, **outputs, **options)
    grad_bias = None if partial_bias is None else partial_bias.sum(0).to(bias_dtype)
    grad_scale = None if partial_scale is None or scale is None else partial_scale.sum(0).to(scale.dtype)
    return grad_y, grad_bias, grad_scale
