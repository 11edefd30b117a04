"""The command line: puts the commands together, and gives every failure a sentence and an exit status."""

import argparse
import os
import sys
from collections.abc import Sequence

from hyperclip_fast.cli.bench import add_bench
from hyperclip_fast.cli.classify import add_classify
from hyperclip_fast.cli.clip_benchmark import add_clip_benchmark
from hyperclip_fast.cli.console import make_printable, silence_libraries
from hyperclip_fast.cli.demo import add_demo
from hyperclip_fast.cli.embed import add_embed
from hyperclip_fast.cli.evaluate import add_evaluate
from hyperclip_fast.cli.export import add_export, add_specialize
from hyperclip_fast.cli.serve import add_serve
from hyperclip_fast.cli.train import add_train
from hyperclip_fast.version import __version__

EPILOG = """examples:
  hyperclip demo
  hyperclip classify photos/ --labels "cat,dog,parrot"
  hyperclip classify photo.jpg --tasks tasks.yaml --json
  hyperclip embed photos/ --tasks tasks.yaml --out embeddings/
  hyperclip train --config demo --out runs/demo
  hyperclip evaluate --model runs/demo/model
  hyperclip specialize --labels "cat,dog" --out cat_or_dog/
  hyperclip export mixed --out mixed.onnx
  hyperclip serve --bank tasks.safetensors
  hyperclip bench model --models vit_tiny_patch16_224 --batches 16

A task is a list of class names. A tasks file maps names of tasks to lists of class names, in YAML or JSON:
  {"pets": ["cat", "dog"], "food": ["pizza", "sushi", "salad"]}
"""
BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: exit status 0, or 1 where what it found is bad; bad input ends with a message and status 2."""
    make_printable(sys.stdout, sys.stderr)
    args = _parser().parse_args(argv)
    try:
        silence_libraries()
        _check_device(args.device)
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, ImportError, OSError) as error:
        print(f"hyperclip {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperclip",
        description="One small image encoder, adapted to any task by its class names; any mix of tasks in one batch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hyperclip_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_demo(commands)
    add_classify(commands)
    add_train(commands)
    add_evaluate(commands)
    add_specialize(commands)
    add_export(commands)
    add_serve(commands)
    add_bench(commands)
    add_clip_benchmark(commands)
    add_embed(commands)
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
