"""`hyperclip bench kernels` and `model`: the defaults of this device, and the run itself. Arguments: cli/bench.py."""

import argparse
from collections.abc import Iterable, Sequence

import torch

from hyperclip_fast.bench.cases import kernels as kernel_cases
from hyperclip_fast.bench.cases import models as model_cases
from hyperclip_fast.bench.choices import DEFAULTS, OPERATIONS, STEPS
from hyperclip_fast.bench.harness import plots
from hyperclip_fast.bench.harness.machine import default_device, describe
from hyperclip_fast.bench.harness.report import Report, header
from hyperclip_fast.bench.harness.runner import Case, run_case
from hyperclip_fast.utils.extras import require


def run_command(args: argparse.Namespace) -> int:
    """Run what the arguments ask for; 1 if a provider computed wrongly or raised."""
    device = torch.device(args.device or default_device())
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.plots:
        require("matplotlib", "bench")  # missed before an hour of measuring, not after
    options = _options(args, device)
    report = Report(describe(device, dtype), args.json)
    print(header(report.machine), flush=True)
    make = kernel_cases.kernel_cases if args.what == "kernels" else model_cases.model_cases
    measure(make(**options, dtype=dtype, device=device), report, args.seconds, args.providers)
    if args.plots:
        for path in plots.draw({"machine": report.machine, "rows": report.rows}, args.plots):
            print(f"plot: {path}")
    return 1 if report.problems else 0


def measure(cases: Iterable[Case], report: Report, seconds: float, names: Sequence[str] | None = None) -> None:
    """Run cases, with the providers of these names or with all, and report each as it is done."""
    for case in cases:
        if names is not None:
            case.providers = [provider for provider in case.providers if provider.name in names]
        if case.providers:
            report.add(run_case(case, seconds))


def _options(args: argparse.Namespace, device: torch.device) -> dict[str, list]:
    """The arguments, checked, with this device's defaults for those that were not given."""
    options = dict(DEFAULTS["cuda" if device.type == "cuda" else "cpu"][args.what])
    for name in options:
        options[name] = getattr(args, name) or options[name]
    for name in ("widths", "batches", "tasks"):
        if min(options.get(name, [1])) < 1:
            raise ValueError(f"--{name} must be at least 1, got {min(options[name])}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    engines = ["eager", "compiled", *(["graph"] if device.type == "cuda" else [])]
    more = {"operations": args.operations or OPERATIONS} if args.what == "kernels" else {"img_size": args.img_size}
    return {**options, **more, "steps": args.steps or STEPS, "engines": args.engines or engines}
