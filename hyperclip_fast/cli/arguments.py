"""Arguments that several commands take, and what they read."""

import argparse
from pathlib import Path

from hyperclip_fast.utils.class_names import check_name, check_task

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
        ValueError: if the file is not a mapping of names to lists of class names.
    """
    import yaml

    try:
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--tasks must be a YAML or JSON file, {path} is not: {error}") from error
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"--tasks must map names of tasks to lists of class names, as in {EXAMPLE}: {path} does not")
    for task, names in tasks.items():
        try:
            check_name(task)
            if not isinstance(names, list):
                raise ValueError(f"a task must be a list of class names, got {names!r}")
            check_task(names)
        except ValueError as error:
            raise ValueError(
                f"--tasks must map names of tasks to lists of class names, {path} has {task!r}: {error}"
            ) from error
    return tasks
