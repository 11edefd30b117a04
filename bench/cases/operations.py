"""The operations that have kernels here, and who else computes them: one registry, `OPERATIONS`.

A provider is a function of the inputs that it names. Those that name `task_ids` compute the per-sample operation; the
others the plain one, by the first row alone: the stock layer, and `single`, our operation on a batch of one task.
`naive` in float64 is what the former must equal, `stock` in float64 the latter.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperclip_fast import get_backend, set_backend
from hyperclip_fast.bench.harness.mixes import make_task_ids
from hyperclip_fast.bench.harness.runner import Unavailable
from hyperclip_fast.kernels.batch_norm import functional as batch_norms
from hyperclip_fast.kernels.layer_norm import functional as norms
from hyperclip_fast.kernels.linear import functional as products
from hyperclip_fast.kernels.norm_linear import functional as norm_products

EPS = 1e-6
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement, and what kind of tensors."""

    batch: int
    tokens: int
    width: int
    tasks: int
    mix: str
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Operation:
    """An operation: how its inputs are made, who computes it, what it must move and compute.

    Args:
        inputs: all tensors that a provider may name.
        providers: functions by name, `stock` among them, and `naive` where rows belong to samples.
        work: (the inputs a provider names, whether it is a training step) -> (bytes, FLOP), the least possible.
        tests: the test file that proves our kernel.
        eager_only: providers that torch.compile cannot or need not trace.
    """

    inputs: Callable[[Shape], Inputs]
    providers: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    work: Callable[[Inputs, bool], tuple[int, int]]
    tests: str
    eager_only: tuple[str, ...] = ()

    @property
    def is_modulated(self) -> bool:
        """Whether tasks and mixes matter."""
        return "naive" in self.providers

    def named_inputs(self, provider: str, inputs: Inputs) -> Inputs:
        """The inputs that a provider's function names."""
        return {name: inputs[name] for name in inspect.signature(self.providers[provider]).parameters}

    def exact(self, provider: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """What `provider` must equal in float64."""
        names = inspect.signature(self.providers[provider]).parameters
        return self.providers["naive" if "task_ids" in names else "stock"]


def _norm_inputs(shape: Shape) -> Inputs:
    options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
    x, delta = (torch.randn(shape.batch, shape.tokens, shape.width, **options) for _ in range(2))
    weight = 1 + 0.1 * torch.randn(shape.tasks, shape.width, **options)
    bias = 0.1 * torch.randn(shape.tasks, shape.width, **options)
    rows = {"weight": weight, "bias": bias, "row_weight": weight[0].clone(), "row_bias": bias[0].clone()}
    return {"x": x, "delta": delta, **rows, "task_ids": make_task_ids(shape.mix, shape.batch, shape.tasks).to(x.device)}


def _norm_work(inputs: Inputs, training: bool) -> tuple[int, int]:
    """Forward reads x (and delta) and the rows in use, and writes out (and total). Backward reads d out (and d total)
    and x or total, and writes d x, which d delta shares; and all T rows of d weight and d bias, unused ones as zero.
    """
    x, ids = inputs["x"], inputs.get("task_ids")
    tasks = 1 if ids is None else inputs["weight"].shape[0]
    row = x.shape[-1] * (inputs["row_weight"] if ids is None else inputs["weight"]).element_size()
    used = 1 if ids is None else len(ids.unique())
    streams, stream = (4 if "delta" in inputs else 2), x.numel() * x.element_size()
    moved = streams * stream + 2 * used * row
    flops = (8 + ("delta" in inputs)) * x.numel()  # mean 1, variance 3, normalise 2, modulate 2
    if training:
        moved += (4 if "delta" in inputs else 3) * stream + used * row + 2 * tasks * row
        flops += 16 * x.numel()  # x-hat 2, d weight and d bias 3, d x-hat 1, two sums 3, d x 7
    return moved, flops


def _stock_layer_norm(x, row_weight, row_bias):
    return F.layer_norm(x, row_weight.shape, row_weight, row_bias, EPS)


def _naive_layer_norm(x, weight, bias, task_ids):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * weight[task_ids].unsqueeze(1) + bias[task_ids].unsqueeze(1)


def _our_layer_norm(x, weight, bias, task_ids):
    return norms.layer_norm(x, weight, bias, task_ids, EPS)


def _single_layer_norm(x, row_weight, row_bias):
    return norms.layer_norm(x, row_weight.unsqueeze(0), row_bias.unsqueeze(0), None, EPS)


def _liger_layer_norm(x, row_weight, row_bias):
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("not installed: pip install liger-kernel")
    if not x.is_cuda:
        raise Unavailable("Liger's kernels need a GPU")
    return importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply(
        x, row_weight, row_bias, EPS
    )


def _stock_add_layer_norm(x, delta, row_weight, row_bias):
    total = x + delta
    return _stock_layer_norm(total, row_weight, row_bias), total


def _naive_add_layer_norm(x, delta, weight, bias, task_ids):
    total = x + delta
    return _naive_layer_norm(total, weight, bias, task_ids), total


def _our_add_layer_norm(x, delta, weight, bias, task_ids):
    return norms.add_layer_norm(x, delta, weight, bias, task_ids, EPS)


def _single_add_layer_norm(x, delta, row_weight, row_bias):
    return norms.add_layer_norm(x, delta, row_weight.unsqueeze(0), row_bias.unsqueeze(0), None, EPS)


def _product_inputs(inner: int, outer: int) -> Callable[[Shape], Inputs]:
    """Inputs of a product from `inner` times the width to `outer` times the width."""

    def make(shape: Shape) -> Inputs:
        options: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        fan_in, fan_out = inner * shape.width, outer * shape.width
        x = torch.randn(shape.batch, shape.tokens, fan_in, **options)
        weight = torch.randn(fan_out, fan_in, **options) / fan_in**0.5
        residual = torch.randn(shape.batch, shape.tokens, fan_out, **options)
        return {"x": x, "weight": weight, "bias": torch.randn(fan_out, **options), "residual": residual}

    return make


def _product_work(inputs: Inputs, training: bool) -> tuple[int, int]:
    """Forward reads x, weight, bias (and residual), and writes out. Backward reads d out, x and weight, and writes d x,
    d weight and d bias; d residual is d out itself.
    """
    x, weight, size = inputs["x"], inputs["weight"], inputs["x"].element_size()
    tokens, (fan_out, fan_in) = x.shape[0] * x.shape[1], weight.shape
    ends = tokens * (fan_in + fan_out) + weight.numel() + fan_out
    elements = ends + (tokens * fan_out if "residual" in inputs else 0)
    if training:
        elements += ends + tokens * fan_in + weight.numel()
    return elements * size, (6 if training else 2) * tokens * weight.numel()


def _stock_linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias))


