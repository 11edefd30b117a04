"""hyperclip bench: its arguments."""

import argparse
from collections.abc import Sequence

from hyperclip_fast.bench import choices


def add_bench(commands) -> None:
    """Add the command to the others."""
    text = "time the kernels or whole models against stock timm and naive modulation, on this machine"
    parser = commands.add_parser("bench", help=text, description=text)
    kinds = parser.add_subparsers(dest="what", required=True)
    text = "time each operation with a kernel, alone"
    kernels = kinds.add_parser("kernels", help=text, description=text)
    _add_choice(kernels, "--operations", choices.OPERATIONS)
    _add_list(kernels, "kernels", "widths", int, "D")
    _add_common(kernels, "kernels", choices.KERNEL_ENGINES, choices.KERNEL_PROVIDERS)
    text = "time whole image towers, forward and training step"
    model = kinds.add_parser("model", help=text, description=text)
    _add_list(model, "model", "models", str, "NAME")
    model.add_argument("--img-size", type=int, metavar="S", help="side of the images; default: as each model has it")
    _add_common(model, "model", choices.ENGINES, choices.MODEL_PROVIDERS)
    _add_encoders(kinds)
    _add_serving(kinds)


def _add_common(parser: argparse.ArgumentParser, what: str, engines: Sequence[str], providers: Sequence[str]) -> None:
    _add_list(parser, what, "batches", int, "B")
    _add_list(parser, what, "tasks", int, "T")
    mixes = _default_text(what, "mixes")
    parser.add_argument("--mixes", nargs="+", choices=choices.MIXES, help=f"which tasks a batch mixes; {mixes}")
    _add_choice(parser, "--steps", choices.STEPS)
    parser.add_argument("--engines", nargs="+", choices=engines, help="default: eager compiled, and graph on a GPU")
    parser.add_argument("--providers", nargs="+", choices=providers, help="whom to measure; default: all")
    parser.add_argument("--dtype", choices=choices.DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    _add_device(parser)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed rounds a case; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there, as they come")
    parser.add_argument("--plots", metavar="DIR", help="also draw them there (extra: bench)")
    parser.set_defaults(run=_run_command)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: cuda where PyTorch finds a GPU, else cpu")


def _add_list(parser: argparse.ArgumentParser, what: str, name: str, kind: type, metavar: str) -> None:
    parser.add_argument(f"--{name}", nargs="+", type=kind, metavar=metavar, help=_default_text(what, name))


def _default_text(what: str, name: str) -> str:
    on = {"a CPU": choices.DEFAULTS["cpu"][what][name], "a GPU": choices.DEFAULTS["cuda"][what][name]}
    return "default: " + ", ".join(f"{' '.join(map(str, values))} on {device}" for device, values in on.items())


def _add_choice(parser: argparse.ArgumentParser, name: str, names: Sequence[str]) -> None:
    parser.add_argument(name, nargs="+", choices=names, default=list(names), help="default: all")


def _run_command(args: argparse.Namespace) -> int:
    from hyperclip_fast.bench.command import run_command

    return run_command(args)


def _add_encoders(kinds) -> None:
    text = "compare every named encoder with its stock model: identity, mixed batch, throughput in evaluation"
    parser = kinds.add_parser("encoders", help=text, description=text)
    parser.add_argument(
        "--models", nargs="+", default=list(choices.ENCODERS), metavar="NAME", help="default: all named ones"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="B", help="default: 1 16")
    parser.add_argument("--tasks", type=int, default=16, metavar="T", help="default: %(default)s")
    parser.add_argument("--img-size", type=int, metavar="S", help="side of the images; default: as each model has it")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed rounds a case; default: %(default)s")
    _add_device(parser)
    text = "instead: one task's model beside stock, BatchNorms folded into the convolutions"
    parser.add_argument("--fused", action="store_true", help=text)
    parser.set_defaults(run=_run_encoders)


def _run_encoders(args: argparse.Namespace) -> int:
    from hyperclip_fast.bench.cases.encoders import run_encoders

    return run_encoders(args)


def _add_serving(kinds) -> None:
    text = "load a server that mixes tasks in a batch, and the same one that does not, on loopback"
    parser = kinds.add_parser("serving", help=text, description=text)
    parser.add_argument("--model", metavar="DIR", help="a trained model's folder; default: the demo model")
    parser.add_argument("--tower", metavar="NAME", help="in place of --model: a timm ViT with random weights")
    parser.add_argument("--device", default="cpu", help="of the servers; default: %(default)s")
    for name, default, text in (
        ("threads", 1, "of each server's model on a CPU"),
        ("tasks", 64, "tasks to draw from"),
        ("classes", 10, "class names of a task"),
        ("clients", 64, "requests under way at a time"),
        ("max-batch", 32, "images in a forward pass"),
        ("rounds", 5, "of each server"),
        ("seed", 0, "of the drawing"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a round; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there")
    parser.set_defaults(run=_run_serving)


def _run_serving(args: argparse.Namespace) -> int:
    from hyperclip_fast.bench.serving import run_serving

    return run_serving(args)
