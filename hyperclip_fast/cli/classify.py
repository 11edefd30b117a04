"""hyperclip classify: image files against tasks, in mixed batches."""

import argparse
import json
from pathlib import Path

from hyperclip_fast.cli.arguments import add_model, read_labels, read_tasks
from hyperclip_fast.cli.console import shortened


def add_classify(commands) -> None:
    """Add the command to the others."""
    text = "classify image files against tasks; every image is scored in every task, in mixed batches"
    parser = commands.add_parser("classify", help=text, description=text)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", metavar="A,B,C", help="the class names of one task")
    what.add_argument("--tasks", metavar="FILE", help="YAML or JSON: names of tasks with their class names")
    parser.add_argument("--topk", type=int, default=3, metavar="N", help="classes to show; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON, one object an image and task")
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


def _print_prediction(file: Path, prediction, as_json: bool) -> None:
    ranked = dict(zip(prediction.names, (round(p, 4) for p in prediction.probabilities)))
    if as_json:
        print(json.dumps({"image": str(file), "task": prediction.task, "predictions": ranked}, ensure_ascii=False))
    else:
        text = "  ".join(f"{name} {share:.0%}" for name, share in ranked.items())
        print(f"{shortened(str(file), 38):<40}{prediction.task:<19} {text}")
