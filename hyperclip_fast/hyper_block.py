"""HyperBlock: timm's pre-norm Block with rows for both norms, and the residual add moved into the norm that follows.

    h, x = add_layer_norm(x, delta, *norm1);  delta = attention(h)
    h, x = add_layer_norm(x, delta, *norm2);  delta = mlp(h)            # the final norm adds the last delta

Where the kernels' table prefers it, the last product of a sub-layer writes the new stream, and no delta is left:

    h = layer_norm(x, *norm1);  x = linear_add(attention up to proj, proj, x)
    h = layer_norm(x, *norm2);  x = linear_add(mlp up to fc2, fc2, x)

and in inference, where it says so, the norm is the prologue of the sub-layer's first product: norm_linear.
A stock block becomes a HyperBlock by a change of class. Rows are arguments, never state. A block asks once a call
whether the Triton kernels run (`fused`) and what it is made of (`parts`), and tells its steps. What runs a module's
work without calling the module does so only where block_parts.py allows it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNormFp32, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hyperclip_fast.block_parts import MODULATED_NORMS, BlockParts, Way, follow, linear, parts_of
from hyperclip_fast.kernels.common.private_api import gelu_
from hyperclip_fast.kernels.common.rows import Rows
from hyperclip_fast.kernels.dispatch import is_preferred, is_traced, use_triton
from hyperclip_fast.kernels.layer_norm.functional import run_layer_norm
from hyperclip_fast.kernels.linear.functional import run_linear_add, run_linear_gelu
from hyperclip_fast.kernels.norm_linear.functional import fits_one_kernel, run_norm_linear
from hyperclip_fast.utils.private_api import has_any_global_hook, has_hooks, is_fast_norm, shallow_copy


def add_norm(
    norm: nn.Module,
    x: Tensor,
    delta: Tensor | None,
    rows: Rows | None = None,
    out_dtype: torch.dtype | None = None,
    fused: bool | None = None,
    is_heard: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm of x + delta with the given rows, or with the module's own weight and bias.

    Args:
        norm: the norm module.
        x: (B, N, D) residual stream.
        delta: (B, N, D) still to be added to it, or None.
        rows: weight and bias (T, D), and task_ids (B,) or None; None: the module's own.
        out_dtype: dtype of the normalised output; by default what the module's own forward would return.
        fused: what `use_triton` said of x; None: ask it.
        is_heard: whether somebody listens to the norm; None: look.

    Returns:
        The normalised sum and the sum, both (B, N, D).
    """
    fused = use_triton(x) if fused is None else fused
    if rows is None and not (fused and _is_fusable(norm)):
        x = x if delta is None else x + delta
        return norm(x), x
    assert isinstance(norm, nn.LayerNorm)
    out_dtype = out_dtype or norm_dtype(norm, x)
    if rows is not None and (has_hooks(norm) if is_heard is None else is_heard):
        x = x if delta is None else (x + delta).to(x.dtype)
        return _heard_norm(norm, rows, out_dtype, fused)(x), x
    return run_layer_norm(x, delta, rows or _own_rows(norm), norm.eps, out_dtype, fused)


class _RowNorm(nn.LayerNorm):
    """A norm that is listened to, with rows; its hooks are the stock norm's, and they meet it as their module."""

    rows: Rows
    out_dtype: torch.dtype
    fused: bool

    def forward(self, x: Tensor) -> Tensor:
        return run_layer_norm(x, None, self.rows, self.eps, self.out_dtype, self.fused)[0]


def _heard_norm(norm: nn.LayerNorm, rows: Rows, out_dtype: torch.dtype, fused: bool) -> _RowNorm:
    if "forward" in vars(norm):
        raise ValueError(f"params cannot pass a norm ({type(norm).__name__}) whose forward was replaced")
    twin = shallow_copy(norm, _RowNorm)
    vars(twin).update(rows=rows, out_dtype=out_dtype, fused=fused)
    return twin


def _own_rows(norm: nn.LayerNorm) -> Rows:
    """The module's weight and bias as the one row."""
    return Rows(norm.weight.unsqueeze(0), norm.bias.unsqueeze(0), None)


