"""Arguments that several commands take, and what they read."""

import argparse
import csv
import textwrap
from pathlib import Path

from hyperclip_fast.utils.class_names import check_named_tasks, check_task
from hyperclip_fast.utils.text_files import read_yaml

EXAMPLE = '{"pets": ["cat", "dog"]}'


def add_command(commands, name: str, summary: str, description: str, ending: str) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        commands: what `add_subparsers` returned.
        name: of the command.
        summary: its line in the list of commands.
        description: sentences at the head of its help.
        ending: the end of its help, as it is; an example.
    """
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 96),
        epilog=ending,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_path(parser: argparse.ArgumentParser) -> None:
    """Which model a command runs."""
    text = "a trained model's folder or hub id, or demo, the shipped model; default: demo"
    parser.add_argument("--model", help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model a command runs, and where."""
    add_model_path(parser)
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a command runs its model."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...; default: %(default)s")


def add_tasks(parser: argparse.ArgumentParser):
    """Which tasks a command runs; one way to say it is required, and the group that is returned takes others."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--labels", metavar="A,B,C", help="class names of a single task, separated by commas")
    group.add_argument("--tasks", metavar="FILE", help="YAML or JSON file that maps tasks to lists of class names")
    group.add_argument("--bank", metavar="FILE", help="tasks that `hyperclip bank create` or the server saved")
    return group


def load_bank(args: argparse.Namespace):
    """The TaskBank that `add_tasks` and `add_model` ask for; a saved one needs no text tower.

    Raises:
        ValueError: for tasks that are none, or a bank of another model.
    """
    tasks = given_tasks(args)  # before the model, whose loading takes seconds

    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.task_bank import TaskBank

    model = load_model(args.model, args.device)
    if tasks is None:
        return TaskBank.load(args.bank, model)
    bank = TaskBank(model)
    bank.add_many(tasks)
    return bank


def given_tasks(args: argparse.Namespace) -> dict[str, list[str]] | None:
    """Class names by task, of --labels or --tasks; None where there is a bank."""
    if args.labels is not None:
        return {"labels": read_labels(args.labels)}
    return None if args.tasks is None else read_tasks(args.tasks)


def read_labels(text: str) -> list[str]:
    """Class names from "cat,dog"; a name with a comma stands in double quotes, as in CSV.

    Raises:
        ValueError: if there is none, or one comes twice, or a quote stays open.
    """
    try:
        lines = list(csv.reader([text], skipinitialspace=True, strict=True))
        names = [name.strip() for line in lines for name in line if name.strip()]
        check_task(names)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--labels must be distinct class names separated by commas, got {text!r}: {error}") from error
    return names


def read_tasks(path: str | Path) -> dict[str, list[str]]:
    """Tasks by name from a YAML or JSON file.

    Raises:
        ValueError: if the file is not a mapping of names to tasks, see `check_named_tasks`.
    """
    tasks = read_yaml(path, "--tasks")
    try:
        check_named_tasks(tasks)
        if not tasks:
            raise ValueError("there are none")
    except ValueError as error:
        raise ValueError(f"--tasks must be a file of tasks, as {EXAMPLE}, {path} is not: {error}") from error
    return tasks
