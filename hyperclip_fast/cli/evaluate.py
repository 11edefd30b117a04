"""`hyperclip evaluate`: zero-shot accuracy, the swap test, corruptions, worst group; and the dense evaluation."""

import argparse
import json

from hyperclip_fast.cli.arguments import add_model

EPILOG = """examples:
  hyperclip evaluate --model runs/demo/model                    # held-out pictures: the swap test, several partitions
  hyperclip evaluate --data photos/ --templates "a photo of a {}."
  hyperclip evaluate --data shards/ --out results.json          # tar shards, results in CLIP_benchmark's shape
  hyperclip evaluate --data openmoji --rows right wrong shuffled generic base
  hyperclip evaluate --data skin-tones                          # worst group over five skin tones
  hyperclip evaluate --data scenes --rows right wrong           # one picture, six questions
  hyperclip evaluate --data openmoji --corruptions noise blur
  hyperclip evaluate --dense                                    # which patch holds which class
"""
DEFAULTS = {"rows": ["right"], "corruptions": [], "classes": 10, "partitions": 5, "batch_size": 128}


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
    add_model(parser)
    parser.add_argument("--data", metavar="WHAT", help="folder of class folders, tar shards, or a built-in set's name")
    parser.add_argument("--classes", type=int, metavar="K", help="names a task of held-out names; default: 10")
    parser.add_argument(
        "--partitions", type=int, metavar="N", help="without --data: ways of parting the names into tasks; default: 5"
    )
    parser.add_argument(
        "--templates", nargs="+", metavar="TEXT", help='such as "a photo of a {}."; default: the model\'s'
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="right wrong shuffled generic base; default: right")
    parser.add_argument("--corruptions", nargs="*", metavar="NAME", help="noise blur contrast pixelate jpeg")
    parser.add_argument("--batch-size", type=int, metavar="B", help="default: 128")
    parser.add_argument("--dense", action="store_true", help="mIoU and pointing accuracy of patches on composed scenes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON there")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.utils.files import write_file

    _settle(args)
    model = load_model(args.model, args.device)
    if args.templates:
        model.text_tower.set_templates(args.templates)
    result, text = _result(args, model)
    if args.out:
        write_file(args.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2) if args.json else text)


def _settle(args: argparse.Namespace) -> None:
    """Refuse what does not apply to this evaluation, and give the rest its defaults."""
    if args.dense:
        what, applies = "with --dense", {"classes"}
    elif args.data is None:
        what, applies = "without --data", {"classes", "partitions", "batch_size"}
    else:
        what, applies = f"with --data {args.data}", {"rows", "corruptions", "batch_size"}
        applies |= {"classes"} if args.data == "openmoji" else set()
    if args.dense and args.data is not None:
        raise ValueError(f"--data must be left out {what}, got {args.data}")
    for name, default in DEFAULTS.items():
        option, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and name not in applies:
            raise ValueError(f"{option} must be left out {what}, got {value}")
        setattr(args, name, default if value is None else value)
    for name, least in (("classes", 2), ("partitions", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")


def _result(args: argparse.Namespace, model) -> tuple[object, str]:
    """What to write as JSON, and what to print."""
    if args.dense:
        from hyperclip_fast.evaluation.dense import dense_scores, dense_table

        result = dense_scores(model, classes=args.classes)
        return result, dense_table(result)
    if args.data is None:
        return _swap_tests(args, model)
    from hyperclip_fast.evaluation.eval_sets import load_eval_set
    from hyperclip_fast.evaluation.zero_shot import evaluate, table

    data = load_eval_set(args.data, model.preprocessing, args.classes)
    records = evaluate(model, data, args.rows, args.corruptions, args.batch_size, args.model or "demo")
    return records, table(records)


def _swap_tests(args: argparse.Namespace, model) -> tuple[object, str]:
    """The swap test on held-out pictures, for each partition of their names into tasks."""
    from hyperclip_fast.data.held_out import held_out_tasks
    from hyperclip_fast.data.pictures import load_pictures
    from hyperclip_fast.evaluation.swapping import partition_table, swap_test

    pictures = load_pictures()
    partitions = [held_out_tasks(pictures, args.classes, seed=seed) for seed in range(args.partitions)]
    results = [swap_test(model, tasks, args.batch_size, progress=True) for tasks in partitions]
    tasks = partitions[0]
    guess = sum(1 / len(task.class_names) for task in tasks) / len(tasks)
    count = sum(len(task.images) for task in tasks)
    head = f"{count} held-out pictures in {len(tasks)} tasks, partitions: {args.partitions}, guessing: {guess:.1%}"
    return results, f"{head}\n\n{partition_table(results)}"
