"""Graphs as files: ONNX, torch.export, AOTInductor and ExecuTorch; each is run and compared before it gets its name.

A format is a writer, (graph, path), and a runner, path -> function on tensors. The file is written beside, run on
inputs of another size than those it was traced with, compared with PyTorch, and only then renamed.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperclip_fast.export.graphs import Graph
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import written_file
from hyperclip_fast.utils.private_api import compile_and_package, load_package

TOLERANCE = 1e-4  # of the largest value of an output
LARGEST = 64  # images, tasks' rows or class names that an ExecuTorch file takes: it plans its memory beforehand
Runner = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Format:
    """How a graph becomes a file and is run from it."""

    suffix: str
    write: Callable[[Graph, Path], None]
    load: Callable[[Path], Runner]


@torch.no_grad()
def export(graph: Graph, path: str | Path, format: str = "onnx") -> float:
    """Write a graph as a file, run the file, and compare it with PyTorch.

    Args:
        graph: what to export.
        path: the file, which is replaced if it exists; written beside, then renamed.
        format: "onnx" (.onnx), "torch" (torch.export, .pt2), "aoti" (AOTInductor's package, .pt2: code for this
            machine's CPU, needs a C++ compiler) or "executorch" (.pte, with XNNPACK).

    Returns:
        The largest difference to PyTorch, as a share of the output's largest value.

    Raises:
        ValueError: for another format, a path with another suffix, or a file that computes something else.
        ImportError: where a package of the extra is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    path, chosen = Path(path), FORMATS[format]
    if path.suffix != chosen.suffix:
        raise ValueError(f"path must end in {chosen.suffix} for the format {format}, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_file(path) as beside:
        with quiet():
            chosen.write(graph, beside)
            error = _error(graph, chosen.load(beside))
        if not error <= TOLERANCE:
            raise ValueError(f"{format} must compute what PyTorch does within {TOLERANCE}, got {error:.1e}")
    return error


def _error(graph: Graph, run: Runner) -> float:
    worst = 0.0
    for size in (0, 3):  # axes of length 1, which tracing treats apart, and another length than it saw
        inputs = graph.inputs(size)
        expected = graph.module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, exact in zip(run(*inputs), expected, strict=True):
            if ours.shape != exact.shape or not torch.isfinite(ours).all():
                return float("inf")
            worst = max(worst, ((ours - exact).abs().max() / exact.abs().max()).item())
    return worst


def _traced(graph: Graph, largest: int | None = None) -> torch.export.ExportedProgram:
    names = {name for axes in graph.axes.values() for name in axes.values()}
    limits = {**dict.fromkeys(names, largest), **graph.largest}
    dims = {name: torch.export.Dim(name, min=1, max=limits[name]) for name in names}
    shapes = tuple({axis: dims[name] for axis, name in axes.items()} for axes in graph.axes.values())
    return torch.export.export(graph.module, graph.inputs(1), dynamic_shapes=_as_arguments(graph, shapes))


def _as_arguments(graph: Graph, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """One entry an argument of forward: a *tokens is one argument."""
    return (shapes,) if graph.module.forward.__code__.co_flags & 0x04 else shapes


def _write_onnx(graph: Graph, path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        require(package, "export")
    program = torch.onnx.export(
        graph.module,
        graph.inputs(1),
        input_names=list(graph.axes),
        output_names=list(graph.outputs),
        dynamic_shapes=_as_arguments(graph, tuple(graph.axes.values())),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # dynamo=True returns one
    program.model.metadata_props.update(graph.metadata)
    path.write_bytes(program.model_proto.SerializeToString())


def _load_onnx(path: Path) -> Runner:
    runtime = require("onnxruntime", "export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(out) for out in session.run(None, feeds))

    return run


def _write_torch(graph: Graph, path: Path) -> None:
    torch.export.save(_traced(graph), path, extra_files={"metadata.json": json.dumps(graph.metadata)})


def _load_torch(path: Path) -> Runner:
    return _as_tuple(torch.export.load(path).module())


def _write_aoti(graph: Graph, path: Path) -> None:
    options = {"aot_inductor.metadata": graph.metadata}
    compile_and_package(_traced(graph), str(path), options)


def _load_aoti(path: Path) -> Runner:
    return _as_tuple(load_package(str(path)))


def _write_executorch(graph: Graph, path: Path) -> None:
    if "task_ids" in graph.axes:  # 1.5 resizes no delegate's output whose batch is another input's, too
        raise ValueError("format executorch must go with the specialized or the text graph, got mixed")
    exir = require("executorch.exir", "executorch")
    passes = require("executorch.exir.passes.sym_shape_eval_pass", "executorch")
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    program = exir.to_edge_transform_and_lower(
        _traced(graph, LARGEST),
        partitioner=[xnnpack.XnnpackPartitioner()],
        constant_methods={"metadata": json.dumps(graph.metadata)},
    )
    config = exir.ExecutorchBackendConfig(sym_shape_eval_pass=passes.ConstraintBasedSymShapeEvalPass())
    path.write_bytes(program.to_executorch(config).buffer)


def _load_executorch(path: Path) -> Runner:
    runtime = require("executorch.runtime", "executorch").Runtime.get()
    content = path.read_bytes()
    program = runtime.load_program(content)
    method = program.load_method("forward")

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        assert content and program  # the method points into both
        return tuple(out.clone() for out in method.execute(list(inputs)))

    return run


def _as_tuple(run: Callable[..., Any]) -> Runner:
    def wrapped(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = run(*inputs)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    return wrapped


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters narrate on stdout, in the log and in warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _load_onnx),
    "torch": Format(".pt2", _write_torch, _load_torch),
    "aoti": Format(".pt2", _write_aoti, _load_aoti),
    "executorch": Format(".pte", _write_executorch, _load_executorch),
}
