"""The byte ledger: what every operation and a whole block must read and write, and what they do. Needs no GPU.

    python bench/ledger.py [--tokens 197] [--width 192] [--json FILE]

Bytes are counted (accesses.py), not derived, in MD = tokens of the batch x width x bytes of an element (float16: the
interpreter is wrong in bfloat16). A tensor counts as activation if its size is a multiple of the stream's; in the
block's table weights, rows and vectors are left out: they do not grow with the batch.
"""

import argparse
import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor

from hyperclip_fast import hyper_block, set_backend
from hyperclip_fast.bench.accesses import Step, steps
from hyperclip_fast.kernels import dispatch, tables
from hyperclip_fast.kernels.batch_norm import batch_norm_act
from hyperclip_fast.kernels.batch_norm import launch as batch_norm_launch
from hyperclip_fast.kernels.layer_norm import add_layer_norm, layer_norm
from hyperclip_fast.kernels.layer_norm import launch as layer_norm_launch
from hyperclip_fast.kernels.linear import launch as linear_launch
from hyperclip_fast.kernels.linear import linear_add, linear_gelu
from hyperclip_fast.kernels.linear import operator as linear_op
from hyperclip_fast.kernels.norm_linear import launch as norm_linear_launch
from hyperclip_fast.kernels.norm_linear import norm_linear, norm_linear_gelu
from hyperclip_fast.utils.files import write_file

INFERENCE_ONLY = ("norm_linear", "norm_linear_gelu")  # in training they are layer_norm and a product
SHARED = ("weight", "bias", "scale", "task_ids", "norm_weight", "norm_bias", "mean", "var")
BATCH = 256  # the launches cut their work as for a batch of this size


@dataclass(frozen=True)
class Shape:
    """Two images, each of another task: N prime, so that no weight is taken for an activation."""

    N: int = 197
    D: int = 192
    heads: int = 3
    B: int = 2

    @property
    def unit(self) -> int:
        """MD: bytes of one activation as wide as the stream."""
        return 2 * self.B * self.N * self.D

    def is_activation(self, tensor: Tensor) -> bool:
        return tensor.numel() % (self.B * self.N * self.D) == 0

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape or (self.B, self.N, self.D), generator=torch.Generator().manual_seed(0)).half()


