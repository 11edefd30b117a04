"""The file of a server's tasks: locked against other servers, read once, and written whole whenever tasks change."""

import errno
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.task_bank import TaskBank, fingerprint, save_tasks
from hyperclip_fast.tasks import AdaptedTask
from hyperclip_fast.utils.files import reach_disk, remove_unfinished
from hyperclip_fast.utils.locks import lock_file

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class BankFile:
    """A bank file that one server has to itself.

    Args:
        path: the file.
        model: the model that made its tasks.
        create: write an empty bank where there is no file.
        argument: what the file is called in errors.

    Raises:
        ValueError: if another server has the file, if it does not exist and `create` is False, or if its folder does
            not exist.
    """

    def __init__(self, path: str | Path, model: HyperCLIP, create: bool = False, argument: str = "--bank"):
        if not Path(path).parent.is_dir():
            raise ValueError(f"{argument} must lie in a folder that exists, got {path}")
        self.path, self.model = Path(os.path.realpath(path)), model
        self._made_by = fingerprint(model)
        if not create and not self.path.exists():
            raise ValueError(f"{argument} must be a file of tasks, got {path}, which does not exist; --create makes it")
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            self._lock = lock_file(lock, f"{argument} must be a file that no other server serves, {path}")
        except OSError as error:
            if error.errno not in READ_ONLY or not self.path.exists():
                raise
            warnings.warn(f"{path} lies where nothing can be written: changes of tasks will be refused", stacklevel=2)
            self._lock = None
        remove_unfinished(self.path.parent, self.path.name)
        if not self.path.exists():
            self.write({})

    def read(self) -> dict[str, AdaptedTask]:
        """Its tasks by name.

        Raises:
            ValueError: if it is no bank of this model.
        """
        bank = TaskBank.load(self.path, self.model)
        return {name: bank[name] for name in bank}

    def write(self, tasks: Mapping[str, AdaptedTask]) -> None:
        """Write tasks (beside, then renamed) and wait until they are on the disk.

        Raises:
            OSError: if the disk is full or fails; the file is as before, then.
        """
        save_tasks(self.path, self.model, tasks, self._made_by)
        reach_disk(self.path.parent)

    def close(self) -> None:
        """Let another server have the file."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
