"""Cases of `hyperclip bench model`: towers on engines, one model, batch, T, mix and step at a time.

A training step is forward, backward, and the gradients of all weights and of the table; no optimizer. "autocast" is a
training step of float32 weights whose forward runs under torch.autocast.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hyperclip_fast.bench.cases.engines import ENGINES, captured
from hyperclip_fast.bench.cases.towers import LoopTower, NaiveTower, OurTower, StockTower
from hyperclip_fast.bench.harness.mixes import make_task_ids
from hyperclip_fast.bench.harness.runner import Case, Provider, Run, Unavailable, relative_error
from hyperclip_fast.encoders import create_encoder
from hyperclip_fast.utils.private_api import BatchNorm, mark_maybe_dynamic, own_buffers, own_parameters
from hyperclip_fast.utils.timm_models import model_options

# Where a batch's images share statistics, random weights amplify rounding: the first gradient of stock MobileNetV3 is
# up to 2e-3 off in float32, 0.5 in bfloat16.
COUPLED_SLACK = 100.0
PROBES = 4  # images of a batch whose outputs and gradients are compared with float64
# Who is measured on an engine. single: our model, T = 1; loop: one pass of the stock model a task.
TOWERS = {
    "eager": ("stock", "naive", "ours", "single", "loop"),
    "compiled": ("stock", "naive", "ours"),
    "graph": ("stock", "ours", "single"),
    "frozen": ("stock", "ours"),
    "onnxruntime": ("stock", "ours"),
}


def model_cases(
    models: Sequence[str],
    batches: Sequence[int],
    tasks: Sequence[int],
    mixes: Sequence[str],
    steps: Sequence[str],
    engines: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    **timm_options: Any,
) -> Iterator[Case]:
    """One case for each model, batch, step, T and mix; compilations are shared by all T and mixes."""
    for name in models:
        for step in steps:
            for batch in batches:
                torch.compiler.reset()  # compiled for this batch, not for whatever came before
                group = _Group(name, batch, step, dtype, device, timm_options)
                for count in tasks:
                    for mix in mixes if count > 1 else mixes[:1]:
                        labels = {"model": name, "step": step, "batch": batch, "tasks": count, "mix": mix}
                        yield _Mixture(group, count, mix).case(labels, engines)


class _Group:
    """A model's towers and a batch of images, shared by all cases of it."""

    def __init__(
        self, name: str, batch: int, step: str, dtype: torch.dtype, device: torch.device, options: dict[str, Any]
    ):
        torch.manual_seed(0)
        training = step != "forward"
        self.training, self.dtype, self.device, self.autocast_dtype = training, dtype, device, None
        if step == "autocast":
            self.autocast_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
            self.dtype = dtype = torch.float32
        side = options.get("img_size")
        given = {key: value for key, value in options.items() if key != "img_size"} | size_options(name, side)
        hyper = create_encoder(name, num_classes=0, **given)
        stock = timm.create_model(name, num_classes=0, **given)
        self.stock = stock.to(device, dtype).train(training)
        self.hyper = hyper.to(device, dtype).train(training)
        _share_weights(stock, hyper)
        self.spec = self.hyper.norm_spec
        side = side_of(stock, side)
        self.images = torch.randn(batch, 3, side, side, dtype=dtype, device=device)
        self.base = self.hyper.base_params.table.detach()
        norms = any(isinstance(module, BatchNorm) for module in self.stock.modules())
        self.is_coupled = training and norms  # an image's output depends on all images of the batch

    @cached_property
    def exact(self) -> nn.Module:
        """The stock model in float64."""
        return copy.deepcopy(self.stock).double()

    @cached_property
    def towers(self) -> dict[str, nn.Module]:
        ours, naive = OurTower(self.hyper), NaiveTower(self.stock, self.spec)
        towers = {"stock": StockTower(self.stock), "ours": ours, "single": ours, "naive": naive}
        return {name: tower.train(self.training) for name, tower in towers.items()}


def size_options(name: str, side: int | None) -> dict[str, Any]:
    """timm's option for images of this side: empty for None, as the model has it, and for models that take any size."""
    return {"img_size": side} if side is not None and "img_size" in model_options(name) else {}


def side_of(model: nn.Module, side: int | None) -> int:
    """Side of a model's images: the one wished for, or, for None, its own."""
    cfg: Any = model.pretrained_cfg
    return cfg["input_size"][-1] if side is None else side


def _share_weights(model: nn.Module, source: nn.Module) -> None:
    """Give `model` the very tensors of `source`: where copies lie in memory is worth some per cent, at random."""
    own = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, module in model.named_modules():
        kinds: tuple[dict[str, Any], ...] = (own_parameters(module), own_buffers(module))
        for tensors in kinds:
            for key, value in tensors.items():
                tensors[key] = None if value is None else own[f"{name}.{key}" if name else key]


