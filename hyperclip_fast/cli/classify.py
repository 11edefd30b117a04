"""hyperclip classify: image files against tasks, in mixed batches."""

import argparse
from pathlib import Path

from hyperclip_fast.cli.arguments import add_command, add_model, add_tasks, read_labels, read_tasks
from hyperclip_fast.cli.console import as_json, shortened

DESCRIPTION = "Classify image files. The command scores every image in every task, and mixes tasks within a batch."
EXAMPLE = """example:
  hyperclip classify photos/ --labels "cat,dog,parrot"
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
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image and task")
    add_model(parser)
    parser.set_defaults(run=_classify)


def _classify(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from hyperclip_fast.data.image_files import find_images, load_image
    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.task_bank import TaskBank

    tasks = {"labels": read_labels(args.labels)} if args.labels is not None else read_tasks(args.tasks)
    if args.batch_size < 1 or args.topk < 1:
        raise ValueError(f"--batch-size and --topk must be at least 1, got {args.batch_size} and {args.topk}")
    files = find_images(args.images)
    model = load_model(args.model, args.device)
    bank = TaskBank(model)
    bank.add_many(tasks)
    work = [(file, task) for file in files for task in tasks]
    if not args.json:
        print(f"{'image':<40}{'task':<20}predictions")
    for start in tqdm(range(0, len(work), args.batch_size), desc="classify", unit="batch", disable=None):
        part = work[start : start + args.batch_size]
        loaded = {file: load_image(file, model.preprocessing) for file in dict.fromkeys(file for file, _ in part)}
        images = torch.stack([loaded[file] for file, _ in part]).to(args.device)
        for (file, _), prediction in zip(part, bank.classify(images, [task for _, task in part], args.topk)):
            _print_prediction(file, prediction, args.json)


def _print_prediction(file: Path, prediction, in_json: bool) -> None:
    ranked = dict(zip(prediction.names, (round(p, 4) for p in prediction.probabilities)))
    if in_json:
        print(as_json({"image": str(file), "task": prediction.task, "predictions": ranked}))
    else:
        text = "  ".join(f"{name} {share:.0%}" for name, share in ranked.items())
        print(f"{shortened(str(file), 38):<40}{prediction.task:<19} {text}")
