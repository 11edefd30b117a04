"""`hyperclip embed`: its arguments."""

import argparse

from hyperclip_fast.cli.arguments import add_model, read_labels, read_tasks


def add_embed(commands) -> None:
    """Add the subcommand to the command line's parser."""
    text = "embed pictures in bulk, for many tasks in one pass; a run that was stopped goes on where it was"
    parser = commands.add_parser("embed", help=text, description=text)
    parser.add_argument("images", nargs="+", metavar="PATH", help="image files, folders, webdataset shards (.tar)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", metavar="A,B,C", help="the class names of one task")
    what.add_argument("--tasks", metavar="FILE", help="YAML or JSON: names of tasks with their class names")
    what.add_argument("--bank", metavar="FILE", help="tasks that TaskBank.save wrote")
    parser.add_argument("--manifest", metavar="CSV", help="columns image and task; default: every image in every task")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, or of the run that goes on")
    parser.add_argument(
        "--format", choices=("safetensors", "npy", "parquet"), default="safetensors", help="default: %(default)s"
    )
    parser.add_argument("--part-size", type=int, default=1024, metavar="N", help="images a file; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="that decode; default: %(default)s")
    parser.add_argument("--ray", type=int, default=0, metavar="N", help="N workers on a Ray cluster (extra: ray)")
    add_model(parser)
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
    from hyperclip_fast.embed.embedder import EmbedConfig
    from hyperclip_fast.embed.run import embed
    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.task_bank import TaskBank

    config = EmbedConfig(args.format, args.part_size, args.batch_size, args.device)
    if args.bank is not None:
        tasks: TaskBank | dict[str, list[str]] = TaskBank.load(args.bank, load_model(args.model, args.device))
    else:
        tasks = {"labels": read_labels(args.labels)} if args.labels is not None else read_tasks(args.tasks)
    options = {"ray_workers": args.ray, "threads": args.threads, "progress": True}
    index = embed(args.images, tasks, args.out, config, args.model, args.manifest, **options)
    print(f"{args.out}: {index['images'] - len(index['broken'])} images, {len(index['tasks'])} tasks", end="")
    print(f"; {len(index['broken'])} broken, named in index.json" if index["broken"] else "")