def _our_linear_gelu(x, weight, bias):
    return products.linear_gelu(x, weight, bias)


def _stock_linear_add(x, weight, bias, residual):
    return residual + F.linear(x, weight, bias)


def _our_linear_add(x, weight, bias, residual):
    return products.linear_add(x, weight, bias, residual)


def _norm_product_inputs(outer: int) -> Callable[[Shape], Inputs]:
    """A norm's rows, and the product that reads it, from the width to `outer` times the width."""

    def make(shape: Shape) -> Inputs:
        product = _product_inputs(1, outer)(shape)
        return {**_norm_inputs(shape), "projection": product["weight"], "offset": product["bias"]}

    return make


def _norm_product_work(inputs: Inputs, training: bool) -> tuple[int, int]:
    """The product's, and the rows in use; backward also writes all T rows of both gradients."""
    x, ids = inputs["x"], inputs.get("task_ids")
    product = {"x": x, "weight": inputs["projection"], "bias": inputs["offset"]}
    moved, flops = _product_work(product, training)
    table = inputs["row_weight"].unsqueeze(0) if ids is None else inputs["weight"]
    used = 1 if ids is None else len(ids.unique())
    row = table.shape[1] * table.element_size()
    moved += 2 * used * row + (used * row + 2 * len(table) * row if training else 0)
    return moved, flops + (24 if training else 8) * x.numel()


def _stock_norm_linear(x, row_weight, row_bias, projection, offset):
    return F.linear(_stock_layer_norm(x, row_weight, row_bias), projection, offset)


def _naive_norm_linear(x, weight, bias, task_ids, projection, offset):
    return F.linear(_naive_layer_norm(x, weight, bias, task_ids), projection, offset)


def _our_norm_linear(x, weight, bias, task_ids, projection, offset):
    return norm_products.norm_linear(x, weight, bias, task_ids, EPS, projection, offset)


def _stock_norm_linear_gelu(x, row_weight, row_bias, projection, offset):
    return F.gelu(_stock_norm_linear(x, row_weight, row_bias, projection, offset))


def _naive_norm_linear_gelu(x, weight, bias, task_ids, projection, offset):
    return F.gelu(_naive_norm_linear(x, weight, bias, task_ids, projection, offset))


def _our_norm_linear_gelu(x, weight, bias, task_ids, projection, offset):
    return norm_products.norm_linear_gelu(x, weight, bias, task_ids, EPS, projection, offset)


def _batch_norm_inputs(shape: Shape) -> Inputs:
    """The norm's inputs with N tokens as pixels in a line, channels-last."""
    inputs = _norm_inputs(shape)
    return {**inputs, "x": inputs["x"].transpose(1, 2).unsqueeze(2)}


