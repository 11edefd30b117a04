"""What a task is: distinct class names. The one judge, for Python, the command line, the server and saved files."""

import re
from collections.abc import Sequence

MAX_CLASSES = 10_000  # names of a task: the hypernetwork attends among them all, 3 s for so many on one CPU core
MAX_NAMES = 1_000_000  # names of all tasks of a call: 1.5 GB of text features
MAX_CHARACTERS = 1_000  # of a name: text towers cut at 256 tokens or fewer
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and halves of a pair


def check_task(
    class_names: Sequence[str], most_classes: int = MAX_CLASSES, most_characters: int = MAX_CHARACTERS
) -> None:
    """Raise ValueError unless class names make a task: at least one, all of them names, none of them twice."""
    check_class_names(class_names, most_classes, most_characters)
    if len(set(class_names)) != len(class_names):
        twice = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise ValueError(f"a task must have distinct class names, got {twice!r} twice")


def check_tasks(tasks: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless `tasks` are lists of class names that rows can be made of, within the limits.

    Rows may be made of names that repeat, as when an evaluation deals words out anew; a task to classify by may not.
    """
    if isinstance(tasks, str) or not len(tasks):
        raise ValueError(f"tasks must be a non-empty list of lists of class names, got {tasks!r}")
    for task in tasks:
        check_class_names(task)
    if (total := sum(map(len, tasks))) > MAX_NAMES:
        raise ValueError(f"tasks must have at most {MAX_NAMES} class names together, got {total}")


def check_class_names(
    class_names: Sequence[str], most_classes: int = MAX_CLASSES, most_characters: int = MAX_CHARACTERS
) -> None:
    """Raise ValueError unless these are class names, at least one."""
    if isinstance(class_names, str) or not isinstance(class_names, Sequence) or not len(class_names):
        raise ValueError(f"a task must be a non-empty list of class names, got {str(class_names)[:200]!r}")
    if len(class_names) > most_classes:
        raise ValueError(f"a task must have at most {most_classes} class names, got {len(class_names)}")
    for name in class_names:
        check_name(name, "a task's class name", most_characters)


def check_name(name: str, what: str = "a task's name", most_characters: int = MAX_CHARACTERS) -> None:
    """Raise ValueError unless this is a name: text that is not blank, of one line and not too long."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{what} must be text that is not blank, got {name!r}")
    if len(name) > most_characters:
        raise ValueError(f"{what} must have at most {most_characters} characters, got {len(name)}: {name[:50]!r}...")
    if UNPRINTABLE.search(name):
        raise ValueError(f"{what} must have no control characters and no halves of a character, got {name[:50]!r}")
