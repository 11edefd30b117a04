"""hyperclip clip-benchmark: clip_benchmark's own command with our models registered."""

import argparse


def add_clip_benchmark(commands) -> None:
    """Add the subcommand to the command line's parser."""
    text = "run clip_benchmark with a model specialised for each data set's class names (extra: clip_benchmark)"
    more = "--model hyperclip (the default) or hyperclip-base, --pretrained a folder, a hub id or demo (the default)."
    parser = commands.add_parser("clip-benchmark", help=text, description=f"{text}; {more}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="eval ...", help="clip_benchmark's own arguments")
    parser.set_defaults(run=_clip_benchmark, device="cpu")


def _clip_benchmark(args: argparse.Namespace) -> None:
    from hyperclip_fast.integrations.clip_benchmark import run

    run(args.rest)
