"""hyperclip demo: its arguments."""

import argparse

from hyperclip_fast.cli.arguments import add_command, add_model

DESCRIPTION = """Classify one batch of pictures that no training step saw, each against its own task's class names.
Print accuracies and speeds, and draw the batch with its predicted names. The command needs the extra demo."""


def add_demo(commands) -> None:
    """Add the command to the others."""
    summary = "classify a batch of pictures of many tasks, and draw it"
    parser = add_command(commands, "demo", summary, DESCRIPTION, "example:\n  hyperclip demo --out demo.png")
    add_model(parser)
    parser.add_argument("--out", metavar="PNG", default="demo.png", help="picture to write; default: %(default)s")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from hyperclip_fast.evaluation.demo import run

    run(args.out, args.model, args.device)
