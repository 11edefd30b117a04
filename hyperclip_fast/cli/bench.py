"""hyperclip bench: its arguments."""

import argparse
from collections.abc import Sequence

from hyperclip_fast.bench import choices
from hyperclip_fast.cli.arguments import add_command, add_device, add_model_path

DESCRIPTION = "Measure kernels, models, encoders or the server on this machine, against stock timm and rivals."
KERNELS = "Time each operation that has a kernel, alone."
MODEL = "Time whole image towers, in forward passes and training steps."
ENCODERS = """Compare encoders with their stock models, in a Markdown table: sizes, differences of the outputs, and
the speed of mixed batches."""
SERVING = """Load a server that mixes tasks in a batch, and one that does not, and compare their throughput. The
command needs the extras bench and serve."""


def add_bench(commands) -> None:
    """Add the command to the others."""
    example = "example:\n  hyperclip bench model --models vit_tiny_patch16_224 --batches 16"
    parser = add_command(commands, "bench", "measure speed on this machine", DESCRIPTION, example)
    parser.set_defaults(parser=parser)
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", title="what to measure")
    example = "example:\n  hyperclip bench kernels --operations add_layer_norm --widths 192"
    kernels = add_command(kinds, "kernels", "time each operation that has a kernel", KERNELS, example)
    _add_choice(kernels, "--operations", choices.OPERATIONS, "operations to time")
    _add_list(kernels, "kernels", "widths", int, "D", "widths of the tokens")
    _add_choice(kernels, "--steps", choices.STEPS, "passes to time")
    _add_common(kernels, "kernels", choices.KERNEL_ENGINES, choices.KERNEL_PROVIDERS)
    example = "example:\n  hyperclip bench model --models vit_tiny_patch16_224 --batches 16"
    model = add_command(kinds, "model", "time whole image towers", MODEL, example)
    _add_list(model, "model", "models", str, "NAME", "timm models")
    _add_side(model)
    on = "forward and training"
    _add_choice(model, "--steps", choices.MODEL_STEPS, "passes to time; autocast trains float32 weights in 16 bits", on)
    _add_common(model, "model", choices.ENGINES, choices.MODEL_PROVIDERS)
    _add_encoders(kinds)
    _add_serving(kinds)


def _add_common(parser: argparse.ArgumentParser, what: str, engines: Sequence[str], providers: Sequence[str]) -> None:
    _add_list(parser, what, "batches", int, "B", "batch sizes")
    _add_list(parser, what, "tasks", int, "T", "numbers of tasks")
    on = _default_text(what, "mixes")
    _add_choice(parser, "--mixes", choices.MIXES, "ways to spread a batch over the tasks", on)
    on = "eager, compiled, and graph on a GPU" if "graph" in engines else "all"
    _add_choice(parser, "--engines", engines, "what runs the model", on)
    _add_choice(parser, "--providers", providers, "implementations to compare")
    text = "type of the numbers; default: float32 on a CPU, bfloat16 on a GPU"
    parser.add_argument("--dtype", choices=choices.DTYPES, help=text)
    _add_best_device(parser)
    _add_seconds(parser, 10.0)
    parser.add_argument("--json", metavar="FILE", help="also write all figures to a file, as they come")
    parser.add_argument("--plots", metavar="DIR", help="also draw plots into a folder (extra: bench)")
    parser.set_defaults(run=_run_command)


def _add_best_device(parser: argparse.ArgumentParser) -> None:
    text = "where to measure; default: cuda if PyTorch finds a GPU, else cpu"
    parser.add_argument("--device", help=text)


def _add_seconds(parser: argparse.ArgumentParser, default: float) -> None:
    text = "seconds of timed rounds for each case; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=default, metavar="S", help=text)


def _add_side(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--img-size", type=int, metavar="S", help="side of the images; default: each model's own")


def _add_list(parser: argparse.ArgumentParser, what: str, name: str, kind: type, metavar: str, about: str) -> None:
    text = f"{about}; default: {_default_text(what, name)}"
    parser.add_argument(f"--{name}", nargs="+", type=kind, metavar=metavar, help=text)


def _default_text(what: str, name: str) -> str:
    cpu, gpu = (" ".join(map(str, choices.DEFAULTS[device][what][name])) for device in ("cpu", "cuda"))
    return cpu if cpu == gpu else f"{cpu} on a CPU, {gpu} on a GPU"


def _add_choice(
    parser: argparse.ArgumentParser, option: str, names: Sequence[str], about: str, default: str = "all"
) -> None:
    text = f"{about}, of {', '.join(names)}; default: {default}"
    parser.add_argument(option, nargs="+", choices=names, metavar="NAME", help=text)


def _run_command(args: argparse.Namespace) -> int:
    from hyperclip_fast.bench.command import run_command

    return run_command(args)


def _add_encoders(kinds) -> None:
    example = "example:\n  hyperclip bench encoders --models mobilenetv3_small_100 --batches 1 16"
    parser = add_command(kinds, "encoders", "compare encoders with their stock models", ENCODERS, example)
    text = f"timm models; default: {' '.join(choices.ENCODERS)}"
    parser.add_argument("--models", nargs="+", default=list(choices.ENCODERS), metavar="NAME", help=text)
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 16], metavar="B", help="batch sizes; default: 1 16"
    )
    parser.add_argument("--tasks", type=int, default=16, metavar="T", help="number of tasks; default: %(default)s")
    _add_side(parser)
    _add_seconds(parser, 5.0)
    _add_best_device(parser)
    text = "instead, time one task's model beside stock, with BatchNorms folded into the convolutions"
    parser.add_argument("--fused", action="store_true", help=text)
    parser.set_defaults(run=_run_encoders)


def _run_encoders(args: argparse.Namespace) -> int:
    from hyperclip_fast.bench.cases.encoders import run_encoders

    return run_encoders(args)


def _add_serving(kinds) -> None:
    example = "example:\n  hyperclip bench serving --clients 64 --rounds 5"
    parser = add_command(kinds, "serving", "compare a server that mixes tasks with one that does not", SERVING, example)
    add_model_path(parser)
    parser.add_argument("--tower", metavar="NAME", help="in place of --model, a timm ViT with random weights")
    add_device(parser)
    for name, default, text in (
        ("threads", 1, "PyTorch's threads of each server, on a CPU"),
        ("tasks", 64, "tasks that the clients ask for"),
        ("classes", 10, "class names in a task"),
        ("clients", 64, "requests at a time"),
        ("max-batch", 32, "images in a forward pass"),
        ("rounds", 5, "rounds of each server"),
        ("seed", 0, "seed of the clients' choices"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: %(default)s")
    text = "seconds of a round; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help=text)
    parser.add_argument("--json", metavar="FILE", help="also write all figures to a file")
    parser.set_defaults(run=_run_serving)


def _run_serving(args: argparse.Namespace) -> int:
    from hyperclip_fast.bench.serving import run_serving

    return run_serving(args)
