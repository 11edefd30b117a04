"""HyperEncoder: any timm model in which every sample brings its own normalisation weights.

Modules, their names and the state dict are timm's own: only the root's class changes. A forward pass with rows runs on
a bound copy of the module tree, made for this call: the path from the root to each modulated norm is copied, a few
entries of a dictionary a module, and the norms' copies hold their rows (modulated_norms.py). Everything else is shared.
So rows are never state of the encoder: threads and interleaved passes cannot mix, an exception leaves nothing behind,
and gradient checkpointing runs the same copy again in backward, rows included.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from hyperclip_fast.hyper_vit import HyperViT
from hyperclip_fast.kernels.dispatch import is_traced, use_triton
from hyperclip_fast.modulated_norms import (
    ROW_NORMS,
    Rows,
    bind_rows,
    precompute_affine,
    use_local_statistics,
)
from hyperclip_fast.norm_params import NormParams, NormSpec, check_params
from hyperclip_fast.utils.private_api import (
    BatchNorm,
    forget_compiled,
    own_children,
    own_parameters,
    set_own,
    shallow_copy,
)
from hyperclip_fast.utils.timm_models import create_timm_model

EVERY_NORM = ("*",)
Path = dict[str, "Path | int"]  # names of children that hold modulated norms; a norm's place in the spec


class HyperEncoder(nn.Module):
    """A timm model whose forward also takes NormParams: a row of norm weights for each sample.

    Made by `from_timm`; its class is also the timm model's own. `forward_features`, `forward_head` and
    `forward_intermediates` take `params` where the timm model has them.
    """

    _is_frozen = False
    _stock: Any  # the timm model's class
    _spec: NormSpec
    _path: Path

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        modulate: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> "HyperEncoder":
        """A HyperEncoder with the modules and weights of a timm model.

        Args:
            model: a timm model name (with a pretrained tag, if wished) or a model, which is copied.
            pretrained: load timm's pretrained weights (for a name).
            modulate: fnmatch patterns: which norms are generated; None: every norm with affine parameters.
            **kwargs: passed to timm.create_model, such as num_classes, drop_path_rate.

        Raises:
            ValueError: for a name that timm does not know, or a pattern that matches no norm.
        """
        return to_hyper_encoder(create_timm_model(model, pretrained, kwargs), modulate)

    def set_modulate(self, modulate: Iterable[str]) -> None:
        """Choose the generated norms by name pattern.

        Raises:
            ValueError: if a pattern matches no norm with affine parameters, or there is none.
        """
        modulate, norms = tuple(modulate), dict(_affine_norms(self))
        if not norms:
            wanted = "model must have a norm with weights, of a class that rows modulate"
            raise ValueError(f"{wanted} (docs/encoders.md lists them), got {self._stock.__name__} without one")
        for pattern in modulate or ("",):
            if not fnmatch.filter(norms, pattern):
                raise ValueError(f"modulate must match norms of {self._stock.__name__}, got {pattern!r}")
        norms = {n: m for n, m in norms.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in modulate)}
        widths = tuple(self.get_parameter(f"{name}.weight").shape[0] for name in norms)
        biases = tuple(own_parameters(norm).get("bias") is not None for norm in norms.values())
        self._spec = NormSpec(tuple(norms), widths, modulate, biases)
        self._path = _path(self, {norm: i for i, norm in enumerate(norms.values())})

    @property
    def norm_spec(self) -> NormSpec:
        """The generated norms: names, widths, offsets; `norm_spec.num_params` is P."""
        return self._spec

    @property
    def base_params(self) -> NormParams:
        """The encoder's own weights and biases as one row; gradients flow into them."""
        row = torch.cat([attrgetter(key)(self) for key in self._spec.keys])  # functional_call puts plain tensors there
        return NormParams(self._spec, row.unsqueeze(0))

    def forward(self, x: Tensor, params: NormParams | None = None, **kwargs: Any) -> Any:
        """Images (B, C, H, W) to what the timm model returns.

        Args:
            x: images.
            params: rows for this batch, see NormParams; None: the encoder's own norms, which is the stock model.
            **kwargs: of the timm model's `forward`.

        Raises:
            ValueError: if `params` belongs to another encoder or another batch size.
        """
        return self._stock.forward(self._bound(x, params), x, **kwargs)

    def _bound(self, x: Tensor, params: NormParams | None) -> nn.Module:
        """The model that runs a batch: this one, or its copy with each sample's rows."""
        if params is None:
            return self
        check_params(params, self._spec, x.shape[0])
        spec, table, task_ids = self._spec, params.table, params.task_ids  # its integers are static: a module's own
        table = table.to(attrgetter(spec.keys[0])(self).dtype)
        fused = use_triton(x)
        if task_ids is not None and table.shape[0] > 1 and not fused:
            table, task_ids = table.index_select(0, task_ids), None
        is_plain = table.device.type == "cpu" and not fused and not is_traced() and not torch.is_grad_enabled()
        pieces = iter(table[0].split(spec.sizes) if table.shape[0] == 1 else table.split(spec.sizes, dim=1))
        rows = [Rows(next(pieces), next(pieces) if bias else None, task_ids, x.shape[0]) for bias in spec.biases]
        binding = _Binding(rows, is_plain)
        model = binding.bind(self, self._stock, self._path)
        if is_plain:
            precompute_affine(binding.twins)
        return model

    def train(self, mode: bool = True) -> "HyperEncoder":
        """timm's `train`; frozen BatchNorms stay in evaluation."""
        super().train(mode)
        for module in self.modules() if self._is_frozen else ():
            if isinstance(module, BatchNorm):
                module.eval()
        return self

    def freeze_statistics(self, is_frozen: bool = True) -> None:
        """Whether BatchNorms keep to their running statistics while the rest trains; weights and rows train on."""
        self._is_frozen = is_frozen
        self.train(self.training)

    def reestimate(self, images: Tensor | Iterable[Tensor], params: NormParams) -> NormParams:
        """The row of a task whose BatchNorms use the statistics of its own unlabelled images.

        Statistics travel in the row: by them, weight and bias are rewritten for the running statistics that the encoder
        shares, so that the new row goes wherever a row goes. They are this process's, for SyncBatchNorm, too.

        Args:
            images: (B, C, H, W), or batches of them, whose statistics are averaged.
            params: the task's row, T = 1.

        Raises:
            ValueError: for more rows than one, no images, or an encoder without modulated BatchNorm.
        """
        return reestimated(self, [images] if isinstance(images, Tensor) else images, params)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm leaves without weight decay."""
        return self._stock.no_weight_decay(self) if hasattr(self._stock, "no_weight_decay") else set()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        """Pickled by the timm model's class: this one's own is made when it is needed."""
        return _blank, (self._stock,), self.__dict__


def _forward_features(self, x: Tensor, params: NormParams | None = None, **kwargs: Any) -> Any:
    """timm's `forward_features`, its arguments included; `params` gives each sample's norm rows."""
    return self._stock.forward_features(self._bound(x, params), x, **kwargs)


def _forward_head(self, x: Tensor, *args: Any, params: NormParams | None = None, **kwargs: Any) -> Any:
    """timm's `forward_head`, its arguments included; `params` matters where the head holds a norm."""
    return self._stock.forward_head(self._bound(x, params), x, *args, **kwargs)


