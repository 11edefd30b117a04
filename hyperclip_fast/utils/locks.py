"""Lock files keep other processes out of what they stand for; the system frees the lock of a killed process."""

import errno
import os
import warnings
from pathlib import Path
from typing import IO


def lock_file(path: str | Path, wanted: str) -> IO[str] | None:
    """Lock a file, made where it is missing, until what is returned is closed.

    Processes that this one forks do not hold the lock; a second lock of this process's own is not refused.

    Args:
        path: the file; it holds the number of the process.
        wanted: what to say to whom comes second: "out must be a folder in which nobody trains, runs/a".

    Returns:
        The open file; None where the platform has no such locks. Where the file system has none, a warning says so.

    Raises:
        ValueError: if another process has locked it.
        OSError: if the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path, "a+")  # noqa: SIM115  # it stays open as long as the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warnings.warn(f"{path} cannot be locked ({error}): nothing keeps other processes out", stacklevel=2)
            return file
        file.seek(0)
        who = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"{wanted}: {who} does") from error
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file
