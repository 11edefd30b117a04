"""hyperclip demo: its arguments."""

import argparse

from hyperclip_fast.cli.arguments import add_model


def add_demo(commands) -> None:
    """Add the command to the others."""
    text = "classify a mixed batch of pictures the model has never seen, and draw it"
    parser = commands.add_parser("demo", help=text, description=text)
    add_model(parser)
    parser.add_argument("--out", metavar="PNG", default="demo.png", help="contact sheet; default: %(default)s")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from hyperclip_fast.evaluation.demo import run

    run(args.out, args.model, args.device)
