"""HyperBlock: timm's pre-norm Block with rows for both norms, and the residual add moved into the norm that follows.

    h, x = add_layer_norm(x, delta, *norm1);  delta = attention(h)
    h, x = add_layer_norm(x, delta, *norm2);  delta = mlp(h)            # the final norm adds the last delta

A stock block becomes a HyperBlock by a change of class. Rows are arguments, never state.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerNormFp32, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hyperclip_fast.kernels.dispatch import use_triton
from hyperclip_fast.kernels.layer_norm import add_layer_norm, layer_norm
from hyperclip_fast.kernels.linear import linear_gelu

MODULATED_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
Row = tuple[Tensor | None, Tensor | None]  # weight (T, D), bias (T, D); (None, None): the module's own
OWN_ROW: Row = (None, None)
PLAIN_MLP = (nn.Linear, nn.GELU, nn.Dropout, nn.Identity)  # timm's Mlp up to fc2: fc1, act, drop1, norm


def add_norm(
    norm: nn.Module,
    x: Tensor,
    delta: Tensor | None,
    row: Row = OWN_ROW,
    task_ids: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm of x + delta with the given rows, or with the module's own weight and bias.

    Args:
        norm: the norm module.
        x: (B, N, D) residual stream.
        delta: (B, N, D) still to be added to it, or None.
        row: weight (T, D) and bias (T, D).
        task_ids: (B,) or None.
        out_dtype: dtype of the normalised output, x's by default.

    Returns:
        The normalised sum and the sum, both (B, N, D).
    """
    weight, bias = row
    if weight is None and not _is_fusable(norm, x):
        x = x if delta is None else x + delta
        return norm(x), x
    if weight is None:
        weight, bias, task_ids = norm.weight.unsqueeze(0), norm.bias.unsqueeze(0), None
    if delta is None:
        return layer_norm(x, weight, bias, task_ids, norm.eps, out_dtype), x
    return add_layer_norm(x, delta, weight, bias, task_ids, norm.eps, out_dtype)


def _is_fusable(norm: nn.Module, x: Tensor) -> bool:
    """Whether a norm with its own weights may skip its forward: on Triton's path, a plain LayerNorm without hooks."""
    if not use_triton(x) or type(norm) not in MODULATED_NORMS or norm.weight is None or norm.bias is None:
        return False
    return not (norm._forward_hooks or norm._forward_pre_hooks)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the next Linear will compute in: written by the norm itself, so that autocast has nothing left to cast."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # autocast leaves float64 as it is
    return torch.get_autocast_dtype(kind) if casts else x.dtype


def _is_plain_mlp(mlp: nn.Module) -> bool:
    """Whether `mlp` is timm's Linear, exact GELU, Linear with nothing in between, and nobody listens inside."""
    parts = tuple(mlp._modules.values())[:4]  # read without nn.Module's __getattr__: this runs once a block
    if type(mlp) is not Mlp or tuple(map(type, parts)) != PLAIN_MLP:
        return False
    _, act, drop, _ = parts
    return act.approximate == "none" and not (drop.p and drop.training) and not _has_hooks(mlp, *parts)


def _has_hooks(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def run_mlp(mlp: nn.Module, h: Tensor) -> Tensor:
    """The MLP of a block, h (B, N, D) to (B, N, D), with its GELU in the first product (Triton) or in place (CPU)."""
    if not _is_plain_mlp(mlp):
        return mlp(h)
    if use_triton(h):
        h = linear_gelu(h, mlp.fc1.weight, mlp.fc1.bias)
    elif may_overwrite():
        h = torch.ops.aten.gelu_(F.linear(h, mlp.fc1.weight, mlp.fc1.bias))
    else:
        return mlp(h)
    return mlp.drop2(mlp.fc2(h))


def may_overwrite() -> bool:
    """Whether nothing but the next step will read a result: no autograd, no tracing."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class HyperBlock(Block):
    """timm's pre-norm Block with the residual adds moved into the norms, and rows for both norms."""

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None = None,
        weight1: Tensor | None = None,
        bias1: Tensor | None = None,
        weight2: Tensor | None = None,
        bias2: Tensor | None = None,
        task_ids: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One block; the stock block's output is the sum of what is returned, (x, delta) or (sum, None).

        The rows are flat arguments, not tuples, so that reentrant checkpointing sees every tensor.

        Args:
            x: (B, N, D) residual stream.
            delta: (B, N, D) still to be added to it, or None.
            weight1: (T, D) rows of norm1; None: the module's own.
            bias1: (T, D).
            weight2: (T, D) rows of norm2; None: the module's own.
            bias2: (T, D).
            task_ids: (B,) row of each sample, or None (T is 1 or B).
            attn_mask: mask of scaled_dot_product_attention.
            is_causal: causal attention.

        Returns:
            x (B, N, D) and delta (B, N, D) on the Triton path; their sum and None on the reference path.
        """
        dtype = _product_dtype(x)
        h, x = add_norm(self.norm1, x, delta, (weight1, bias1), task_ids, dtype)
        h = self.drop_path1(self.ls1(self.attn(h, attn_mask=attn_mask, is_causal=is_causal)))
        h, x = add_norm(self.norm2, x, h, (weight2, bias2), task_ids, dtype)
        h = self.drop_path2(self.ls2(run_mlp(self.mlp, h)))
        if use_triton(x):
            return x, h
        if may_overwrite() and not _has_hooks(self.norm2) and torch.result_type(x, h) == x.dtype:
            return x.add_(h), None  # x is the sum made two lines up, which nobody else has seen
        return x + h, None  # nothing to fuse: a second tensor kept alive would only cost the CPU's cache and allocator
