"""The command line: hyperclip demo | classify | embed | train | evaluate | specialize | export | serve | bench, ..."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  hyperclip demo
  hyperclip classify photos/ --labels "cat,dog,parrot"
  hyperclip classify photo.jpg --tasks tasks.yaml --json
  hyperclip embed photos/ --tasks tasks.yaml --out embeddings/
  hyperclip train --config configs/demo.yaml --out runs/demo
  hyperclip evaluate --model runs/demo/model
  hyperclip specialize --labels "cat,dog" --out cat_or_dog/
  hyperclip export mixed --out mixed.onnx
  hyperclip serve --bank tasks.safetensors
  hyperclip bench model --models vit_tiny_patch16_224 --batches 16

A task is a list of class names. A tasks file maps names of tasks to lists of class names, in YAML or JSON:
  {"pets": ["cat", "dog"], "food": ["pizza", "sushi", "salad"]}
"""

EXPORT_EPILOG = """specialized: images to the logits of one task. mixed: images, a table of tasks' rows and task ids to
embeddings: one file for every task. text: tokens of class names to a task's row and class embeddings. Batch, tasks and
classes are dynamic."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: exit status 0, or 1 where what it found is bad; bad input ends with a message and status 2."""
    args = _parser().parse_args(argv)
    try:
        _check_device(args.device)
        status = args.run(args)
    except (ValueError, ImportError, OSError) as error:
        print(f"hyperclip {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    from hyperclip_fast.bench.command import add_bench
    from hyperclip_fast.clip_benchmark import add_clip_benchmark
    from hyperclip_fast.embed_command import add_embed
    from hyperclip_fast.evaluate_command import add_evaluate
    from hyperclip_fast.serve_command import add_serve
    from hyperclip_fast.train_command import add_train

    parser = argparse.ArgumentParser(
        prog="hyperclip",
        description="One small image encoder, adapted to any task by its class names; any mix of tasks in one batch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_classify(commands)
    add_train(commands)
    add_evaluate(commands)
    _add_specialize(commands)
    _add_export(commands)
    add_serve(commands)
    add_bench(commands)
    add_clip_benchmark(commands)
    add_embed(commands)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a trained model's folder or hub id; default: the demo model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...; default: %(default)s")


def _add_demo(commands) -> None:
    text = "classify a mixed batch of pictures the model has never seen, and draw it"
    parser = commands.add_parser("demo", help=text, description=text)
    _add_model(parser)
    parser.add_argument("--out", metavar="PNG", default="demo.png", help="contact sheet; default: %(default)s")
    parser.set_defaults(run=_demo)


def _add_classify(commands) -> None:
    text = "classify image files against tasks; every image is scored in every task, in mixed batches"
    parser = commands.add_parser("classify", help=text, description=text)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", metavar="A,B,C", help="the class names of one task")
    what.add_argument("--tasks", metavar="FILE", help="YAML or JSON: names of tasks with their class names")
    parser.add_argument("--topk", type=int, default=3, metavar="N", help="classes to show; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON, one object an image and task")
    _add_model(parser)
    parser.set_defaults(run=_classify)


def _add_specialize(commands) -> None:
    text = "bake one task into a plain timm model that needs no hypernetwork and no text tower"
    parser = commands.add_parser("specialize", help=text, description=text)
    parser.add_argument("--labels", required=True, metavar="A,B,C", help="the task's class names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    _add_model(parser)
    parser.set_defaults(run=_specialize)


def _add_export(commands) -> None:
    text = "write a part of a model as one file for another runtime, checked against PyTorch"
    parser = commands.add_parser("export", help=text, description=text, epilog=EXPORT_EPILOG)
    parser.add_argument("what", choices=("specialized", "mixed", "text"), help="the part, see below")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write: .onnx, .pt2 or .pte")
    parser.add_argument(
        "--format", choices=("onnx", "torch", "aoti", "executorch"), default="onnx", help="default: %(default)s"
    )
    parser.add_argument("--labels", metavar="A,B,C", help="the task's class names, for specialized")
    parser.add_argument("--model", metavar="DIR", help="a trained model's folder or hub id; default: the demo model")
    parser.set_defaults(run=_export, device="cpu")


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device must be a device that PyTorch finds here, got {name!r}: {reason}") from error


def _demo(args: argparse.Namespace) -> None:
    from hyperclip_fast.demo import run

    run(args.out, args.model, args.device)


def _is_task(names: object) -> bool:
    """Whether these are distinct class names, at least one."""
    good = isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)
    return bool(good) and len(set(names)) == len(names)


def read_labels(text: str) -> list[str]:
    """Class names from "cat,dog".

    Raises:
        ValueError: if there is none, or one comes twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not _is_task(names):
        raise ValueError(f"--labels must be distinct class names separated by commas, got {text!r}")
    return names


def read_tasks(path: str | Path) -> dict[str, list[str]]:
    """Tasks by name from a YAML or JSON file.

    Raises:
        ValueError: if the file is not a mapping of names to lists of class names.
    """
    import yaml

    try:
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--tasks must be a YAML or JSON file, {path} is not: {error}") from error
    if not isinstance(tasks, dict) or not tasks or not all(_is_task(names) for names in tasks.values()):
        example = '{"pets": ["cat", "dog"]}'
        raise ValueError(f"--tasks must map names to lists of distinct class names, as in {example}: {path}")
    return {str(task): names for task, names in tasks.items()}


def _classify(args: argparse.Namespace) -> None:
    import torch

    from hyperclip_fast.data.image_files import find_images, load_image
    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.task_bank import TaskBank
    from hyperclip_fast.utils.extras import require

    tqdm = require("tqdm", "train").tqdm
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
        loaded = {file: load_image(file, model.image_size) for file in dict.fromkeys(file for file, _ in part)}
        images = torch.stack([loaded[file] for file, _ in part]).to(args.device)
        for (file, _), prediction in zip(part, bank.classify(images, [task for _, task in part], args.topk)):
            _print_prediction(file, prediction, args.json)


def _print_prediction(file: Path, prediction, as_json: bool) -> None:
    ranked = dict(zip(prediction.names, (round(p, 4) for p in prediction.probabilities)))
    if as_json:
        print(json.dumps({"image": str(file), "task": prediction.task, "predictions": ranked}, ensure_ascii=False))
    else:
        text = "  ".join(f"{name} {share:.0%}" for name, share in ranked.items())
        print(f"{str(file)[-38:]:<40}{prediction.task:<19} {text}")


def _specialize(args: argparse.Namespace) -> None:
    from hyperclip_fast.export import save_specialized
    from hyperclip_fast.hyperclip import load_model

    labels = read_labels(args.labels)
    save_specialized(load_model(args.model, args.device), labels, args.out)
    print(f"A plain timm model for {len(labels)} classes: {args.out}")
    print(f'  load it with timm.create_model("local-dir:{args.out}", pretrained=True); classes.safetensors scores it')


def _export(args: argparse.Namespace) -> None:
    from hyperclip_fast.export_formats import export
    from hyperclip_fast.export_graphs import mixed_graph, specialized_graph, text_graph
    from hyperclip_fast.hyperclip import load_model

    if (args.what == "specialized") != (args.labels is not None):
        raise ValueError(f"--labels must be given for specialized, and only there, got {args.labels!r} for {args.what}")
    labels = read_labels(args.labels) if args.labels is not None else None
    model = load_model(args.model)
    if labels is not None:
        graph = specialized_graph(model, labels)
    else:
        graph = mixed_graph(model) if args.what == "mixed" else text_graph(model)
    error = export(graph, args.out, args.format)
    print(f"{args.out}: {', '.join(graph.axes)} to {', '.join(graph.outputs)}; within {error:.0e} of PyTorch")


if __name__ == "__main__":
    sys.exit(main())
