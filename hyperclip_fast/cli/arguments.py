"""Arguments that several commands take, and what they read."""

import argparse
from pathlib import Path

from hyperclip_fast.utils.class_names import check_named_tasks, check_task

EXAMPLE = '{"pets": ["cat", "dog"]}'


def add_model_path(parser: argparse.ArgumentParser) -> None:
    """Which model a command runs."""
    parser.add_argument("--model", metavar="DIR", help="a trained model's folder or hub id; default: the demo model")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model a command runs, and where."""
    add_model_path(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...; default: %(default)s")


def read_labels(text: str) -> list[str]:
    """Class names from "cat,dog".

    Raises:
        ValueError: if there is none, or one comes twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        check_task(names)
    except ValueError as error:
        raise ValueError(f"--labels must be distinct class names separated by commas, got {text!r}: {error}") from error
    return names


def read_tasks(path: str | Path) -> dict[str, list[str]]:
    """Tasks by name from a YAML or JSON file.

    Raises:
        ValueError: if the file is not a mapping of names to tasks, see `check_named_tasks`.
    """
    import yaml

    try:
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--tasks must be a YAML or JSON file, {path} is not: {error}") from error
    try:
        check_named_tasks(tasks)
        if not tasks:
            raise ValueError("there are none")
    except ValueError as error:
        raise ValueError(f"--tasks must be a file of tasks, as {EXAMPLE}, {path} is not: {error}") from error
    return tasks