@contextlib.contextmanager
def launches_of(shape: Shape, recompute: bool = True):
    """Triton runs every operation, on tiles and slices that it would have for BATCH images."""
    share, choose = BATCH // shape.B, linear_launch.choose_tiles

    def choose_tiles(device, itemsize, rows, columns, inner):
        return choose(device, itemsize, share * rows, columns, inner)

    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (batch_norm_launch, "PROGRAMS", batch_norm_launch.PROGRAMS // share),
            (norm_linear_launch, "PROGRAMS", norm_linear_launch.PROGRAMS // share),
            (layer_norm_launch, "BACKWARD_PROGRAMS", layer_norm_launch.BACKWARD_PROGRAMS // share),
            (linear_launch, "PASS_PROGRAMS", linear_launch.PASS_PROGRAMS // share),
            (linear_launch, "choose_tiles", choose_tiles),
            (linear_op, "WIDEST_RECOMPUTED", shape.D if recompute else 0),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        set_backend("triton")
        stack.callback(set_backend, "auto")
        yield


# -- operations: the least possible against what is counted


@dataclass
class Line:
    """One pass of one operation, in MD."""

    operation: str
    activations: float  # the least possible: each input and each output of its kernels once
    others: float  # the same of weights, rows and vectors, here for two images
    counted: float  # what memory moves of both
    partials: float  # sums of slices, written and read; not in `counted`
    again: float  # operands and rows that another tile has loaded before: L2's share; not in `counted`

    @property
    def ratio(self) -> float:
        return self.counted / (self.activations + self.others)


def operations(shape: Shape) -> dict[str, tuple[Callable, dict[str, Tensor], bool]]:
    """{name: (operation, its differentiable inputs, whether it recomputes)}."""
    B, D, tensor = shape.B, shape.D, shape.tensor
    task_ids = torch.arange(B).flip(0)
    norm = {"x": tensor(), "weight": tensor(B, D), "bias": tensor(B, D)}
    wide = {"x": tensor(), "weight": tensor(4 * D, D), "bias": tensor(4 * D)}
    back = {"x": tensor(B, shape.N, 4 * D), "weight": tensor(D, 4 * D), "bias": tensor(D)}
    pixels = {**norm, "x": tensor().transpose(1, 2).unsqueeze(2)}  # (B, C, 1, N), channels-last
    statistics: dict[str, Any] = {"mean": torch.zeros(D), "var": torch.ones(D), "act": "silu"}
    add, scale = {"residual": tensor()}, {"scale": tensor(D)}
    rows, narrow = (
        {"norm_weight": tensor(B, D), "norm_bias": tensor(B, D)},
        {"weight": tensor(3 * D, D), "bias": tensor(3 * D)},
    )
    return {
        "layer_norm": (lambda **t: layer_norm(**t, task_ids=task_ids), norm, False),
        "add_layer_norm": (lambda **t: add_layer_norm(**t, task_ids=task_ids), {**norm, "delta": tensor()}, False),
        "batch_norm_act": (lambda **t: batch_norm_act(**t, task_ids=task_ids, **statistics), pixels, False),
        "batch_norm_act, residual": (
            lambda **t: batch_norm_act(**t, task_ids=task_ids, **statistics),
            {**pixels, "residual": pixels["x"]},
            False,
        ),
        "linear_gelu, recomputed": (linear_gelu, wide, True),
        "linear_gelu, kept": (linear_gelu, wide, False),
        "linear_add": (linear_add, {**back, **add}, False),
        "linear_add, scale": (linear_add, {**back, **add, **scale}, False),
        "norm_linear": (lambda **t: norm_linear(**t, task_ids=task_ids, eps=1e-6), {**wide, **narrow, **rows}, False),
        "norm_linear_gelu": (lambda **t: norm_linear_gelu(**t, task_ids=task_ids, eps=1e-6), {**wide, **rows}, False),
    }


def operation_lines(shape: Shape) -> list[Line]:
    """Inference, forward in training and backward of every operation; the products of backward are not our kernels."""
    lines = []
    for name, (operation, inputs, recompute) in operations(shape).items():
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in inputs.items()}
        with launches_of(shape, recompute):
            with torch.no_grad(), steps() as inference:
                operation(**leaves)
            if name in INFERENCE_ONLY:
                lines.append(_line(f"{name}: inference", inference, shape))
                continue
            with steps() as forward:
                outputs = operation(**leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            heads = [shape.tensor(*output.shape) for output in outputs]
            with steps() as backward:
                torch.autograd.grad(outputs, list(leaves.values()), heads)
        for kind, taken in (("inference", inference), ("forward", forward), ("backward", backward)):
            if any(step.is_kernel for step in taken):
                lines.append(_line(f"{name}: {kind}", taken, shape))
    return lines


def _line(operation: str, taken: list[Step], shape: Shape) -> Line:
    kernels = [step for step in taken if step.is_kernel]
    partials = {moved.tensor.untyped_storage().data_ptr() for moved in _moved(kernels) if "partial" in moved.name}

    def is_partial(tensor):
        return tensor.untyped_storage().data_ptr() in partials

    tensors = {tensor.data_ptr(): tensor for step in kernels for tensor in step.tensors if not is_partial(tensor)}
    least = {True: 0, False: 0}
    for tensor in tensors.values():
        least[shape.is_activation(tensor)] += tensor.nbytes
    counted = again = 0
    for step in kernels:
        for moved in step.moved:
            if not is_partial(moved.tensor):
                shared = _is_shared(step, moved.name)
                counted += moved.unique if shared else moved.total
                again += moved.total - moved.unique if shared else 0
    partial = sum(moved.total for moved in _moved(taken) if is_partial(moved.tensor))
    return Line(operation, *(n / shape.unit for n in (least[True], least[False], counted, partial, again)))


def _moved(taken: list[Step]):
    return [moved for step in taken for moved in step.moved]


def _is_shared(step: Step, argument: str) -> bool:
    """Whether programs may load the same elements, which L2 then holds: rows, vectors, and operands of a product."""
    return argument in SHARED or (argument == "x" and "linear" in step.name)


# -- the block


def _stock(block, x, delta, rows, task_ids):
    return block(x)


def _naive(block, x, delta, rows, task_ids):
    """Each norm's output times the sample's weight plus its bias, as one would write it."""
    weight1, bias1, weight2, bias2 = (row[task_ids].unsqueeze(1) for row in rows)
    x = x + block.attn(F.layer_norm(x, x.shape[-1:]) * weight1 + bias1)
    return x + block.mlp(F.layer_norm(x, x.shape[-1:]) * weight2 + bias2)


def _hyper(block, x, delta, rows, task_ids):
    return block(x, delta, *rows, task_ids)


LEVELS = {  # name: (the block's forward, the operations that the table gives to Triton, pre-activation recomputed)
    "stock timm": (_stock, (), True),
    "naive": (_naive, (), True),
    "(a)": (_hyper, (), True),
    "(a)+GELU": (_hyper, ("linear_gelu",), True),
    "(a)+GELU kept": (_hyper, ("linear_gelu",), False),
    "(a')": (_hyper, ("linear_gelu", "linear_add"), True),
    "(b)": (_hyper, ("linear_gelu", "linear_add", "norm_linear", "norm_linear_gelu"), True),
}
PYTORCHS = ("packing dq, dk, dv", "bias gradients")  # autograd's own copies and sums, whoever wrote the block
SEGMENTS = ("add, norm1", "qkv", "attention", "proj", "add, norm2", "fc1", "GELU", "fc2", "add", *PYTORCHS)


def block_steps(level: str, shape: Shape) -> tuple[list[Step], list[Step], list[Step], dict[int, str]]:
    """The steps of inference, of forward in training and of backward, and the names of the block's parameters."""
    function, chosen, recompute = LEVELS[level]
    kind = hyper_block.HyperBlock if function is _hyper else Block
    block = kind(shape.D, shape.heads, qkv_bias=True).half()
    left = function is _hyper and "linear_add" not in chosen  # the block before has left its last add to this one
    inputs = [shape.tensor().requires_grad_() for _ in range(1 + left)]
    x, delta = (*inputs, None)[:2]
    rows = [shape.tensor(shape.B, shape.D).requires_grad_() for _ in range(4)]
    task_ids = torch.arange(shape.B).flip(0)
    parameters = {name: tensor for name, tensor in block.named_parameters() if function is _stock or "norm" not in name}
    wanted = [*inputs, *parameters.values(), *(() if function is _stock else rows)]
    widest = {operation: {"large": shape.D * (operation in chosen)} for operation in tables.WIDEST}
    with (
        launches_of(shape, recompute),
        mock.patch.object(dispatch, "get_backend", lambda: "auto"),  # the table decides, as on a GPU
        mock.patch.dict(tables.WIDEST, widest),
    ):
        with torch.no_grad(), steps() as inference:
            function(block, x.detach(), delta, rows, task_ids)
        with steps() as forward:
            outputs = function(block, x, delta, rows, task_ids)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [output for output in outputs if output is not None]
        head = shape.tensor()
        with steps() as backward:
            torch.autograd.grad(outputs, wanted, [head] * len(outputs))
    return inference, forward, backward, {tensor.data_ptr(): name for name, tensor in parameters.items()}


def by_segment(taken: list[Step], names: dict[int, str], shape: Shape, backward: bool = False) -> dict[str, float]:
    """MD of activations that each part of the block moves."""
    moved, last = defaultdict(float), "fc2" if backward else ""
    for step in taken:
        segment = _segment(step, names, shape)
        if segment in ("qkv", "proj", "fc1", "fc2"):
            last = segment
        elif segment is None and backward:
            segment = {"fc2": "add", "fc1": "add, norm2", "qkv": "add, norm1"}[last]
        elif segment is None:
            segment = {"": "add, norm1", "proj": "add, norm2", "fc2": "add"}[last]
        moved[segment] += sum(m.unique for m in step.moved if shape.is_activation(m.tensor)) / shape.unit
    return dict(moved)


def _segment(step: Step, names: dict[int, str], shape: Shape) -> str | None:
    """The part of the block to which a step belongs; None for norms and adds, whose place tells."""
    if "attention" in step.name:
        return "attention"
    if step.name in ("stack", "cat", "clone"):
        return "packing dq, dk, dv"
    if step.name in ("gelu", "gelu_", "gelu_backward", "_gelu_bwd_kernel", "_linear_gelu_bwd_kernel"):
        return "GELU"
    if step.name == "_linear_add_bwd_kernel" or (step.name == "sum" and step.tensors[0].dim() == 2):
        return "bias gradients"
    for tensor in step.tensors:
        name = names.get(tensor.data_ptr(), "")
        if name.endswith(".weight") and "norm" not in name:
            return name.split(".")[-2]
    if step.name == "mm":  # the gradient of a weight
        D, shapes = shape.D, [tuple(tensor.shape) for tensor in step.tensors]
        sizes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (4 * D, D), "fc2": (D, 4 * D)}
        return next(name for name, size in sizes.items() if size in shapes)
    return None


def block_tables(shape: Shape) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """MD by level and part of the block: inference, and forward plus backward."""
    inference, training = {}, {}
    for level in LEVELS:
        infer, forward, backward, names = block_steps(level, shape)
        if "kept" not in level:  # inference keeps nothing
            inference[level] = by_segment(infer, names, shape)
        there, back = by_segment(forward, names, shape), by_segment(backward, names, shape, backward=True)
        training[level] = {segment: there.get(segment, 0) + back.get(segment, 0) for segment in SEGMENTS}
    return inference, training


# -- what a GPU should make of it: arithmetic, not measurement

H100 = ("H100", 3.0e12, 800e12)  # bytes/s of a copy, FLOP/s of a large product in bfloat16
WIDTHS = {"Ti": 192, "S": 384, "B": 768}


def predicted_seconds(column: dict[str, float], width: int, tokens: int, images: int = BATCH) -> float:
    """Roofline of a block's inference in 16 bits: each part takes its bytes' time or its FLOPs' time, the longer."""
    _, bandwidth, speed = H100
    rows = images * tokens
    products = {"qkv": 6, "proj": 2, "fc1": 8, "fc2": 8}
    flops = {name: factor * rows * width**2 for name, factor in products.items()}
    flops["attention"] = 4 * rows * tokens * width
    return sum(max(md * 2 * rows * width / bandwidth, flops.get(name, 0) / speed) for name, md in column.items())


def print_predicted(inference: dict[str, dict[str, float]], tokens: int) -> None:
    print(f"\n{'predicted, ' + H100[0] + ', B = ' + str(BATCH):<26}" + "".join(f"{level:>15}" for level in inference))
    for name, width in WIDTHS.items():
        times = {level: predicted_seconds(column, width, tokens) for level, column in inference.items()}
        cells = (f"{1e6 * time:.0f} us {times['stock timm'] / time:.2f}x" for time in times.values())
        print(f"{'ViT-' + name + ', a block forward':<26}" + "".join(f"{cell:>15}" for cell in cells))
    print("Roofline arithmetic from the bytes above, every product at full speed: an upper bound, timed by nobody.")


# -- printing


def print_operations(lines: list[Line]) -> None:
    names = ("activations", "weights...", "counted", "ratio", "partials", "L2 again")
    print(f"{'one call (MD)':<36}" + "".join(f"{name:>12}" for name in names))
    for line in lines:
        numbers = (line.activations, line.others, line.counted, line.ratio, line.partials, line.again)
        print(f"{line.operation:<36}" + "".join(f"{number:>12.3f}" for number in numbers))


def print_block(title: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:<26}" + "".join(f"{level:>15}" for level in table))
    for segment in SEGMENTS:
        if any(column.get(segment) for column in table.values()):
            if segment == PYTORCHS[0]:
                parts = (sum(v for k, v in column.items() if k not in PYTORCHS) for column in table.values())
                print(f"{'sum of these':<26}" + "".join(f"{part:>15.2f}" for part in parts))
            print(f"{segment:<26}" + "".join(f"{column.get(segment, 0):>15.2f}" for column in table.values()))
    print(f"{'sum':<26}" + "".join(f"{sum(column.values()):>15.2f}" for column in table.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=Shape.N, help="tokens of an image, a prime number")
    parser.add_argument("--width", type=int, default=Shape.D, help="width of a token, a multiple of 64")
    parser.add_argument("--json", help="also write the numbers there")
    args = parser.parse_args()
    shape = Shape(N=args.tokens, D=args.width, heads=args.width // 64)
    print(f"N {shape.N}, D {shape.D}, float16, {shape.B} images in slices and tiles of a batch of {BATCH}; 1 MD is")
    print("one read or write of the residual stream\n")
    lines = operation_lines(shape)
    print_operations(lines)
    inference, training = block_tables(shape)
    print_block("a block, inference (MD)", inference)
    print_block("a block, training step (MD)", training)
    print_predicted(inference, shape.N)
    if args.json:
        rows = [{**vars(line), "ratio": line.ratio} for line in lines]
        report = {"shape": vars(shape), "operations": rows, "inference": inference, "training": training}
        write_file(args.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
