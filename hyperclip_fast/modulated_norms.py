"""Norms whose weight and bias belong to the sample: what takes the place of an encoder's norms for one forward pass.

A bound norm is a copy of the encoder's own: its class, with a mixin in front; its buffers, hooks and options; and its
`rows`. What it is called on leads with B, or with a multiple of B in which each sample's pieces lie together, as
windows and unfolded patches do.

BatchNorm: in training the statistics are those of the whole mixed batch (of all processes, for SyncBatchNorm), and
running statistics are one moving average for all tasks; in evaluation they are the running statistics.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from timm import layers
from timm.models import metaformer
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce

from hyperclip_fast.hyper_block import norm_dtype
from hyperclip_fast.kernels.batch_norm import batch_norm_act, batch_norm_act_train
from hyperclip_fast.kernels.batch_norm.mixed import is_flat
from hyperclip_fast.kernels.layer_norm import layer_norm
from hyperclip_fast.utils.private_api import (
    AnyBatchNorm,
    BatchNorm,
    has_hooks,
    own_buffers,
    own_children,
    own_parameters,
    set_own,
    shallow_copy,
)


class Rows(NamedTuple):
    """What a norm is given for one batch.

    Args:
        weight: (T, D), or (D,): one row for all.
        bias: as the weight, or None for a norm without.
        task_ids: (B,) row of each sample, or None: row b for sample b.
        batch: B.
    """

    weight: Tensor
    bias: Tensor | None
    task_ids: Tensor | None
    batch: int

    def pieces(self, x: Tensor) -> int:
        """How many consecutive entries of x's first dimension belong to each sample.

        Raises:
            ValueError: if B does not divide that dimension.
        """
        pieces = x.shape[0] // max(self.batch, 1)
        if pieces * self.batch != x.shape[0]:
            raise ValueError(f"a norm's input must lead with a multiple of B = {self.batch}, got {tuple(x.shape)}")
        return pieces

    def of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, bias and task ids for every entry of x's first dimension."""
        weight, bias, task_ids = self.weight, self.biases(), self.task_ids
        pieces = self.pieces(x)
        if pieces == 1:
            return weight, bias, task_ids
        if task_ids is None:
            return weight.repeat_interleave(pieces, 0), bias.repeat_interleave(pieces, 0), None
        return weight, bias, task_ids.repeat_interleave(pieces)

    def biases(self) -> Tensor:
        """(T, D): zeros for a norm without."""
        return torch.zeros_like(self.weight) if self.bias is None else self.bias


class LayerRows(nn.Module):
    """LayerNorm over the last dimension, or over channels (B, D, H, W)."""

    channels_first = False
    stock: type[nn.Module]
    rows: Rows
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_first:
            return self._norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        rows = self.rows
        dtype = x.dtype if self.stock in (layers.LayerNormFp32, layers.LayerNorm2dFp32) else norm_dtype(self, x)
        # each sample's pieces lie together, so they are so many more tokens of it
        tokens = x.unflatten(0, (rows.batch, rows.pieces(x))).flatten(1, -2)
        return layer_norm(tokens, rows.weight, rows.biases(), rows.task_ids, self.eps, dtype).view(x.shape)


class AffineRows(nn.Module):
    """Any other norm: the stock one as if not affine, each sample's weight and bias, then its activation."""

    channels_first = False
    stock: type[nn.Module]
    rows: Rows

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, task_ids = self.rows.of(x)
        if task_ids is not None:
            weight, bias = weight[task_ids], bias[task_ids]
        shape = [x.shape[0]] + [1] * (x.dim() - 1)
        shape[1 if self.channels_first else -1] = weight.shape[1]
        normed = self._normed(x)
        out = torch.addcmul(bias.view(shape), normed, weight.view(shape))
        return apply_drop_and_act(self, out.to(normed.dtype))

    def _normed(self, x: Tensor) -> Tensor:
        """The stock norm with weights 1 and biases 0: without them its dtype may be another, its kernel a slow one."""
        bare, own = shallow_copy(self, self.stock), own_parameters(self).items()
        neutral = {name: None if p is None else torch.full_like(p, name == "weight") for name, p in own}
        set_own(bare, neutral, dict.fromkeys(own_children(self), _IDENTITY))  # dropout and activation come later
        return bare.forward(x)


class GroupRows(AffineRows):
    """GroupNorm over (B, D, ...); where channels are contiguous, one GroupNorm over (1, B * D, ...) does all of it."""

    num_groups: int
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows
        if torch.compiler.is_compiling() or not x.is_contiguous() or not x.numel() or rows.task_ids is not None:
            return super().forward(x)
        weight, bias, _ = rows.of(x)
        wide, groups = x.view(1, -1, *x.shape[2:]), x.shape[0] * self.num_groups
        out = nn.functional.group_norm(wide, groups, weight.reshape(-1), bias.reshape(-1), self.eps)
        return apply_drop_and_act(self, out.view(x.shape))


