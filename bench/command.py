"""`hyperclip bench kernels`, `model` and `encoders`: arguments, defaults for this device, and the run itself."""

import argparse
from collections.abc import Iterable, Sequence

import torch

from hyperclip_fast.bench.cases import kernels as kernel_cases
from hyperclip_fast.bench.cases import models as model_cases
from hyperclip_fast.bench.cases.encoders import add_encoders
from hyperclip_fast.bench.cases.engines import ENGINES
from hyperclip_fast.bench.cases.operations import OPERATIONS
from hyperclip_fast.bench.harness import plots
from hyperclip_fast.bench.harness.machine import default_device, describe
from hyperclip_fast.bench.harness.mixes import MIXES
from hyperclip_fast.bench.harness.report import Report, header
from hyperclip_fast.bench.harness.runner import Case, run_case
from hyperclip_fast.utils.extras import require

from .serving import add_serving

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
# What is measured where nothing is said: a GPU has the time for all of it.
DEFAULTS = {
    "cpu": {
        "kernels": {"widths": [192, 384], "batches": [16], "tasks": [16], "mixes": ["distinct"]},
        "model": {"models": list(MODELS[:2]), "batches": [1, 16, 64], "tasks": [16], "mixes": ["distinct"]},
    },
    "cuda": {
        "kernels": {"widths": [192, 384, 768], "batches": [256], "tasks": [1, 256, 4096], "mixes": list(MIXES)},
        "model": {"models": list(MODELS), "batches": [1, 8, 64, 256], "tasks": [256], "mixes": ["distinct"]},
    },
}


def add_bench(commands) -> None:
    """Add the subcommand to the command line's parser."""
    text = "time the kernels or whole models against stock timm and naive modulation, on this machine"
    parser = commands.add_parser("bench", help=text, description=text)
    kinds = parser.add_subparsers(dest="what", required=True)
    text = "time each operation with a kernel, alone"
    kernels = kinds.add_parser("kernels", help=text, description=text)
    _add_choice(kernels, "--operations", list(OPERATIONS))
    _add_list(kernels, "kernels", "widths", int, "D")
    _add_common(kernels, "kernels", kernel_cases.ENGINES, [operation.providers for operation in OPERATIONS.values()])
    text = "time whole image towers, forward and training step"
    model = kinds.add_parser("model", help=text, description=text)
    _add_list(model, "model", "models", str, "NAME")
    model.add_argument("--img-size", type=int, metavar="S", help="side of the images; default: as each model has it")
    _add_common(model, "model", list(ENGINES), model_cases.TOWERS.values())
    add_encoders(kinds)
    add_serving(kinds)


def _add_common(
    parser: argparse.ArgumentParser, what: str, engines: Iterable[str], providers: Iterable[Iterable[str]]
) -> None:
    providers = list(dict.fromkeys(name for names in providers for name in names))
    _add_list(parser, what, "batches", int, "B")
    _add_list(parser, what, "tasks", int, "T")
    mixes = _default_text(what, "mixes")
    parser.add_argument("--mixes", nargs="+", choices=list(MIXES), help=f"which tasks a batch mixes; {mixes}")
    _add_choice(parser, "--steps", list(kernel_cases.STEPS))
    parser.add_argument("--engines", nargs="+", choices=engines, help="default: eager compiled, and graph on a GPU")
    parser.add_argument("--providers", nargs="+", choices=providers, help="whom to measure; default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed rounds a case; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there, as they come")
    parser.add_argument("--plots", metavar="DIR", help="also draw them there (extra: bench)")
    parser.set_defaults(run=run_command)


def _add_list(parser: argparse.ArgumentParser, what: str, name: str, kind: type, metavar: str) -> None:
    parser.add_argument(f"--{name}", nargs="+", type=kind, metavar=metavar, help=_default_text(what, name))


def _default_text(what: str, name: str) -> str:
    on = {"a CPU": DEFAULTS["cpu"][what][name], "a GPU": DEFAULTS["cuda"][what][name]}
    return "default: " + ", ".join(f"{' '.join(map(str, values))} on {device}" for device, values in on.items())


def _add_choice(parser: argparse.ArgumentParser, name: str, choices: list[str]) -> None:
    parser.add_argument(name, nargs="+", choices=choices, default=choices, help="default: all")


def run_command(args: argparse.Namespace) -> int:
    """Run what the arguments ask for; 1 if a provider computed wrongly or raised."""
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
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
    engines = ["eager", "compiled"] + (["graph"] if device.type == "cuda" and args.what == "model" else [])
    more = {"operations": args.operations} if args.what == "kernels" else {"img_size": args.img_size}
    return {**options, **more, "steps": args.steps, "engines": args.engines or engines}
