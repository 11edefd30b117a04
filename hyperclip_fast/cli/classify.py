"""hyperclip classify: image files against tasks, in mixed batches."""

import argparse
import csv
import sys
from collections.abc import Callable

from hyperclip_fast.cli.arguments import add_command, add_model, add_tasks, load_bank
from hyperclip_fast.cli.console import as_json, shortened

DESCRIPTION = """Classify image files. The command scores every image in every task, and mixes tasks within a batch.
Results are printed as batches finish. A file that is no whole picture is named on stderr, and then the exit status is
1."""
EXAMPLE = """examples:
  hyperclip classify photos/ --labels "cat,dog,parrot"
  hyperclip classify photos/ --bank tasks.safetensors --csv
"""


def add_classify(commands) -> None:
    """Add the command to the others."""
    parser = add_command(commands, "classify", "classify image files", DESCRIPTION, EXAMPLE)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    add_tasks(parser)
    parser.add_argument(
        "--topk", type=int, default=3, metavar="N", help="show the best N classes; default: %(default)s"
    )
    text = "pairs of an image and a task in a forward pass; default: %(default)s"
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help=text)
    form = parser.add_mutually_exclusive_group()
    text = "print a line of JSON for each image and task"
    form.add_argument("--json", "--jsonl", action="store_true", dest="json", help=text)
    form.add_argument("--csv", action="store_true", help="print a line of CSV for each image, task and class")
    parser.add_argument("--strict", action="store_true", help="end at the first file that is no whole picture")
    add_model(parser)
    parser.set_defaults(run=_classify)


def _classify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hyperclip_fast.data.image_files import find_images

    if args.batch_size < 1 or args.topk < 1:
        raise ValueError(f"--batch-size and --topk must be at least 1, got {args.batch_size} and {args.topk}")
    files = find_images(args.images)
    bank = load_bank(args)
    images = [file for file in files for _ in bank]
    broken: dict[str, None] = {}  # in order, each once

    def skip(file, error: ValueError) -> None:
        if str(file) not in broken:
            tqdm.write(f"hyperclip classify: {error}", file=sys.stderr)
        broken[str(file)] = None

    show = _printer(args)
    on_error = None if args.strict else skip
    predictions = bank.classify_files(images, [*bank] * len(files), args.topk, args.batch_size, on_error)
    for file, prediction in tqdm(predictions, "classify", len(images), unit="image", disable=_is_quiet()):
        show(str(file), prediction)
    if broken:
        print(f"hyperclip classify: {len(broken)} of {len(files)} images could not be read", file=sys.stderr)
    return int(bool(broken))


def _is_quiet() -> bool:
    """Whether a bar would be in the way: where nobody sees it, or where the results go to the same terminal."""
    return not sys.stderr.isatty() or sys.stdout.isatty()


def _printer(args: argparse.Namespace) -> Callable:
    """How an image's name and its Prediction are printed."""
    if args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("image", "task", "rank", "name", "probability"))

        def write(file: str, found) -> None:
            for rank, (name, share) in enumerate(zip(found.names, found.probabilities), 1):
                writer.writerow((file, found.task, rank, name, round(share, 4)))
            sys.stdout.flush()

        return write
    if args.json:
        return lambda file, found: print(
            as_json({"image": file, "task": found.task, "predictions": _ranked(found)}), flush=True
        )
    print(f"{'image':<40}{'task':<20}predictions")
    return _print_line


def _ranked(prediction) -> dict[str, float]:
    return dict(zip(prediction.names, (round(share, 4) for share in prediction.probabilities)))


def _print_line(file: str, prediction) -> None:
    text = "  ".join(f"{name} {share:.0%}" for name, share in _ranked(prediction).items())
    print(f"{shortened(file, 38):<40}{prediction.task:<19} {text}", flush=True)