def _batch_norm_work(inputs: Inputs, training: bool) -> tuple[int, int]:
    """Forward reads x, the rows in use and the statistics, and writes out. Backward reads d out, x, the rows and the
    statistics, and writes d x and all T rows of d weight and d bias.
    """
    x, ids = inputs["x"], inputs.get("task_ids")
    tasks = 1 if ids is None else inputs["weight"].shape[0]
    used = 1 if ids is None else len(ids.unique())
    row, stream = x.shape[1] * x.element_size(), x.numel() * x.element_size()
    moved, flops = 2 * stream + 2 * used * row + 2 * row, 7 * x.numel()  # normalise 2, modulate 2, SiLU 3
    if training:
        moved += 3 * stream + 2 * used * row + 2 * row + 2 * tasks * row
        flops += 14 * x.numel()  # x-hat 2, modulate 2, SiLU's derivative 5, sums 3, d x 2
    return moved, flops


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])


def _stock_batch_norm_act(x, row_weight, row_bias):
    return F.silu(F.batch_norm(x, *_statistics(x), row_weight, row_bias, eps=EPS))


def _naive_batch_norm_act(x, weight, bias, task_ids):
    weight, bias = (rows[task_ids].unsqueeze(-1).unsqueeze(-1) for rows in (weight, bias))
    return F.silu(F.batch_norm(x, *_statistics(x), eps=EPS) * weight + bias)


def _our_batch_norm_act(x, weight, bias, task_ids):
    return batch_norms.batch_norm_act(x, weight, bias, task_ids, *_statistics(x), EPS, "silu")


def _single_batch_norm_act(x, row_weight, row_bias):
    return _our_batch_norm_act(x, row_weight.unsqueeze(0), row_bias.unsqueeze(0), None)


def _triton(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Our Triton kernel even where the table would leave the operation to cuBLAS: this is how the table is measured."""

    @functools.wraps(function)
    def forced(**inputs):
        if not inputs["x"].is_cuda:
            raise Unavailable("Triton's kernels need a GPU")
        before = get_backend()
        set_backend("triton")
        try:
            return function(**inputs)
        finally:
            set_backend(before)

    return forced


OPERATIONS: dict[str, Operation] = {
    "layer_norm": Operation(
        _norm_inputs,
        {
            "stock": _stock_layer_norm,
            "naive": _naive_layer_norm,
            "ours": _our_layer_norm,
            "single": _single_layer_norm,
            "liger": _liger_layer_norm,
        },
        _norm_work,
        "test_layer_norm.py",
        eager_only=("liger", "single"),
    ),
    "add_layer_norm": Operation(
        _norm_inputs,
        {
            "stock": _stock_add_layer_norm,
            "naive": _naive_add_layer_norm,
            "ours": _our_add_layer_norm,
            "single": _single_add_layer_norm,
        },
        _norm_work,
        "test_layer_norm.py",
        eager_only=("single",),
    ),
    "batch_norm_act": Operation(
        _batch_norm_inputs,
        {
            "stock": _stock_batch_norm_act,
            "naive": _naive_batch_norm_act,
            "ours": _our_batch_norm_act,
            "single": _single_batch_norm_act,
        },
        _batch_norm_work,
        "test_batch_norm.py",
        eager_only=("single",),
    ),
    "linear_gelu": Operation(
        _product_inputs(1, 4),
        {"stock": _stock_linear_gelu, "ours": _our_linear_gelu, "triton": _triton(_our_linear_gelu)},
        _product_work,
        "test_linear.py",
        eager_only=("triton",),
    ),
    "linear_add": Operation(
        _product_inputs(4, 1),
        {"stock": _stock_linear_add, "ours": _our_linear_add, "triton": _triton(_our_linear_add)},
        _product_work,
        "test_linear.py",
        eager_only=("triton",),
    ),
    "norm_linear": Operation(
        _norm_product_inputs(3),
        {
            "stock": _stock_norm_linear,
            "naive": _naive_norm_linear,
            "ours": _our_norm_linear,
            "triton": _triton(_our_norm_linear),
        },
        _norm_product_work,
        "test_norm_linear.py",
        eager_only=("triton",),
    ),
    "norm_linear_gelu": Operation(
        _norm_product_inputs(4),
        {
            "stock": _stock_norm_linear_gelu,
            "naive": _naive_norm_linear_gelu,
            "ours": _our_norm_linear_gelu,
            "triton": _triton(_our_norm_linear_gelu),
        },
        _norm_product_work,
        "test_norm_linear.py",
        eager_only=("triton",),
    ),
}
