"""What a command shows: our own lines, on any console."""

import functools
import json
import logging
import os
import select
import sys
from typing import Any, TextIO

from hyperclip_fast.utils.lazy import after_import


def make_printable(*streams: TextIO) -> None:
    """Characters that a console cannot show are written as escapes; without this they end the program."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON for stdout; where that is not Unicode, JSON's own escapes stand for what it cannot show."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps(value, ensure_ascii=not is_unicode, indent=indent)


def has_reader(stream: TextIO) -> bool:
    """Whether somebody may still read what is written to a stream; False for a pipe whose reader has left."""
    if not hasattr(select, "poll"):  # Windows, where such a pipe raises another error
        return True
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def abandon(stream: TextIO) -> None:
    """Send what a stream still holds nowhere, so that Python can end without another error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@functools.cache
def silence_libraries() -> None:
    """Keep other libraries' progress and advice off stderr, each at its source; their warnings of faults stay.

    transformers draws a bar for every model that it loads. torchao, which transformers imports where it is installed,
    calls functions that torch has deprecated.
    """
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
    after_import("transformers.utils.logging", _hide_transformers_bars)


def _hide_transformers_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def shortened(text: str, width: int) -> str:
    """A text that fits a column; a longer one loses its beginning, and shows that by an ellipsis."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
