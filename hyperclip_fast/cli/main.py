"""The command line: puts the commands together, and gives every usual failure a sentence and an exit status."""

import argparse
import sys
from collections.abc import Sequence

from hyperclip_fast.version import __version__

DESCRIPTION = "Adapt one small image encoder to any task by its class names, and mix tasks within a batch."
EPILOG = """examples:
  hyperclip demo
  hyperclip classify photos/ --labels "cat,dog,parrot"
  hyperclip bank create --tasks tasks.yaml --out tasks.safetensors
  hyperclip serve --bank tasks.safetensors --create
  hyperclip train --config folder --set data.path=photos/ --out runs/photos

Each command shows its options: hyperclip classify --help
A task is a list of class names. A tasks file maps names of tasks to lists of class names, in YAML or JSON:
  {"pets": ["cat", "dog"], "food": ["pizza", "sushi", "salad"]}
"""
LEAVE_MEMORY = ("bench", "serve")  # one measures PyTorch as others have it, the other shall be small for long
BAD_INPUT = 2
INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
BROKEN_PIPE = 141  # and of one that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0; 1 where the command says that what it found is bad; 2 for bad input, after a message; 130
        after Ctrl-C; 141 where nobody reads the output any more, as behind `| head`.
    """
    try:
        return _run(argv)
    except BrokenPipeError:
        from hyperclip_fast.cli.console import abandon, has_reader

        if has_reader(sys.stdout):
            raise
        abandon(sys.stdout)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    from hyperclip_fast.cli.console import has_reader, make_printable, silence_libraries
    from hyperclip_fast.utils.memory import keep_freed_memory

    make_printable(sys.stdout, sys.stderr)
    try:
        args = _parser().parse_args(argv)
    finally:
        sys.stdout.flush()  # of --help: a reader that has left is noticed here, not while Python ends
    if not hasattr(args, "run"):
        args.parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        silence_libraries()
        if args.command not in LEAVE_MEMORY:
            keep_freed_memory()
        _check_device(args.device)
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError) and not has_reader(sys.stdout):
            raise
        print(f"hyperclip {args.command}: {error}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    """All commands' arguments; the imports are here so that Ctrl-C during them ends quietly, too."""
    from hyperclip_fast.cli.bank import add_bank
    from hyperclip_fast.cli.bench import add_bench
    from hyperclip_fast.cli.classify import add_classify
    from hyperclip_fast.cli.clip_benchmark import add_clip_benchmark
    from hyperclip_fast.cli.demo import add_demo
    from hyperclip_fast.cli.embed import add_embed
    from hyperclip_fast.cli.evaluate import add_evaluate
    from hyperclip_fast.cli.export import add_export, add_specialize
    from hyperclip_fast.cli.init import add_init
    from hyperclip_fast.cli.serve import add_serve
    from hyperclip_fast.cli.train import add_train

    parser = argparse.ArgumentParser(
        prog="hyperclip",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hyperclip_fast {__version__}")
    parser.set_defaults(parser=parser)  # whose help is shown where a command is missing
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in (
        *(add_demo, add_classify, add_bank, add_embed, add_serve, add_init, add_train, add_evaluate),
        *(add_specialize, add_export, add_bench, add_clip_benchmark),
    ):
        add(commands)
    return parser


def _check_device(name: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device must be a device that PyTorch finds here, got {name!r}: {reason}") from error


if __name__ == "__main__":
    sys.exit(main())
