"""What a block is made of, and which of its modules' work may be done without calling them.

That is allowed for timm's and PyTorch's own classes where nobody listens: no hook, no forward of its own. Looking takes
longer than launching a kernel, so the answer stays with the block, if nobody listens, until one of its parts is
exchanged or given a `forward`, or a hook is registered anywhere in the process. What changes without either (training
mode, a dropout's probability, `fused_attn`) is asked on every call. Nothing is kept of what a tracer saw.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, LayerNormFp32, LayerScale, Mlp
from torch import Tensor, nn

from hyperclip_fast.kernels.dispatch import is_traced
from hyperclip_fast.utils.private_api import (
    has_any_global_hook,
    has_hooks,
    hooks_registered,
    own_children,
    own_parameters,
)

MODULATED_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
PLAIN_MLP = (nn.Linear, nn.GELU, nn.Dropout, nn.Identity)  # timm's Mlp up to fc2: fc1, act, drop1, norm
CHANCES = {nn.Dropout: "p", DropPath: "drop_prob"}  # in eval mode, and where this is 0, they return what they get


class Way(NamedTuple):
    """A sub-layer's last product, and what leads from it to the stream."""

    product: Any  # nn.Linear where `is_plain`
    dropout: Any
    scale: Any
    drop_path: Any
    is_plain: bool  # the product's work may be done without calling it
    is_linear_add: bool  # and with it all the others'
    after: tuple[tuple[nn.Module, str | None], ...]  # whom to call then, unless it does nothing while this is 0


class BlockParts(NamedTuple):
    """What `parts_of` found."""

    heard_norms: tuple[bool, bool]  # whether somebody listens to norm1, norm2
    attn: Attention | None  # where its work may be done here
    has_norms: bool  # of q and k: then on Triton's path alone
    has_scale_norm: bool
    is_plain_qkv: bool
    mlp: Mlp | None  # where its work may be done here: Linear, exact GELU, Dropout, Linear
    act: nn.GELU | None
    drop: nn.Dropout | None
    attended: Way | None
    fed: Way | None


NOTHING_PLAIN = BlockParts((False, False), None, False, False, False, None, None, None, None, None)


def parts_of(block: Any) -> BlockParts:
    """The parts of a HyperBlock, from the last look where that still holds."""
    if is_traced():
        return _look(block)
    children, kept = _children(block), block.__dict__.get("kept_parts")
    now = (hooks_registered(), children, tuple(map(type, children)))  # parametrizations change a module's class
    if kept is not None and kept[0] == now and not _has_own_forward(children):
        return kept[1]
    parts = NOTHING_PLAIN if has_any_global_hook() else _look(block)
    is_heard = parts is NOTHING_PLAIN or has_hooks(*(child for child in children if child is not None))
    if not is_heard:  # nobody tells when a hook goes
        block.__dict__["kept_parts"] = (now, parts)  # past nn.Module.__setattr__, which looks for modules and tensors
    return parts


def linear(product: Any, x: Tensor, is_plain: bool) -> Tensor:
    """A product's output, without calling it where that is allowed."""
    parameters: dict[str, Any] = own_parameters(product)
    if not is_plain or "weight" not in parameters or "bias" not in parameters:  # FSDP puts plain tensors in their place
        return product(x)
    return F.linear(x, parameters["weight"], parameters["bias"])


def follow(way: Way, x: Tensor) -> Tensor:
    """What the modules behind a way's product make of its output."""
    for module, chance in way.after:
        if chance is None or (module.training and getattr(module, chance)):
            x = module(x)
    return x


def _children(block: Any) -> tuple[Any, ...]:
    own: dict[str, Any] = own_children(block)
    return (*own.values(), *own_children(own["attn"]).values(), *own_children(own["mlp"]).values())


def _has_own_forward(children: tuple[Any, ...]) -> bool:
    forwards = ["forward" in child.__dict__ for child in children if child is not None]
    return any(forwards)  # a generator takes twice as long


def _look(block: Any) -> BlockParts:
    attn, mlp = block.attn, block.mlp
    attn = attn if _is_plain_attention(attn) else None
    mlp = mlp if _is_plain_mlp(mlp) else None
    return BlockParts(
        (has_hooks(block.norm1), has_hooks(block.norm2)),
        attn,
        attn is not None and {type(attn.q_norm), type(attn.k_norm)} != {nn.Identity},
        attn is not None and not _is_plain(attn.norm, nn.Identity),
        attn is not None and _is_plain(attn.qkv, nn.Linear),
        mlp,
        None if mlp is None else mlp.act,
        None if mlp is None else mlp.drop1,
        None if attn is None else _way(attn.proj, attn.proj_drop, block.ls1, block.drop_path1),
        None if mlp is None else _way(mlp.fc2, mlp.drop2, block.ls2, block.drop_path2),
    )


def _is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    return type(module) in kinds and not has_hooks(module)


def _is_plain_attention(attn: Any) -> bool:
    """Whether `attn` is timm's Attention, and nobody listens to it."""
    if type(attn) is not Attention or getattr(attn, "gate", None) is not None or has_hooks(attn):
        return False
    norms = (attn.q_norm, attn.k_norm)
    return all(_is_plain(norm, nn.Identity) for norm in norms) or all(_is_plain(n, *MODULATED_NORMS) for n in norms)


def _is_plain_mlp(mlp: Any) -> bool:
    """Whether `mlp` is timm's Linear, GELU, Linear with nothing in between, and nobody listens inside."""
    # read without nn.Module's __getattr__, which a tracer would follow into every attribute
    parts: tuple[Any, ...] = tuple(own_children(mlp).values())[:4]
    return type(mlp) is Mlp and tuple(map(type, parts)) == PLAIN_MLP and not has_hooks(mlp, *parts)


def _way(product: Any, dropout: Any, scale: Any, drop_path: Any) -> Way:
    others = (dropout, scale, drop_path)
    is_plain = _is_plain(product, nn.Linear)
    is_linear_add = (
        is_plain
        and _is_plain(dropout, nn.Dropout)
        and _is_plain(scale, nn.Identity, LayerScale)
        and _is_plain(drop_path, nn.Identity, DropPath)
    )
    called = (module for module in others if not _is_plain(module, nn.Identity))
    after = tuple((module, CHANCES.get(type(module)) if not has_hooks(module) else None) for module in called)
    return Way(product, *others, is_plain, is_linear_add, after)