class BatchRows(nn.Module):
    """BatchNorm over (B, D), (B, D, L) or (B, D, H, W), with the activation that timm keeps in it."""

    rows: Rows
    eps: float
    momentum: float | None
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor
    process_group: distributed.ProcessGroup | None  # of SyncBatchNorm
    flat: tuple[Any, ...] | None = None  # arguments of torch.batch_norm behind the input

    def forward(self, x: Tensor) -> Tensor:
        flat = self.flat
        wide = None if flat is None else self._wide(x)
        if flat is not None and wide is not None:
            out = torch.batch_norm(wide, *flat)
            return apply_drop_and_act(self, out if wide is x else out.view(x.shape))
        images, rows, act = _as_images(x), self.rows.of(x), _act_name(self)
        if not self.training and self.running_mean is not None and self.running_var is not None:
            out = batch_norm_act(images, *rows, self.running_mean, self.running_var, self.eps, act or "none")
        else:
            out = self._by_batch(images, rows, act or "none")
        out = out if x.dim() == 4 else out.view(x.shape)
        return apply_drop_and_act(self, out) if act is None else out

    def _wide(self, x: Tensor) -> Tensor | None:
        """What `flat` normalises: x for one row, else images seen as (1, B * D, H, W); None where they cannot be."""
        if self.rows.weight.dim() == 1:
            return x
        images = _as_images(x)
        is_wide = is_flat(images) and images.shape[0] == self.rows.batch
        return images.view(1, -1, *images.shape[2:]) if is_wide else None

    def _by_batch(self, x: Tensor, rows: tuple[Tensor, Tensor, Tensor | None], act: str) -> Tensor:
        count: int | Tensor = x.numel() // x.shape[1]
        if _is_synchronized(self):
            normed, mean, var, count = synchronized(x, self.process_group, self.eps)
            out = batch_norm_act(normed, *rows, torch.zeros_like(mean), torch.ones_like(var), 0.0, act)
        else:
            out, mean, var = batch_norm_act_train(x, *rows, self.eps, act)
        if self.training and self.track_running_stats:
            self._follow(mean, var, count)
        return out

    def _follow(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """The running statistics, as PyTorch's BatchNorm moves them."""
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            unbiased = var * (count / (count - 1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                if running is not None:
                    running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)


def synchronized(
    x: Tensor, group: distributed.ProcessGroup | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, D, H, W) normalised by the statistics of all processes' batches, through which gradients flow.

    Args:
        x: this process's part.
        group: the processes; None: all.
        eps: added to the variance.

    Returns:
        x normalised; mean (D,) and biased variance (D,), without a gradient; how many values a channel had.
    """
    group = distributed.group.WORLD if group is None else group
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    ones = wide.new_full((1,), x.numel() // x.shape[1])
    totals = all_reduce(torch.cat([wide.sum((0, 2, 3)), ones]), group=group)
    mean, count = totals[:-1] / totals[-1], totals[-1].detach()
    centred = wide - mean[:, None, None]
    var = all_reduce(centred.square().sum((0, 2, 3)), group=group) / count
    normed = centred * torch.rsqrt(var + eps)[:, None, None]
    return normed.to(x.dtype), mean.detach(), var.detach(), count


def _is_synchronized(norm: nn.Module) -> bool:
    """Whether a BatchNorm's statistics are those of all processes."""
    return isinstance(norm, nn.SyncBatchNorm) and norm.training and distributed.is_initialized()


def _act_name(norm: nn.Module) -> str | None:
    """The kernel's name of what follows a BatchNorm in the same module; None: `apply_drop_and_act` runs it."""
    drop, act = own_children(norm).get("drop"), own_children(norm).get("act")
    if act is None and drop is None:
        return "none"
    is_plain = type(drop) in (nn.Identity, type(None)) and act is not None and not has_hooks(act)
    if not is_plain or getattr(act, "approximate", "none") != "none":
        return None
    return _ACTS.get(type(act))


def apply_drop_and_act(norm: nn.Module, x: Tensor) -> Tensor:
    """What timm keeps behind a norm in the same module: dropout and activation."""
    for part in (own_children(norm).get("drop"), own_children(norm).get("act")):
        x = x if part is None else part(x)
    return x


def use_local_statistics(norm: nn.Module) -> None:
    """Make a SyncBatchNorm the BatchNorm of this process alone, in place; another norm stays as it is."""
    norm.__class__ = _LOCAL.get(type(norm), type(norm))


def bind_rows(norm: nn.Module, rows: Rows, is_plain: bool = False) -> nn.Module:
    """A norm's copy for one forward pass in which each sample has its own weight and bias.

    One row for all is the stock norm with that row, bit for bit; but PyTorch has no SyncBatchNorm for a CPU. A
    forward hook sees the encoder's parameters and, beside them, `rows`; for one row, unless `is_plain`, the stock norm.

    Args:
        norm: the encoder's own.
        rows: what it is given.
        is_plain: `precompute_affine` comes next.
    """
    is_shared = rows.weight.dim() == 1
    if is_shared and _is_synchronized(norm) and rows.weight.device.type == "cpu":
        task_ids = torch.zeros(rows.batch, dtype=torch.int64)
        rows, is_shared = Rows(rows.weight[None], rows.biases()[None], task_ids, rows.batch), False
    if is_shared and not (is_plain and isinstance(norm, BatchNorm) and _statistics(norm)):
        twin = shallow_copy(norm, type(norm))
        set_own(twin, {**own_parameters(norm), "weight": rows.weight, "bias": rows.bias})
        return twin
    twin = shallow_copy(norm, ROW_NORMS[type(norm)])
    twin.__dict__["rows"] = rows
    return twin


def precompute_affine(twins: Iterable[nn.Module]) -> None:
    """In evaluation without gradients on a CPU: gives bound BatchNorms what PyTorch's kernel reads.

    Rows are one for all, or row b for sample b. Those become one scale and one shift, and images are seen as
    (1, B * D, H, W). All is made before the first layer runs: small tensors made between the large ones would break up
    the memory that those use again and again.
    """
    found = [(norm, *kept) for norm in twins if isinstance(norm, BatchRows) and (kept := _statistics(norm))]
    if not found:
        return
    if found[0][0].rows.weight.dim() == 1:
        for norm, mean, var in found:
            rows = norm.rows
            norm.__dict__["flat"] = (rows.weight, rows.biases(), mean, var, False, 0.0, norm.eps, False)
        return
    rstds = _rstds([var for _, _, var in found], [norm.eps for norm, _, _ in found])
    longest = max(norm.rows.weight.numel() for norm, _, _ in found)
    zeros, ones = rstds[0].new_zeros(longest), rstds[0].new_ones(longest)
    for (norm, mean, _), rstd in zip(found, rstds):
        scale = norm.rows.weight * rstd
        shift = torch.addcmul(norm.rows.biases(), scale, mean, value=-1.0).view(-1)
        size = shift.shape[0]
        norm.__dict__["flat"] = (scale.view(-1), shift, zeros[:size], ones[:size], False, 0.0, 0.0, False)


def _rstds(variances: Sequence[Tensor], eps: Sequence[float]) -> Sequence[Tensor]:
    """1 / sqrt(running variance + eps) of each norm, float32 or wider."""
    sizes = [var.shape[0] for var in variances]
    var = torch.cat(list(variances))
    var = var.to(torch.promote_types(var.dtype, torch.float32))
    added = eps[0] if len(set(eps)) == 1 else var.new_tensor(eps).repeat_interleave(torch.tensor(sizes))
    return torch.rsqrt(var + added).split(sizes)


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and variance that a BatchNorm keeps and, in evaluation, uses; None where it uses the batch's."""
    mean, var = own_buffers(norm)["running_mean"], own_buffers(norm)["running_var"]
    return None if norm.training or mean is None or var is None else (mean, var)


def _as_images(x: Tensor) -> Tensor:
    """(B, D), (B, D, L) or (B, D, H, W) as the last."""
    return x if x.dim() == 4 else x.view(*x.shape, *[1] * (4 - x.dim()))


_LOCAL: dict[type[nn.Module], type[nn.Module]] = {
    nn.SyncBatchNorm: AnyBatchNorm,
    layers.SyncBatchNormAct: layers.BatchNormAct2d,
}
_IDENTITY = nn.Identity()
_ACTS = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hard_swish",
    nn.GELU: "gelu",
    layers.GELU: "gelu",
}
_KINDS = {  # (mixin, channels first): stock classes
    (BatchRows, True): "nn.BatchNorm1d nn.BatchNorm2d nn.SyncBatchNorm BatchNormAct2d SyncBatchNormAct",
    (GroupRows, True): "nn.GroupNorm GroupNorm GroupNorm1 GroupNormAct GroupNorm1Act metaformer.GroupNorm1NoBias",
    (LayerRows, False): "nn.LayerNorm LayerNorm LayerNormFp32 metaformer.LayerNormNoBias",
    (LayerRows, True): "LayerNorm2d LayerNorm2dFp32 metaformer.LayerNorm2dNoBias",
    (AffineRows, False): "nn.RMSNorm RmsNorm RmsNormFp32 RmsNormAct RmsNormActFp32 SimpleNorm SimpleNormFp32 "
    "LayerNormAct LayerNormActFp32",
    (AffineRows, True): "RmsNorm2d RmsNorm2dFp32 RmsNormAct2d RmsNormAct2dFp32 SimpleNorm2d SimpleNorm2dFp32 "
    "LayerNormAct2d LayerNormAct2dFp32",
}


def _row_norms() -> dict[type[nn.Module], type[nn.Module]]:
    """Stock class: class of its bound copies."""
    found = {}
    for (mixin, first), names in _KINDS.items():
        for name in names.split():
            home, _, kind = name.rpartition(".")
            stock = getattr({"nn": nn, "metaformer": metaformer}.get(home, layers), kind)
            fields = {"stock": stock, "channels_first": first}
            found[stock] = type(f"Row{stock.__name__}", (mixin, stock), fields)
    return found


ROW_NORMS = _row_norms()
