"""hyperclip bank: tasks adapted once and kept in a file, which classify, embed and serve take."""

import argparse
from itertools import islice

from hyperclip_fast.cli.arguments import add_command, add_model, read_tasks

DESCRIPTION = """Adapt a model to the tasks of a file, and save their norm rows and class embeddings. The commands that
take --bank then need neither the text tower nor the hypernetwork. A bank belongs to the model that made it."""
EXAMPLE = """example:
  hyperclip bank create --tasks tasks.yaml --out tasks.safetensors
"""
AT_ONCE = 64  # tasks between two moves of the bar


def add_bank(commands) -> None:
    """Add the command to the others."""
    parser = add_command(commands, "bank", "adapt to tasks once, and save them", DESCRIPTION, EXAMPLE)
    parser.add_argument("what", choices=("create",), help="create: adapt to tasks and write the file")
    text = "YAML or JSON file that maps tasks to lists of class names"
    parser.add_argument("--tasks", required=True, metavar="FILE", help=text)
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write, .safetensors")
    add_model(parser)
    parser.set_defaults(run=_bank)


def _bank(args: argparse.Namespace) -> None:
    tasks = read_tasks(args.tasks)

    from tqdm import tqdm

    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.serving.bank_file import BankFile
    from hyperclip_fast.task_bank import TaskBank

    bank = TaskBank(load_model(args.model, args.device))
    waiting = iter(tasks.items())
    with tqdm(total=len(tasks), desc="adapt", unit="task", disable=None) as bar:
        while part := dict(islice(waiting, AT_ONCE)):
            bank.add_many(part)
            bar.update(len(part))
    file = BankFile(args.out, bank.model, create=True, argument="--out")  # a server may have it
    file.write({name: bank[name] for name in bank})
    file.close()
    print(f"{args.out}: {len(bank)} tasks, {sum(map(len, tasks.values()))} class names")
