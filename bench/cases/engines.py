"""What runs a tower: PyTorch eager or compiled, a CUDA graph, Inductor with frozen weights, ONNX Runtime.

An engine is a function (tower, inputs, training) that returns a function which runs the tower on these inputs, or
raises Unavailable.
"""

import gc
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hyperclip_fast.bench.harness.runner import Unavailable
from hyperclip_fast.export.formats import quiet
from hyperclip_fast.serving.graphs import capture
from hyperclip_fast.utils.extras import missing
from hyperclip_fast.utils.private_api import frozen_weights

Forward = Callable[[], Tensor]


def _eager(tower: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Forward:
    return lambda: tower(*inputs)


def _compiled(tower: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Forward:
    compiled = torch.compile(tower, fullgraph=True)
    return lambda: compiled(*inputs)


def _frozen(tower: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Forward:
    """Inductor with the weights as constants, which on a CPU it packs for oneDNN beforehand."""
    if training:
        raise Unavailable("frozen weights are for inference")
    if inputs[0].device.type != "cpu":
        raise Unavailable("packed weights are for a CPU")
    # The options keep it apart from code that is not frozen; tracing looks at the configuration.
    compiled = torch.compile(tower, fullgraph=True, options={"freezing": True})
    with frozen_weights(), torch.inference_mode():
        compiled(*inputs)
    return lambda: compiled(*inputs)


def _onnxruntime(tower: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> Forward:
    """The tower exported to ONNX, run by ONNX Runtime on as many threads as PyTorch uses."""
    if training:
        raise Unavailable("ONNX Runtime is for inference")
    if inputs[0].device.type != "cpu" or inputs[0].dtype != torch.float32:
        raise Unavailable("measured on a CPU in float32 only")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise Unavailable(str(missing(package, "bench")))
    onnxruntime = importlib.import_module("onnxruntime")
    names = ("images", "table", "task_ids")[: len(inputs)]
    with quiet():
        program = torch.onnx.export(tower, inputs, input_names=names, output_names=["out"], dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    assert program is not None  # dynamo=True returns one
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(names, inputs)}
    return lambda: torch.from_numpy(session.run(None, feeds)[0])


ENGINES: dict[str, Callable[[nn.Module, tuple[Tensor, ...], bool], Forward]] = {
    "eager": _eager,
    "compiled": _compiled,
    "graph": _eager,  # what `captured` records
    "frozen": _frozen,
    "onnxruntime": _onnxruntime,
}


def release_memory(device: torch.device) -> None:
    """Give a GPU's unused memory back, that of dropped CUDA graphs, too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def captured(step: Callable[[], object], device: torch.device, pool: list[Any]) -> Callable[[], object]:
    """A step recorded as a CUDA graph; each replay fills the same results.

    Args:
        step: what to record. What it returns must not hold an autograd graph: a weight's node in it would stay on this
            recording's stream, which the next recording with the same weight may not wait for.
        device: where.
        pool: empty at first; graphs that are given the same list share their memory, so that one's results are gone
            once another is replayed.
    """
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    release_memory(device)  # a capture may not free what the allocator keeps, nor collect what autograd left in circles
    if not pool:
        pool.append(torch.cuda.graph_pool_handle())
    replay, results = capture(step, device, pool[0], "global")

    def run():
        replay()
        return results

    return run
