"""What a task is: distinct class names. The one judge, for Python, the command line, the server and saved files.

An answer names a class, so no two classes of a task may share a name: `TaskBank`, `specialize`, the exports, the
commands, the server and `embed` refuse such a task. Two kinds of caller count classes by their place instead, and may
repeat a name: `HyperCLIP.adapt` and what evaluates with it (captions and shuffled words repeat), and
`integrations.open_clip` (ImageNet's usual names hold "missile" and "sunglasses" twice).
"""

import re
import reprlib
from collections.abc import Collection, Mapping, Sequence

MAX_CLASSES = 10_000  # names of a task: the hypernetwork attends among them all, 3 s for so many on one CPU core
MAX_NAMES = 1_000_000  # names of all tasks of a call: 1.5 GB of text features
MAX_CHARACTERS = 1_000  # of a name: text towers cut at 256 tokens or fewer
SHORT = reprlib.Repr()  # what comes from a file may be of any length and depth
SHORT.maxstring = 100
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and halves of a pair


def check_task(
    class_names: Sequence[str], most_classes: int = MAX_CLASSES, most_characters: int = MAX_CHARACTERS
) -> None:
    """Raise ValueError unless class names make a task: at least one, all of them names, none of them twice.

    Args:
        class_names: what is judged.
        most_classes: names allowed.
        most_characters: characters allowed in a name.
    """
    check_class_names(class_names, most_classes, most_characters)
    if len(set(class_names)) != len(class_names):
        twice = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise ValueError(f"a task must have distinct class names, got {SHORT.repr(twice)} twice")


def check_named_tasks(tasks: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError unless these are names of tasks, each with the class names of one, within the limits."""
    if not isinstance(tasks, Mapping):
        raise ValueError(f"tasks must map names of tasks to lists of class names, got {SHORT.repr(tasks)}")
    for name, class_names in tasks.items():
        check_name(name)
        try:
            check_task(class_names)
        except ValueError as error:
            raise ValueError(f"task {SHORT.repr(name)}: {error}") from error
    _check_total(tasks.values())


def check_class_lists(tasks: Sequence[Sequence[str]]) -> None:
    """Raise ValueError unless these are lists of class names that rows can be made of, within the limits.

    A name may come twice in a list: see above.
    """
    if isinstance(tasks, str) or not len(tasks):
        raise ValueError(f"tasks must be a non-empty list of lists of class names, got {SHORT.repr(tasks)}")
    for class_names in tasks:
        check_class_names(class_names)
    _check_total(tasks)


def _check_total(tasks: Collection[Sequence[str]]) -> None:
    if (total := sum(map(len, tasks))) > MAX_NAMES:
        raise ValueError(f"tasks must have at most {MAX_NAMES} class names together, got {total}")


def check_class_names(
    class_names: Sequence[str], most_classes: int = MAX_CLASSES, most_characters: int = MAX_CHARACTERS
) -> None:
    """Raise ValueError unless these are class names, at least one; one may come twice. Arguments as `check_task`."""
    if isinstance(class_names, str) or not isinstance(class_names, Sequence) or not len(class_names):
        raise ValueError(f"a task must be a non-empty list of class names, got {SHORT.repr(class_names)}")
    if len(class_names) > most_classes:
        raise ValueError(f"a task must have at most {most_classes} class names, got {len(class_names)}")
    for name in class_names:
        check_name(name, "a task's class name", most_characters)


def check_name(name: str, what: str = "a task's name", most_characters: int = MAX_CHARACTERS) -> None:
    """Raise ValueError unless this is a name: text that is not blank, of one line and not too long."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{what} must be text that is not blank, got {SHORT.repr(name)}")
    if len(name) > most_characters:
        raise ValueError(f"{what} must have at most {most_characters} characters, got {len(name)}: {SHORT.repr(name)}")
    if UNPRINTABLE.search(name):
        raise ValueError(f"{what} must have no control characters and no halves of a character, got {SHORT.repr(name)}")
