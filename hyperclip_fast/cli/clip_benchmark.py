"""hyperclip clip-benchmark: clip_benchmark's own command with our models registered."""

import argparse

from hyperclip_fast.cli.arguments import add_command

DESCRIPTION = """Run clip_benchmark's own command on our models. The model is specialised for each data set's class
names. --model is hyperclip (the default) or hyperclip-base; --pretrained is a model's folder, a hub id, or demo
(the default). The command needs the extra clip_benchmark."""
EXAMPLE = """example:
  hyperclip clip-benchmark eval --dataset cifar10 --task zeroshot_classification --output result.json
"""


def add_clip_benchmark(commands) -> None:
    """Add the subcommand to the command line's parser."""
    parser = add_command(commands, "clip-benchmark", "run clip_benchmark on our models", DESCRIPTION, EXAMPLE)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="eval ...", help="clip_benchmark's arguments")
    parser.set_defaults(run=_clip_benchmark, device="cpu")


def _clip_benchmark(args: argparse.Namespace) -> None:
    from hyperclip_fast.integrations.clip_benchmark import run

    run(args.rest)