def _is_fusable(norm: nn.Module) -> bool:
    """Whether a norm with its own weights may skip its forward on Triton's path: a plain LayerNorm without hooks."""
    if type(norm) not in MODULATED_NORMS or norm.weight is None or norm.bias is None:
        return False
    return not has_hooks(norm)


def norm_dtype(norm: nn.Module, x: Tensor) -> torch.dtype:
    """What `norm(x)` would return: under autocast GPUs compute a layer norm in float32, timm's fast norm in 16 bits."""
    kind = x.device.type
    if type(norm) is LayerNormFp32 or x.dtype == torch.float64 or not is_autocast(x):
        return x.dtype
    if is_fast_norm(norm):
        return torch.get_autocast_dtype(kind)
    return x.dtype if kind == "cpu" else torch.float32


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where x is; asked about the meta device, torch.is_autocast_enabled raises."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the next Linear will compute in: written by the norm itself, so that autocast has nothing left to cast."""
    casts = is_autocast(x) and x.dtype != torch.float64  # autocast leaves float64 as it is
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def may_overwrite() -> bool:
    """Whether nothing but the next step will read a result: no autograd, no tracing."""
    return not (torch.is_grad_enabled() or is_traced())


def run_attention(
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    has_norms: bool = True,
    has_scale_norm: bool = True,
) -> Tensor:
    """timm's Attention between its products: q, k, v (B, N, H, D / H) to what proj reads, (B, N of q, D).

    q, k and v are views of the packed product, their heads still behind their tokens. So the attention's output lies as
    proj reads it, and in backward one stack packs d q, d k, d v: timm's order copies the packed gradient once more.
    `has_norms`, `has_scale_norm`: whether the modules of this name do anything.
    """
    if has_norms:
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    dropout = attn.attn_drop.p if attn.training else 0.0
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
    h = h.transpose(1, 2).flatten(2)
    return attn.norm(h) if has_scale_norm else h


def run_mlp(mlp: Mlp, h: Tensor, fused: bool) -> Tensor:
    """A plain Mlp up to its last product: h (B, N, D) to what fc2 reads; the GELU joins fc1, or overwrites it."""
    weight, bias = mlp.fc1.weight, mlp.fc1.bias
    if fused and is_preferred("linear_gelu", h, min(weight.shape)):
        return run_linear_gelu(h, weight, bias, True)
    h = F.linear(h, weight, bias)
    if not torch.is_grad_enabled():
        return gelu_(h)
    return F.gelu(h) if fused else _Gelu.apply(h)