def _forward_intermediates(self, x: Tensor, *args: Any, params: NormParams | None = None, **kwargs: Any) -> Any:
    """timm's `forward_intermediates`, its arguments included, with `params`."""
    return self._stock.forward_intermediates(self._bound(x, params), x, *args, **kwargs)


_METHODS: dict[str, Callable] = {
    "forward_features": _forward_features,
    "forward_head": _forward_head,
    "forward_intermediates": _forward_intermediates,
}


@cache
def _encoder_class(stock: type[nn.Module]) -> type[HyperEncoder]:
    """HyperEncoder of a timm class, with those of timm's methods that it has."""
    methods = {name: method for name, method in _METHODS.items() if hasattr(stock, name)}
    return type(f"Hyper{stock.__name__}", (HyperEncoder, stock), {**methods, "_stock": stock})


def _blank(stock: type[nn.Module]) -> HyperEncoder:
    """What unpickling fills."""
    return object.__new__(_encoder_class(stock))  # type: ignore[arg-type]  # as in to_hyper_encoder


class _Binding:
    """What `bind` reads and leaves in one call.

    Args:
        rows: of the norms, in the spec's order.
        is_plain: see `bind_rows`.
    """

    def __init__(self, rows: list[Rows], is_plain: bool):
        self.rows, self.is_plain = rows, is_plain
        self.twins: list[nn.Module] = []  # the norms' copies

    def bind(self, module: nn.Module, kind: type[nn.Module], path: Path) -> nn.Module:
        """A module's copy of class `kind` whose modulated norms hold their rows; what has none is shared."""
        twin = shallow_copy(module, kind)
        forget_compiled(twin)
        children = own_children(module).copy()
        set_own(twin, children=children)
        for name, place in path.items():
            child = children[name]
            if child is None:
                continue
            if "forward" in child.__dict__:
                raise ValueError(f"params cannot pass {name} ({type(child).__name__}), whose forward was replaced")
            children[name] = (
                self._bound(child, place) if isinstance(place, int) else self.bind(child, type(child), place)
            )
        return twin

    def _bound(self, norm: nn.Module, place: int) -> nn.Module:
        twin = bind_rows(norm, self.rows[place], self.is_plain)
        self.twins.append(twin)
        return twin


