"""BatchNorm folded into the convolution before it: one task's tower whose inference carries no BatchNorm.

Which norm follows which convolution is seen, not guessed: one image runs through the model, and a pair is folded where
the norm alone reads what the convolution wrote.
"""

from collections import Counter
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hyperclip_fast.utils.private_api import BatchNorm, TorchDispatchMode, tree_leaves

FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fuse_batch_norms(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy in eval mode with every BatchNorm folded that follows a convolution, branches made one where timm can.

    A BatchNorm without a convolution of its own before it stays.

    Args:
        model: a timm model that holds one task's row.
        image: (1, C, H, W), any image that it takes.
    """
    dtype = next(model.parameters()).dtype
    model = reparameterize_model(model).to(dtype).eval()  # some of timm's own make float32 convolutions
    for conv_name, norm_name in _pairs(model, image):
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        model.set_submodule(norm_name, _behind(norm))
    return model


@torch.no_grad()
def _pairs(model: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Names of the convolutions and BatchNorms that may be folded."""
    convs = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, FOLDABLE)}
    norms = {id(m.weight): name for name, m in model.named_modules() if _is_foldable(m)}
    with _Watch() as seen:
        model(image)
    return [
        (convs[weight], norms[norm])
        for made, norm in seen.normed
        if norm in norms
        and (weight := seen.convolved.get(made)) in convs
        and seen.reads[made] == seen.reads[weight] == seen.reads[norm] == 1
    ]


def _is_foldable(norm: nn.Module) -> bool:
    is_plain = isinstance(norm, BatchNorm)
    return is_plain and norm.weight is not None and norm.running_mean is not None


def _behind(norm: nn.Module) -> nn.Module:
    """What timm keeps behind a norm in the same module: dropout and activation."""
    parts = [part for part in norm.children() if type(part) is not nn.Identity]
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()


class _Watch(TorchDispatchMode):
    """Who reads what: `convolved` maps a result to the weight that made it, `normed` lists inputs and weights of norms.

    Tensors by id; all that were seen are kept, so that no id is used twice.
    """

    def __init__(self):
        super().__init__()
        self.convolved: dict[int, int] = {}
        self.normed: list[tuple[int, int]] = []
        self.reads: Counter[int] = Counter()
        self.kept: list[object] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.reads.update(id(each) for each in tree_leaves((args, kwargs)) if torch.is_tensor(each))
        self.kept.append((args, kwargs, out))
        if operator is torch.ops.aten.convolution.default:
            self.convolved[id(out)] = id(args[1])
        elif "batch_norm" in str(operator):
            self.normed.append((id(args[0]), id(args[1])))
        return out