class _Gelu(torch.autograd.Function):
    """The exact GELU between two products, whose gradient overwrites what the second product's backward wrote."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return F.gelu(x)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(tangent, *ctx.saved_tensors)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient's own gradient
            return torch.ops.aten.gelu_backward(grad, x)
        return torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)


def _may_join(norm: nn.Module, x: Tensor, rows: Rows | None) -> bool:
    """Whether the norm may be the prologue of the product that reads it: in inference, and nobody listens."""
    if torch.is_grad_enabled() or x.requires_grad:  # reentrant checkpointing: the same way twice
        return False
    return _is_fusable(norm) if rows is None else not has_hooks(norm)


def _is_ours(attn: Attention, parts: BlockParts, fused: bool) -> bool:
    """Whether plain attention is run here, around scaled_dot_product_attention.

    With norms of q and k the reference path calls timm's: it promises timm's gradients bit for bit, and these norms add
    theirs up in order.
    """
    return attn.fused_attn and (fused or not parts.has_norms)


def _add(x: Tensor, h: Tensor, way: Way, fused: bool) -> tuple[Tensor, Tensor | None]:
    """A sub-layer's last product of h (B, N, K), and its way to the stream x (B, N, D).

    Returns:
        (sum, None) where the product's epilogue adds it to the stream, (x, delta) where that is left to the next norm.
    """
    product, dropout, scale, drop_path, is_plain, is_linear_add, _ = way
    if not (fused and is_linear_add and is_preferred("linear_add", h, min(product.weight.shape))):
        return x, follow(way, linear(product, h, is_plain))
    if dropout.p and dropout.training:
        return x, follow(way, product(h))
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    keep = None
    if type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob:
        dtype = h.dtype if gamma is None else torch.promote_types(h.dtype, gamma.dtype)
        keep = drop_path(h.new_ones(h.shape[0], 1, 1, dtype=dtype)).flatten().float()  # timm's own draw
    return run_linear_add(h, product.weight, product.bias, x, gamma, keep, fused=True), None


class HyperBlock(Block):
    """timm's pre-norm Block with the residual adds moved into the norms, and rows for both norms."""

    attn: Attention
    mlp: Mlp
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm

    def __getstate__(self) -> dict[str, Any]:
        """All but what the last look at the parts found: a copy looks for itself."""
        return {key: value for key, value in self.__dict__.items() if key != "kept_parts"}

    def forward(  # type: ignore[override]  # the stream comes in two parts, and rows with it
        self,
        x: Tensor,
        delta: Tensor | None = None,
        weight1: Tensor | None = None,
        bias1: Tensor | None = None,
        weight2: Tensor | None = None,
        bias2: Tensor | None = None,
        task_ids: Tensor | None = None,
        tokens: int | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One block; the stock block's output is the sum of what is returned, (x, delta) or (sum, None).

        The rows arrive one by one and by position, since PyTorch looks for tensors among a module's positional
        arguments alone: reentrant checkpointing would lose the gradients of rows in a tuple without a word, full
        backward hooks would not list them. Behind this border they are `Rows`.

        Args:
            x: (B, N, D) residual stream.
            delta: (B, N, D) still to be added to it, or None.
            weight1: (T, D) rows of norm1; None: the module's own.
            bias1: (T, D).
            weight2: (T, D) rows of norm2; None: the module's own.
            bias2: (T, D).
            task_ids: (B,) row of each sample, or None (T is 1 or B).
            tokens: how many of the first tokens the output needs, which `can_narrow` must allow; None: all.
            attn_mask: mask of scaled_dot_product_attention.
            is_causal: causal attention.

        Returns:
            x (B, N, D) and delta (B, N, D) where a kernel of the next norm adds them; else their sum and None. With
            `tokens`, N is that.
        """
        if isinstance(x, torch.fx.Proxy):  # torch.fx follows timm's code, and could not follow what asks for dtypes
            return super().forward(x if delta is None else x + delta, attn_mask=attn_mask, is_causal=is_causal), None
        fused, parts = use_triton(x), parts_of(self)
        rows1 = None if weight1 is None or bias1 is None else Rows(weight1, bias1, task_ids)
        rows2 = None if weight2 is None or bias2 is None else Rows(weight2, bias2, task_ids)
        if tokens is None:
            x, delta = self.attend(x, delta, rows1, fused, parts, attn_mask, is_causal)
        else:
            x, delta = self.attend_few(x, delta, rows1, fused, parts, tokens)
        x, delta = self.feed_forward(x, delta, rows2, fused, parts)
        if delta is None or fused:
            return x, delta
        is_seen = parts.heard_norms[1] or has_any_global_hook()
        if may_overwrite() and not is_seen and torch.result_type(x, delta) == x.dtype:
            return x.add_(delta), None  # x is the sum that norm2 read, which nobody else has seen
        return x + delta, None  # nothing to fuse: a second tensor kept alive would only cost the CPU's cache, allocator

    def attend(
        self,
        x: Tensor,
        delta: Tensor | None,
        rows: Rows | None,
        fused: bool,
        parts: BlockParts | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """norm1 and attention: x and delta, both (B, N, D), to their sum and attention's delta, or all and None."""
        parts = parts or parts_of(self)
        attn, norm, dtype = parts.attn, self.norm1, _product_dtype(x)
        if attn is None or parts.attended is None or not _is_ours(attn, parts, fused):
            h, x = add_norm(norm, x, delta, rows, dtype, fused, parts.heard_norms[0])
            return x, self.drop_path1(self.ls1(self.attn(h, attn_mask=attn_mask, is_causal=is_causal)))
        qkv = attn.qkv
        is_joined = fused and delta is None and fits_one_kernel(x, dtype, gelu=False)  # with nothing left to add
        if is_joined and parts.is_plain_qkv and _may_join(norm, x, rows):
            rows = rows or _own_rows(norm)
            packed = run_norm_linear(x, rows, norm.eps, qkv.weight, qkv.bias, dtype, gelu=False, fused=True)
        else:
            h, x = add_norm(norm, x, delta, rows, dtype, fused, parts.heard_norms[0])
            packed = linear(qkv, h, parts.is_plain_qkv)
        q, k, v = packed.unflatten(2, (3, attn.num_heads, attn.head_dim)).unbind(2)
        h = run_attention(attn, q, k, v, attn_mask, is_causal, parts.has_norms, parts.has_scale_norm)
        return _add(x, h, parts.attended, fused)

    def can_narrow(self) -> bool:
        """Whether the output for some tokens can be had without the others': timm's own parts, and nobody listens.

        Dropout within the sub-layers forbids it, too: it would draw other numbers than timm's.
        """
        attn, mlp, parts = self.attn, self.mlp, parts_of(self)
        if parts.attn is None or type(attn.qkv) is not nn.Linear or type(mlp) is not Mlp:
            return False
        if not _is_ours(attn, parts, use_triton(attn.qkv.weight)):
            return False
        drops = (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2)
        return not any(drop.p and drop.training for drop in drops) and not has_hooks(*self.modules())

    def attend_few(
        self, x: Tensor, delta: Tensor | None, rows: Rows | None, fused: bool, parts: BlockParts, tokens: int
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` for the first tokens alone: all tokens give keys and values, only these a query."""
        attn = self.attn
        assert parts.attended is not None  # `can_narrow` has said so
        h, x = add_norm(self.norm1, x, delta, rows, _product_dtype(x), fused, parts.heard_norms[0])
        weights = attn.qkv.weight.tensor_split((attn.attn_dim,))
        biases: tuple[Tensor | None, ...] = (None, None)
        if attn.qkv.bias is not None:
            biases = attn.qkv.bias.tensor_split((attn.attn_dim,))
        q, packed = (F.linear(t, w, b) for t, w, b in zip((h[:, :tokens], h), weights, biases))
        q = q.unflatten(2, (attn.num_heads, attn.head_dim))
        k, v = packed.unflatten(2, (2, attn.num_heads, attn.head_dim)).unbind(2)
        h = run_attention(attn, q, k, v, None, False, parts.has_norms, parts.has_scale_norm)
        return _add(x[:, :tokens].contiguous(), h, parts.attended, fused)

    def feed_forward(
        self, x: Tensor, delta: Tensor | None, rows: Rows | None, fused: bool, parts: BlockParts | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """norm2 and MLP: x and delta, both (B, N, D), to their sum and the MLP's delta, or all and None."""
        parts = parts or parts_of(self)
        mlp, act, drop, norm, dtype = parts.mlp, parts.act, parts.drop, self.norm2, _product_dtype(x)
        is_ours = (fused or not is_traced()) and act is not None and act.approximate == "none"
        if not is_ours or mlp is None or drop is None or parts.fed is None or (drop.p and drop.training):
            h, x = add_norm(norm, x, delta, rows, dtype, fused, parts.heard_norms[1])
            return x, self.drop_path2(self.ls2(self.mlp(h)))
        is_joined = fused and delta is None and fits_one_kernel(x, dtype, gelu=True)
        if is_joined and _may_join(norm, x, rows):
            rows, fc1 = rows or _own_rows(norm), mlp.fc1
            h = run_norm_linear(x, rows, norm.eps, fc1.weight, fc1.bias, dtype, gelu=True, fused=True)
        else:
            h, x = add_norm(norm, x, delta, rows, dtype, fused, parts.heard_norms[1])
            h = run_mlp(mlp, h, fused)
        return _add(x, h, parts.fed, fused)
