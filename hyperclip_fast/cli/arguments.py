"""Arguments that several commands take, and what they read."""

import argparse
from pathlib import Path


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a trained model's folder or hub id; default: the demo model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps, ...; default: %(default)s")


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