def _path(module: nn.Module, places: dict[nn.Module, int]) -> Path:
    """The way from a module to the norms in it, which may be more than one to the same."""
    children = ((name, child) for name, child in own_children(module).items() if child is not None)
    steps = ((name, places[child] if child in places else _path(child, places)) for name, child in children)
    return {name: step for name, step in steps if step != {}}


@torch.no_grad()
def reestimated(encoder: HyperEncoder, batches: Iterable[Tensor], params: NormParams) -> NormParams:
    """See `HyperEncoder.reestimate`."""
    check_params(params, encoder.norm_spec, 1)
    model = copy.deepcopy(encoder).eval()
    model.load_state_dict(params.state_dict(0), strict=False)
    modules = {name: model.get_submodule(name) for name in encoder.norm_spec.names}
    norms = {name: norm for name, norm in modules.items() if isinstance(norm, BatchNorm)}
    if not norms:
        raise ValueError(f"params must be rows of an encoder with BatchNorm, got one of {encoder._stock.__name__}")
    for norm in norms.values():
        use_local_statistics(norm)
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    count = sum(model(images) is not None for images in batches)
    if not count:
        raise ValueError("images must hold at least one batch, got none")
    row = params.state_dict(0)
    for name, norm in norms.items():
        mean, var, shared_mean, shared_var = (
            each.get_buffer(f"{name}.{statistic}").double()
            for each in (model, encoder)
            for statistic in ("running_mean", "running_var")
        )
        scale = norm.weight.double() / (var + norm.eps).sqrt()
        shift = norm.bias.double() - mean * scale
        row[f"{name}.weight"] = (scale * (shared_var + norm.eps).sqrt()).to(params.table.dtype)
        row[f"{name}.bias"] = (shift + shared_mean * scale).to(params.table.dtype)
    return NormParams(params.spec, params.spec.row(row).unsqueeze(0))


def _affine_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Norms with a weight vector that can be modulated."""
    for name, module in model.named_modules():
        weight = own_parameters(module).get("weight")
        if type(module) in ROW_NORMS and weight is not None and weight.dim() == 1:
            yield name, module


def to_hyper_encoder(model: nn.Module, modulate: Iterable[str] | None) -> HyperEncoder:
    """Change the class of a timm model, in place."""
    if isinstance(model, HyperViT):
        raise ValueError("model must be a timm model, got a HyperViT, which takes params already")
    if not isinstance(model, HyperEncoder):
        model.__class__ = _encoder_class(type(model))  # type: ignore[arg-type]  # mypy checks an instance's hash
    assert isinstance(model, HyperEncoder)
    model.set_modulate(EVERY_NORM if modulate is None else modulate)
    return model
