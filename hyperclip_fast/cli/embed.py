"""`hyperclip embed`: its arguments."""

import argparse

from hyperclip_fast.cli.arguments import add_command, add_model, add_tasks, given_tasks, load_bank

DESCRIPTION = """Embed images in bulk, for many tasks in one pass. The same command continues a run that was
stopped. It needs the extra embed."""
EXAMPLE = """example:
  hyperclip embed photos/ --tasks tasks.yaml --out embeddings/
"""


def add_embed(commands) -> None:
    """Add the subcommand to the command line's parser."""
    parser = add_command(commands, "embed", "embed images in bulk", DESCRIPTION, EXAMPLE)
    parser.add_argument("images", nargs="+", metavar="PATH", help="image files, folders, webdataset shards (.tar)")
    add_tasks(parser)
    text = "table with columns image and task; default: every image in every task"
    parser.add_argument("--manifest", metavar="CSV", help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, or of the run to continue")
    text = "format of the files; default: %(default)s"
    parser.add_argument("--format", choices=("safetensors", "npy", "parquet"), default="safetensors", help=text)
    text = "images in a file; default: %(default)s"
    parser.add_argument("--part-size", type=int, default=1024, metavar="N", help=text)
    text = "images in a forward pass; default: %(default)s"
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help=text)
    text = "threads that decode images; default: %(default)s"
    parser.add_argument("--threads", type=int, default=2, metavar="N", help=text)
    text = "run N workers on a Ray cluster (extra: ray); default: this process alone"
    parser.add_argument("--ray", type=int, default=0, metavar="N", help=text)
    add_model(parser)
    parser.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> None:
    from hyperclip_fast.embed.embedder import EmbedConfig
    from hyperclip_fast.embed.run import embed

    config = EmbedConfig(args.format, args.part_size, args.batch_size, args.device)
    given = given_tasks(args)
    tasks = load_bank(args) if given is None else given
    options = {"ray_workers": args.ray, "threads": args.threads, "progress": True}
    index = embed(args.images, tasks, args.out, config, args.model, args.manifest, **options)
    print(f"{args.out}: {index['images'] - len(index['broken'])} images, {len(index['tasks'])} tasks", end="")
    print(f"; {len(index['broken'])} broken, named in index.json" if index["broken"] else "")
