"""`hyperclip evaluate`: zero-shot accuracy, the swap test, corruptions, worst group; and the dense evaluation."""

import argparse
import json

from hyperclip_fast.cli.arguments import add_command, add_model

DESCRIPTION = """Measure zero-shot accuracy on --data. Without --data, run the swap test on held-out pictures, which
compares the row of the right class names with the base row and with another task's row. A row is the norm weights that
class names give the encoder; the base row is the encoder's own. With --dense, ask each patch of composed scenes for its
class."""
EXAMPLES = """examples:
  hyperclip evaluate
  hyperclip evaluate --data photos
  hyperclip evaluate --data my_photos/ --templates "a photo of a {}."
  hyperclip evaluate --data openmoji --rows right wrong shuffled generic base
  hyperclip evaluate --data openmoji --corruptions noise blur
  hyperclip evaluate --model runs/vit/model --dense
"""
DEFAULTS = {"rows": ["right"], "corruptions": [], "classes": 10, "partitions": 5, "batch_size": 128}


def add_evaluate(commands) -> None:
    """Add the subcommand to the command line's parser."""
    summary = "measure zero-shot accuracy, and what the right class names are worth"
    parser = add_command(commands, "evaluate", summary, DESCRIPTION, EXAMPLES)
    add_model(parser)
    text = "a folder of class folders, tar shards, or a built-in set: openmoji, digits, skin-tones, scenes, photos"
    parser.add_argument("--data", help=text)
    parser.add_argument("--classes", type=int, metavar="K", help="class names in a task of held-out names; default: 10")
    text = "without --data, split the names into tasks in N ways; default: 5"
    parser.add_argument("--partitions", type=int, metavar="N", help=text)
    text = 'prompts such as "a photo of a {}."; default: the model\'s'
    parser.add_argument("--templates", nargs="+", metavar="TEXT", help=text)
    text = "rows to compare, of right, wrong, shuffled, generic and base; default: right"
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=text)
    text = "also corrupt the images, by noise, blur, contrast, pixelate and jpeg"
    parser.add_argument("--corruptions", nargs="*", metavar="NAME", help=text)
    parser.add_argument("--batch-size", type=int, metavar="B", help="images in a forward pass; default: 128")
    parser.add_argument("--dense", action="store_true", help="measure mIoU and pointing accuracy of patches")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--out", metavar="FILE", help="also write the JSON to a file")
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
