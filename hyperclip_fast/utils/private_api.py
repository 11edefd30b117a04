"""The private interfaces of PyTorch and timm that the package uses: each with its reason, and none anywhere else.

A private interface may change without notice, so this is the first file to read when a new release breaks something.
All of them exist in the oldest releases that setup.py allows and in the newest ones: CI tests both. kernels/ stands
alone and has a list of its own.
"""

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.modules import module as module_hooks

# What all BatchNorms share, SyncBatchNorm included. Replaced by: nothing; a tuple of the public classes would miss
# subclasses of the base that others write.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

# Sees every operator that runs, with its arguments. Replaced by: nothing, though PyTorch documents it.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Containers of tensors for torch.compile, torch.export and torch.func. Replaced by: nothing that registers a class.
from torch.utils._pytree import GetAttrKey as GetAttrKey
from torch.utils._pytree import register_pytree_node as register_pytree_node
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from timm.models import VisionTransformer
    from timm.models._features import FeatureGetterNet as FeatureGetterNet
    from timm.models._features import feature_take_indices as feature_take_indices

Module = TypeVar("Module", bound=nn.Module)


def __getattr__(name: str) -> Any:
    """timm's wrapper for `features_only` and its reading of `indices`, imported late since timm is slow to import.

    Replaced by: nothing; timm exports the other wrappers only.
    """
    if name in ("FeatureGetterNet", "feature_take_indices"):
        return getattr(importlib.import_module("timm.models._features"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a hook, or a forward of its own, makes calling one of the modules more than running its class's code.

    nn.Module has no public way to ask for its hooks.
    """
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def hooks_registered() -> int:
    """How many hooks this process has registered up to now, on modules or tensors: none has come while it stands.

    nn.Module has no public way to hear of them.
    """
    return RemovableHandle.next_id


def has_any_global_hook() -> bool:
    """Whether somebody listens to all modules (register_module_forward_hook). Replaced by: nothing that tells."""
    return module_hooks._has_any_global_hook()


def is_fast_norm(norm: nn.Module) -> bool:
    """Whether timm computes a norm in autocast's dtype. timm keeps it in the layer, and has no public way to ask."""
    return getattr(norm, "_fast_norm", False)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's parameters, without those of its children, by name; None for one that it was told to do without.

    The public iterators leave out the latter, and `getattr` costs a failed look-up each time.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """As `own_parameters`, for buffers."""
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """As `own_parameters`, for children."""
    return module._modules


def shallow_copy(module: nn.Module, kind: type[Module]) -> Module:
    """A module of class `kind` with all that `module` has: the same parameters, buffers, parts, hooks and options.

    nn.Module keeps all of that in its `__dict__`. `copy.copy` would not change the class, and cannot be traced.
    """
    twin = object.__new__(kind)
    object.__setattr__(twin, "__dict__", module.__dict__.copy())
    return twin


def set_own(
    twin: nn.Module, parameters: dict[str, Any] | None = None, children: dict[str, nn.Module | None] | None = None
) -> None:
    """Give a shallow copy parameters or children of its own, which may be plain tensors; the original keeps its own.

    `setattr` would change the dictionary that both share, and refuse a tensor that is no parameter.
    """
    if parameters is not None:
        twin.__dict__["_parameters"] = parameters
    if children is not None:
        twin.__dict__["_modules"] = children


def forget_compiled(twin: nn.Module) -> None:
    """A shallow copy of a module that was compiled by itself (`module.compile()`) would run the original."""
    twin.__dict__["_compiled_call_impl"] = None


class AnyBatchNorm(BatchNorm):
    """BatchNorm of any number of dimensions, as SyncBatchNorm is. Replaced by: nothing; the public ones check it."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into others, all by one launch. Replaced by: a loop over `copy_`, with a launch each."""
    torch._foreach_copy_(targets, sources)


def chosen_attention(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which kernel scaled_dot_product_attention takes for these inputs, such as "math". Replaced by: nothing."""
    return SDPBackend(torch._fused_sdp_choice(q, k, v)).name.lower().removesuffix("_attention")


def add_positions(vit: "VisionTransformer", x: Tensor) -> Tensor:
    """timm's patches to tokens: prefix tokens and position embeddings. Part of its forward_features, without a name."""
    return vit._pos_embed(x)


def mark_maybe_dynamic(tensor: Tensor, dim: int) -> None:
    """Tell torch.compile that a dimension may change. Public `mark_dynamic` raises where the code fixes it."""
    importlib.import_module("torch._dynamo").maybe_mark_dynamic(tensor, dim)


def written_arguments(operator: torch._ops.OpOverload) -> list[bool]:
    """For each argument of an operator, whether it is written. Replaced by: nothing; only the schema says it."""
    return [argument.alias_info is not None and argument.alias_info.is_write for argument in operator._schema.arguments]


def frozen_weights() -> AbstractContextManager[None]:
    """Inductor takes weights as constants inside: tracing reads the configuration, not the options of torch.compile."""
    return importlib.import_module("torch._inductor.config").patch(freezing=True)


def compile_and_package(program: torch.export.ExportedProgram, path: str, options: dict[str, Any]) -> None:
    """Compile an exported program ahead of time into one .pt2 file. PyTorch documents it under this private name."""
    inductor = importlib.import_module("torch._inductor")
    inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def load_package(path: str) -> Any:
    """What `compile_and_package` wrote, ready to be called."""
    return importlib.import_module("torch._inductor").aoti_load_package(path)
