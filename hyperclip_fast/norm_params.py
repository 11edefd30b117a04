"""Rows of normalisation parameters, and which row each sample uses.

A row holds what every modulated layer's `weight` and `bias` would be, layer after layer: [w_0, b_0, w_1, b_1, ...]; a
layer without a bias, such as RMSNorm, has its weight there alone. NormSpec says which layers and how wide; NormParams
holds the table (T, P) of T rows and the batch's task ids.
"""

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from hyperclip_fast.utils.files import load_safetensors, save_safetensors
from hyperclip_fast.utils.private_api import GetAttrKey, register_pytree_node

DEFAULT_MODULATE = ("blocks.*.norm1", "blocks.*.norm2", "norm", "fc_norm")


@dataclass(frozen=True)
class NormSpec:
    """Which norm layers of an encoder are generated, and their widths: the columns of a row.

    Args:
        names: module names of the layers, in the encoder's order.
        widths: D of each layer.
        modulate: the name patterns (fnmatch) that chose them.
        biases: whether each layer has a bias; empty: all have.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    modulate: tuple[str, ...] = field(default=DEFAULT_MODULATE, compare=False)
    biases: tuple[bool, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "widths", tuple(int(width) for width in self.widths))
        object.__setattr__(self, "modulate", tuple(self.modulate))
        object.__setattr__(self, "biases", tuple(map(bool, self.biases)) or (True,) * len(self.names))
        if len(self.names) != len(self.widths):
            raise ValueError(f"widths must have one entry a name, got {len(self.widths)} for {len(self.names)} names")
        if len(self.biases) != len(self.names):
            raise ValueError(f"biases must have one entry a name, got {len(self.biases)} for {len(self.names)} names")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be unique, got {self.names}")
        if any(width < 1 for width in self.widths):
            raise ValueError(f"widths must be positive, got {self.widths}")
        for name in (
            "keys",
            "sizes",
            "layer_sizes",
            "offsets",
            "num_params",
        ):  # now: up to Python 3.11 cached_property takes a lock, which
            getattr(self, name)  # torch.compile cannot trace

    @classmethod
    def from_model(cls, model: torch.nn.Module, modulate: Iterable[str] = DEFAULT_MODULATE) -> "NormSpec":
        """The layers of `model` whose name matches a pattern and which have a weight and a bias vector.

        Raises:
            ValueError: if no layer matches, or one that matches has no affine parameters.
        """
        modulate = tuple(modulate)
        found = {
            name: module
            for name, module in model.named_modules()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in modulate)
            and not isinstance(module, torch.nn.Identity)
        }
        if not found:
            raise ValueError(f"modulate must match a norm layer of {type(model).__name__}, got {modulate}")
        for name, module in found.items():
            if getattr(module, "weight", None) is None or getattr(module, "bias", None) is None:
                raise ValueError(f"modulate: {name} ({type(module).__name__}) must have a weight and a bias")
        return cls(tuple(found), tuple(module.weight.shape[0] for module in found.values()), modulate)

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, torch.Tensor], modulate: Iterable[str] = DEFAULT_MODULATE
    ) -> "NormSpec":
        """The layers of a state dict whose name matches a pattern, in its order.

        Raises:
            ValueError: if no layer matches, or one that matches lacks its weight or bias vector.
        """
        modulate = tuple(modulate)
        found = {key.removesuffix(".weight").removesuffix(".bias"): None for key in state_dict if "." in key}
        names = [name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in modulate)]
        if not names:
            raise ValueError(f"modulate must match a norm layer of the state dict, got {modulate}")
        widths = [getattr(state_dict.get(f"{name}.weight"), "shape", ())[-1:] for name in names]
        spec = cls(tuple(names), tuple(width[0] if width else 1 for width in widths), modulate)
        spec.row(state_dict)  # each is there, and a vector
        return spec

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """State-dict keys of the row's pieces: "<name>.weight" and, where there is one, "<name>.bias"."""
        kinds = (("weight", "bias") if bias else ("weight",) for bias in self.biases)
        return tuple(f"{name}.{kind}" for name, own in zip(self.names, kinds) for kind in own)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Widths of the row's pieces: [w_0, b_0, w_1, b_1, ...]."""
        return tuple(width for width, bias in zip(self.widths, self.biases) for _ in range(1 + bias))

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Columns of each layer: twice its width, or its width where it has no bias."""
        return tuple(width * (1 + bias) for width, bias in zip(self.widths, self.biases))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Column at which each layer's weight starts; its bias, if it has one, starts one width later."""
        return tuple(sum(self.layer_sizes[:i]) for i in range(len(self.widths)))

    @cached_property
    def num_params(self) -> int:
        """P: the length of a row."""
        return sum(self.layer_sizes)

    def row(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The row (P,) that a state dict holds, as "<name>.weight" and "<name>.bias".

        Raises:
            ValueError: if a tensor is missing or has another width.
        """
        pieces = []
        for key, width in zip(self.keys, self.sizes):
            piece = state_dict.get(key)
            if piece is None or piece.shape != (width,):
                got = "nothing" if piece is None else f"shape {tuple(piece.shape)}"
                raise ValueError(f"state_dict must hold {key} of shape ({width},), got {got}")
            pieces.append(piece)
        return torch.cat(pieces)

    def to_json(self) -> str:
        """This spec as JSON; `from_json` reads it back."""
        fields = {"names": self.names, "widths": self.widths, "modulate": self.modulate}
        return json.dumps(fields if all(self.biases) else {**fields, "biases": self.biases})

    @classmethod
    def from_json(cls, text: str) -> "NormSpec":
        """The spec that `to_json` wrote.

        Raises:
            ValueError: if the text is not such a spec.
        """
        try:
            fields = json.loads(text)
            return cls(fields["names"], fields["widths"], fields["modulate"], fields.get("biases", ()))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"text must be a NormSpec in JSON, got {text[:80]!r}") from error


class NormParams:
    """T rows of norm parameters, and the row that each sample of a batch uses.

    Args:
        spec: what the columns are.
        table: (T, P) floating point.
        task_ids: (B,) int64 or int32 (or a sequence of ints), row of each sample; None: one row for all (T = 1), or
            row b for sample b (T = B).

    Raises:
        ValueError: for another shape or dtype, or, where the ids are on the CPU, for an id outside [0, T).
    """

    def __init__(self, spec: NormSpec, table: torch.Tensor, task_ids: torch.Tensor | Sequence[int] | None = None):
        if table.dim() != 2 or table.shape[1] != spec.num_params:
            raise ValueError(f"table must be (T, P) with P = {spec.num_params}, got shape {tuple(table.shape)}")
        if not table.is_floating_point():
            raise ValueError(f"table must be floating point, got {table.dtype}")
        if task_ids is not None:
            task_ids = _check_task_ids(task_ids, table)
        self.spec, self.table, self.task_ids = spec, table, task_ids

    @property
    def num_tasks(self) -> int:
        """T: rows in the table."""
        return self.table.shape[0]

    @classmethod
    def from_state_dict(
        cls,
        *sources: torch.nn.Module | Mapping[str, torch.Tensor],
        spec: NormSpec | None = None,
        shared: torch.nn.Module | None = None,
    ) -> "NormParams":
        """One row of each fine-tuned model: rows need not come from a hypernetwork.

        Args:
            sources: models, or their state dicts, with the keys of the encoder.
            spec: which layers; None: those of `shared`, or those that DEFAULT_MODULATE finds in the first source.
            shared: the encoder that will serve the rows. A source holds the tensors of the rows alone, or all else
                exactly as the encoder's state dict: no key less or more, each equal, statistics and the head included.

        Raises:
            ValueError: for no source, one without a layer of the spec, or one whose other tensors are not `shared`'s.
        """
        if not sources:
            raise ValueError("sources must be at least one model or state dict, got none")
        dicts = [each.state_dict() if isinstance(each, torch.nn.Module) else each for each in sources]
        if spec is None and shared is not None:
            spec = getattr(shared, "norm_spec", None) or NormSpec.from_model(shared)
        spec = spec or NormSpec.from_state_dict(dicts[0])
        if shared is not None:
            for i, state_dict in enumerate(dicts):
                _check_shared(i, state_dict, shared, spec)
        return cls(spec, torch.stack([spec.row(state_dict).detach() for state_dict in dicts]))

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(weight (T, D_i), bias (T, D_i) or None) of every layer: views, by one split, whose backward is one cat."""
        pieces = iter(self.table.split(self.spec.sizes, dim=1))
        return [(next(pieces), next(pieces) if bias else None) for bias in self.spec.biases]

    def layer(self, i: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight (T, D_i), bias (T, D_i) or None) of layer i, views of the table."""
        start, width = self.spec.offsets[i], self.spec.widths[i]
        bias = self.table[:, start + width : start + 2 * width] if self.spec.biases[i] else None
        return self.table[:, start : start + width], bias

    def __getitem__(self, task_ids: torch.Tensor | Sequence[int]) -> "NormParams":
        """The same rows for another batch: no copy."""
        return NormParams(self.spec, self.table, task_ids)

    def gather(self) -> "NormParams":
        """Row b for sample b (a copy of the rows in use): how the reference path reads the table, once a forward."""
        if self.task_ids is None or self.num_tasks == 1:
            return self
        return NormParams(self.spec, self.table.index_select(0, self.task_ids))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "NormParams":
        """These rows on another device or in another floating point dtype."""
        task_ids = None if self.task_ids is None else self.task_ids.to(device)
        return NormParams(self.spec, self.table.to(device=device, dtype=dtype), task_ids)

    def state_dict(self, task: int = 0) -> dict[str, torch.Tensor]:
        """Row `task` as "<name>.weight" and "<name>.bias": what a stock model with that row holds."""
        pieces = self.table[task].split(self.spec.sizes)
        return {key: piece.detach().clone() for key, piece in zip(self.spec.keys, pieces)}

    def save(self, path: str | Path) -> None:
        """Write table, task ids and spec into one safetensors file (beside, then renamed)."""
        tensors = {"table": self.table.detach().cpu().contiguous()}
        if self.task_ids is not None:
            tensors["task_ids"] = self.task_ids.cpu().contiguous()
        save_safetensors(tensors, path, {"norm_spec": self.spec.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> "NormParams":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is not such a file, or is cut short.
        """
        tensors, metadata = load_safetensors(path)
        if "table" not in tensors or "norm_spec" not in metadata:
            raise ValueError(f"path must be a file of NormParams, got {path} with {sorted(tensors)}")
        return cls(NormSpec.from_json(metadata["norm_spec"]), tensors["table"], tensors.get("task_ids"))

    def __repr__(self) -> str:
        batch = "" if self.task_ids is None else f", B={len(self.task_ids)}"
        place = f"{self.table.dtype}, {self.table.device}"
        return f"NormParams(T={self.num_tasks}, P={self.spec.num_params}{batch}, {place})"


register_pytree_node(
    NormParams,
    lambda params: ([params.table, params.task_ids], params.spec),
    lambda leaves, spec: _unflatten(spec, *leaves),
    serialized_type_name="hyperclip_fast.NormParams",
    flatten_with_keys_fn=lambda params: (
        [(GetAttrKey("table"), params.table), (GetAttrKey("task_ids"), params.task_ids)],
        params.spec,
    ),
    to_dumpable_context=lambda spec: spec.to_json(),
    from_dumpable_context=NormSpec.from_json,
)


def _unflatten(spec: NormSpec, table, task_ids) -> NormParams:
    """Pytree leaves may be anything (fake tensors, None, axes): no checks."""
    params = NormParams.__new__(NormParams)
    params.spec, params.table, params.task_ids = spec, table, task_ids
    return params


def _check_shared(i: int, state_dict: Mapping[str, torch.Tensor], shared: torch.nn.Module, spec: NormSpec) -> None:
    """Raise ValueError where a source's tensors beyond the rows differ from the encoder's: one encoder serves them."""
    ours = {key: tensor for key, tensor in shared.state_dict().items() if key not in spec.keys}
    theirs = {key: tensor for key, tensor in state_dict.items() if key not in spec.keys}
    for key in {**ours, **theirs} if theirs else ():
        if key in ours and key in theirs and torch.equal(theirs[key].to(ours[key]), ours[key]):
            continue
        where = "" if key in ours and key in theirs else f" ({'it' if key in ours else 'the encoder'} has none)"
        raise ValueError(
            f"sources must differ from the shared encoder in its norms only, source {i} does in {key}{where}"
        )


def _check_task_ids(task_ids: torch.Tensor | Sequence[int], table: torch.Tensor) -> torch.Tensor:
    """Task ids as a (B,) integer tensor on the table's device; the range is checked where that costs no device sync."""
    if not isinstance(task_ids, torch.Tensor):
        task_ids = torch.as_tensor(task_ids)
        task_ids = task_ids if task_ids.numel() else task_ids.long()  # an empty list has no dtype of its own
    if task_ids.dim() != 1:
        raise ValueError(f"task_ids must be (B,), got shape {tuple(task_ids.shape)}")
    if task_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"task_ids must be int64 or int32, got {task_ids.dtype}")
    if task_ids.device.type == "cpu" and not torch.compiler.is_compiling() and task_ids.numel():
        low, high = torch.aminmax(task_ids)
        if low < 0 or high >= table.shape[0]:
            wrong = int(low) if low < 0 else int(high)
            raise ValueError(f"task_ids must lie in [0, T) with T = {table.shape[0]}, got {wrong}")
    return task_ids.to(table.device)


def check_params(params: object, spec: NormSpec, batch: int, fits: Callable[[NormSpec], bool] | None = None) -> None:
    """Raise ValueError unless `params` are rows of an encoder for a batch.

    Args:
        params: what the encoder was given.
        spec: the encoder's own.
        batch: images in the batch.
        fits: whether rows of another spec serve the encoder, too; None: only its own do.
    """
    if not isinstance(params, NormParams):
        raise ValueError(f"params must be NormParams, got {type(params).__name__}")
    # the encoder's spec is read first, so that torch.compile sees a module's integers: static ones
    if spec != params.spec and not (fits is not None and fits(params.spec)):
        raise ValueError(
            f"params must follow this encoder's spec, {len(spec.names)} layers and P = {spec.num_params}, "
            f"got {len(params.spec.names)} layers and P = {params.spec.num_params}"
        )
    rows = params.num_tasks if params.task_ids is None else params.task_ids.shape[0]
    if rows != batch and not (params.task_ids is None and rows == 1):
        raise ValueError(f"params must be for a batch of {batch} images, got rows for {rows}")
