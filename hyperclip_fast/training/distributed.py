"""Several training processes, started by torchrun: one device each, gloo on CPUs and NCCL on GPUs."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hyperclip_fast.data.batch import Share
from hyperclip_fast.utils.private_api import copy_each


@contextlib.contextmanager
def processes(device: str | torch.device) -> Iterator[torch.device]:
    """Join the other processes where torchrun started this one; gives this process's device, and leaves at the end.

    Args:
        device: "cuda" becomes the GPU of this process's local rank.
    """
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def share() -> Share:
    """This process's share of every batch."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Share()
    return Share(distributed.get_rank(), distributed.get_world_size())


def gather_texts(features: Tensor) -> Tensor:
    """Features (1, K, E_text) of every process's texts in one (1, K * world, E_text); gradients go back to each."""
    return _Gather.apply(features)


class _Gather(torch.autograd.Function):
    """Tensors (1, K, E) of all processes, joined along K; the gradients of all come back summed."""

    @staticmethod
    def forward(ctx, mine):
        parts = [
            torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())
        ]
        distributed.all_gather(parts, mine.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size(), dim=1)[distributed.get_rank()]


def average_gradients(parameters: Sequence[nn.Parameter], world: int) -> None:
    """The mean over processes of every gradient, in one exchange for each dtype."""
    if world == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        flat /= world
        pieces = flat.split([grad.numel() for grad in grads])
        copy_each(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads)])


def mean(values: dict[str, Tensor], world: int) -> dict[str, float]:
    """Numbers of this process to their means over processes."""
    flat = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    if world > 1:
        distributed.all_reduce(flat)
    return dict(zip(values, (flat / world).tolist()))


def any_process(flag: bool, world: int, device: torch.device) -> bool:
    """Whether `flag` is set in some process: all get the same answer."""
    if world == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def collect(value: Any, world: int) -> list[Any]:
    """Every process's value, by rank."""
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    distributed.all_gather_object(values, value)
    return values


def barrier(world: int) -> None:
    """Wait for the other processes."""
    if world > 1:
        distributed.barrier()


def wrap(objective: Any, parallel: str, world: int) -> nn.Module:
    """An objective whose backward leaves the mean gradients of all processes: by DDP, or by FSDP2, in place.

    FSDP2 keeps the blocks of a trained text tower in shards of their own; all other parameters are gathered once a
    step, since rows are made of the image tower's norms before it runs. Scalars stay whole.
    """
    if world == 1:
        return objective
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(objective)
    for module in objective.model.text.modules() if objective.model.text is not None else ():
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block)
    return fully_shard(objective, ignored_params=set(scalars(objective)))


def scalars(module: nn.Module) -> list[nn.Parameter]:
    """Parameters without a dimension that could be sharded."""
    return [parameter for parameter in module.parameters() if parameter.ndim == 0]


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dicts of "model" and "optimizer"; what FSDP holds in shards is whole, in the first process alone."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole_model, whole_optimizer = get_state_dict(model, optimizer, options=options)
    return {"model": whole_model, "optimizer": whole_optimizer}


def load_states(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `states` gave."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return
    options = StateDictOptions(full_state_dict=True)
    wanted = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **wanted, options=options)


def is_sharded(value: Tensor) -> bool:
    """Whether FSDP holds this tensor in shards."""
    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """A tensor in one piece where FSDP holds it in shards."""
    return value.full_tensor() if isinstance(value, DTensor) else value