class _Mixture:
    """One T and mix on a group's images."""

    def __init__(self, group: _Group, tasks: int, mix: str):
        self.group, batch = group, len(group.images)
        noise = torch.randn(tasks, group.spec.num_params, generator=torch.Generator().manual_seed(1))
        self.table = (group.base + 0.1 * noise.to(group.base)).requires_grad_(group.training)
        self.task_ids = make_task_ids(mix, batch, tasks).to(group.device)
        self.single = self.table[:1].detach().clone().requires_grad_(group.training)
        self.no_ids = torch.zeros_like(self.task_ids)
        if tasks > 1:
            mark_maybe_dynamic(self.table, 0)  # one compilation for every T
        self.probes = torch.linspace(0, batch - 1, min(PROBES, batch)).round().long().to(group.device)
        width: Any = group.stock.head_hidden_size
        generator = torch.Generator().manual_seed(2)
        self.incoming = torch.randn(batch, width, generator=generator).to(group.device, group.dtype)
        self.expected: dict[str, list[Tensor]] = {}
        self.pool: list[Any] = []

    def case(self, labels: dict[str, Any], engines: Sequence[str]) -> Case:
        providers = []
        for engine in engines:
            for name in TOWERS[engine]:
                providers.append(Provider(name, engine, lambda name=name, engine=engine: self._build(name, engine)))
        slack = COUPLED_SLACK if self.group.is_coupled else 1.0
        dtype = self.group.autocast_dtype or self.group.dtype
        return Case(labels, providers, self._check, dtype, self.group.device, slack=slack)

    def _build(self, name: str, engine: str) -> Run:
        group = self.group
        if name != "loop":
            tower = group.towers[name]
        elif group.is_coupled:
            raise Unavailable("one pass a task has other batch statistics")
        else:
            tower = LoopTower(group.stock, group.spec, self.table, self.task_ids)
        mixed = (self.table, self.task_ids)
        rows = {"stock": (), "loop": (), "single": (self.single, self.no_ids)}.get(name, mixed)
        inputs = (group.images, *rows)
        forward = ENGINES[engine](tower, inputs, group.training)
        if group.autocast_dtype is not None:
            forward = _casting(forward, group.device, group.autocast_dtype)
        step = self._training_step(forward, name) if group.training else _inference(forward)
        return captured(step, group.device, self.pool) if engine == "graph" else step

    def _training_step(self, forward: Callable[[], Tensor], name: str) -> Run:
        """Output, gradient of the rows, gradient of the first weight that images meet."""
        group = self.group
        model = group.hyper if name in ("ours", "single") else group.stock
        weights = dict(model.named_parameters())
        own = [weights[key] for key in group.spec.keys]
        others = [weight for weight in weights.values() if all(weight is not mine for mine in own)]
        table = self.single if name == "single" else self.table
        leaves = [*others, *(own if name == "stock" else [table])]

        def step():
            out = forward()
            gradients = torch.autograd.grad(out, leaves, self.incoming, allow_unused=True)
            return out.detach(), gradients, len(others)

        return step

    def _check(self, provider: Provider, run: Run) -> float:
        """Against the float64 model, on a few images; in training, no gradient comes in from the others."""
        name = provider.name
        if not self.group.training:
            return relative_error(run()[self.probes], self._exact(name)[0])
        whole = self.incoming.clone()
        try:
            self.incoming.zero_()[self.probes] = whole[self.probes]
            out, gradients, count = run()
            rows = torch.cat(gradients[count:]).unsqueeze(0) if name == "stock" else gradients[-1]
            ours = [out[self.probes], rows, gradients[0].unsqueeze(0)]
            return max(relative_error(mine, exact) for mine, exact in zip(ours, self._exact(name), strict=True))
        finally:
            self.incoming.copy_(whole)

    def _exact(self, name: str) -> list[Tensor]:
        """Output (probes, D); in training also the gradients of the rows (T, P) and of the first weight (1, ...)."""
        one_row = {"stock": self.group.base, "single": self.single}
        kind = name if name in one_row else "mixed"
        if kind not in self.expected:
            ids = torch.zeros_like(self.task_ids) if name in one_row else self.task_ids
            self.expected[kind] = self._compute_exact(one_row.get(name, self.table), ids)
        return self.expected[kind]

    def _compute_exact(self, table: Tensor, task_ids: Tensor) -> list[Tensor]:
        group = self.group
        table = table.detach().double().requires_grad_(group.training)
        if group.is_coupled:
            out = NaiveTower(group.exact, group.spec)(group.images.double(), table, task_ids)[self.probes]
        else:
            out = torch.cat([self._one_exact(table, task_ids, probe) for probe in self.probes.tolist()])
        if not group.training:
            return [out.detach()]
        first = next(weight for key, weight in group.exact.named_parameters() if key not in group.spec.keys)
        incoming = self.incoming[self.probes].double()
        rows, weight = torch.autograd.grad(out, [table, first], incoming)
        return [out.detach(), rows, weight.unsqueeze(0)]

    def _one_exact(self, table: Tensor, task_ids: Tensor, probe: int) -> Tensor:
        """Output (1, D) of the stock model that holds the row of one image."""
        group, row = self.group, table[int(task_ids[probe])]
        values = dict(zip(group.spec.keys, row.split(group.spec.sizes)))
        image = group.images[probe : probe + 1].double()
        return torch.func.functional_call(group.exact, values, (image,))


def _casting(forward: Callable[[], Tensor], device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    def cast_forward():
        with torch.autocast(device.type, dtype):
            return forward()

    return cast_forward


def _inference(forward: Callable[[], Tensor]) -> Run:
    def infer():
        with torch.inference_mode():
            return forward()

    return infer
