"""A program of its own, since Triton must not interpret here: what launches cost the host, and what they launch.

Prints JSON: "wrong", the calls for which `launch` took another kernel than Triton would; "heard", launches that a hook
heard; "launches" of a block, forward and in training; "forward" and "training", our host time over stock timm's.
"""

import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from triton import knobs

from hyperclip_fast import HyperViT, NormParams, hyper_block, hyper_vit
from hyperclip_fast.kernels.common import launcher
from hyperclip_fast.kernels.layer_norm.triton_kernels import _fwd_kernel
from tests.kernels.idle_driver import idle_launches

ROUNDS, ATTEMPTS = 15, 4
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "num_heads": 2, "num_classes": 0}  # 12 blocks


def random_call(chance: random.Random) -> dict[str, Any]:
    """Arguments of the layer norm's forward: dtypes, alignment, strides, and what is left out."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    width = chance.choice((1, 16, 40))

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        shift = chance.choice((0, 0, 1, 8))  # elements past an aligned address
        return torch.zeros(4096, dtype=dtype)[shift:].as_strided(shape, (shape[-1],) * (len(shape) - 1) + (1,))

    dtype, row_dtype = chance.choice(dtypes), chance.choice(dtypes)
    table = torch.zeros(4, width + chance.choice((0, 1, 8)), dtype=row_dtype)[:, :width]
    optional = chance.random() < 0.5
    ids = chance.choice((None, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)))
    return {
        "x": tensor(4, width, dtype=dtype),
        "delta": tensor(4, width, dtype=chance.choice(dtypes)) if optional else None,
        "weight": table,
        "bias": table,
        "task_ids": ids,
        "out": tensor(4, width, dtype=chance.choice(dtypes)),
        "total": tensor(4, width, dtype=dtype) if optional else None,
        "mean": None,
        "rstd": None,
        "N": chance.choice((1, 5, 16)),
        "T": chance.choice((1, 4)),
        "tiles": 1,
        "weight_stride": chance.choice((0, table.stride(0))),
        "bias_stride": table.stride(0),
        "eps": 1e-6,
        "D": width,
        "BLOCK_N": chance.choice((4, 8)),
        "BLOCK_D": 64,
        "num_warps": 4,
    }


def wrong_kernels(launched: list[tuple[str, Any, tuple]], count: int) -> list[str]:
    """Calls for which the second `launch` took another kernel, or other arguments, than Triton does."""
    chance, wrong = random.Random(0), []
    for _ in range(count):
        arguments = random_call(chance)
        for _ in range(2):
            launcher.launch(_fwd_kernel, (1,), **arguments)
        compiled = _fwd_kernel[(1,)](**arguments)
        ours, tritons = launched[-2:]
        if ours != tritons or ours[1] is not compiled.function:
            wrong.append(str({key: getattr(value, "dtype", value) for key, value in arguments.items()}))
        launched.clear()
    return wrong


def heard_launches() -> int:
    """A hook hears every launch, of kernels that were launched before, too."""
    names, arguments = [], random_call(random.Random(0))
    knobs.runtime.launch_enter_hook.add(names.append)
    for _ in range(3):
        launcher.launch(_fwd_kernel, (1,), **arguments)
    knobs.runtime.launch_enter_hook.remove(names.append)
    launcher.launch(_fwd_kernel, (1,), **arguments)
    return len(names)


def ratio(ours: Callable[[], None], stock: Callable[[], None]) -> float:
    """Our time over stock's, medians of interleaved rounds; the least of some attempts, for the machine has others."""
    found = []
    for _ in range(ATTEMPTS):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for function, mine in zip((ours, stock), times):
                start = time.perf_counter()
                for _ in range(4):
                    function()
                mine.append(time.perf_counter() - start)
        found.append(statistics.median(times[0]) / statistics.median(times[1]))
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for module in (hyper_block, hyper_vit):
        module.use_triton = lambda x: True  # as on a GPU
    stock, vit = (make("vit_tiny_patch16_224", **TINY).eval() for make in (timm.create_model, HyperViT.from_timm))
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    table = vit.base_params.table.detach().repeat(3, 1).requires_grad_()
    table_for_inference = table.detach().clone()

    def our_forward() -> None:
        with torch.inference_mode():
            vit(images, NormParams(vit.norm_spec, table_for_inference, ids))

    def stock_forward() -> None:
        with torch.inference_mode():
            stock(images)

    def our_step() -> None:
        vit(images, NormParams(vit.norm_spec, table, ids)).sum().backward()

    def stock_step() -> None:
        stock(images).sum().backward()

    with idle_launches() as launched:
        found: dict[str, Any] = {"wrong": wrong_kernels(launched, 150), "heard": heard_launches()}
        launches = {}
        for name, function in (("forward", our_forward), ("training", our_step)):
            launched.clear()
            function()
            launches[name] = len(launched)
        found |= {"launches": launches, "forward": ratio(our_forward, stock_forward)}
        found["training"] = ratio(our_step, stock_step)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
