"""What a command shows: our own lines, on any console."""

import logging
from typing import TextIO

from hyperclip_fast.utils.lazy import after_import


def make_printable(*streams: TextIO) -> None:
    """Characters that a console cannot show are written as escapes; without this they end the program."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


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
