"""`hyperclip evaluate`: zero-shot accuracy, the swap test, corruptions, worst group; and the dense evaluation."""

import argparse
import json
import os
from pathlib import Path

EPILOG = """examples:
  hyperclip evaluate --model runs/demo/model                    # held-out names: right, base and wrong rows, by task
  hyperclip evaluate --data photos/ --templates "a photo of a {}."
  hyperclip evaluate --data shards/ --out results.json          # tar shards, results in CLIP_benchmark's shape
  hyperclip evaluate --data openmoji --rows right wrong shuffled generic base
  hyperclip evaluate --data skin-tones                          # worst group over five skin tones
  hyperclip evaluate --data openmoji --corruptions noise blur
  hyperclip evaluate --dense                                    # which patch holds which class
"""


def add_evaluate(commands) -> None:
    """Add the subcommand to the command line's parser."""
    text = "zero-shot accuracy on a folder, on shards or on built-in sets, with right, wrong, ... class sets"
    parser = commands.add_parser(
        "evaluate",
        help=text,
        description=text,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR", help="a trained model's folder or hub id; default: the demo model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...; default: %(default)s")
    parser.add_argument("--data", metavar="WHAT", help="folder of class folders, tar shards, or a built-in set's name")
    parser.add_argument("--classes", type=int, default=10, metavar="K", help="names a task; default: %(default)s")
    parser.add_argument(
        "--templates", nargs="+", metavar="TEXT", help='such as "a photo of a {}."; default: the model\'s'
    )
    parser.add_argument("--rows", nargs="+", default=["right"], metavar="ROW", help="right wrong shuffled generic base")
    parser.add_argument(
        "--corruptions", nargs="*", default=[], metavar="NAME", help="noise blur contrast pixelate jpeg"
    )
    parser.add_argument("--batch-size", type=int, default=128, metavar="B", help="default: %(default)s")
    parser.add_argument("--dense", action="store_true", help="mIoU and pointing accuracy of patches on composed scenes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON there")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from hyperclip_fast.hyperclip import load_model

    if args.classes < 2:
        raise ValueError(f"--classes must be at least 2, got {args.classes}")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    model = load_model(args.model, args.device)
    if args.templates:
        model.text_tower.set_templates(args.templates)
    result, text = _result(args, model)
    if args.out:
        path = Path(args.out)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    print(json.dumps(result, indent=2) if args.json else text)


def _result(args: argparse.Namespace, model) -> tuple[object, str]:
    """What to write as JSON, and what to print."""
    if args.dense:
        from hyperclip_fast.dense import dense_scores, dense_table

        result = dense_scores(model, classes=args.classes)
        return result, dense_table(result)
    if args.data is None:
        return _by_task(args, model)
    from hyperclip_fast.eval_sets import load_eval_set
    from hyperclip_fast.zero_shot import evaluate, table

    data = load_eval_set(args.data, model.image_size, args.classes)
    records = evaluate(model, data, args.rows, args.corruptions, args.batch_size, args.model or "demo")
    return records, table(records)


def _by_task(args: argparse.Namespace, model) -> tuple[object, str]:
    from hyperclip_fast.data import load_pictures
    from hyperclip_fast.demo import table
    from hyperclip_fast.evaluation import held_out_tasks, swap_test

    tasks = held_out_tasks(load_pictures(), args.classes)
    results = swap_test(model, tasks, args.batch_size, progress=True)
    return results, table(tasks, results)
