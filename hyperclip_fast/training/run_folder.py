"""A run's folder: config.json, log.jsonl, events for TensorBoard, checkpoints (for resuming) and model/.

Only the first process writes. Files are written beside and renamed. Of checkpoints the last two are kept: whatever
damages one, and whenever a process is killed, one is whole.
"""

import json
import os
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import remove_unfinished, write_file, written_file, written_folder
from hyperclip_fast.utils.locks import lock_file

LAST, BEFORE, LOCK = "checkpoint.pt", "checkpoint.before.pt", ".lock"
# What zipfile and torch.load raise on damaged bytes.
BROKEN: tuple[type[Exception], ...] = (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, ArithmeticError)
BROKEN += (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)
PARTS = {"model", "optimizer", "scaler", "ema", "step", "broken", "streams"}  # of a checkpoint


class RunFolder:
    """Where one run keeps what it writes; while it is open, no other process opens it to write.

    Args:
        path: the folder; made where it is missing.
        settings: of the run, written as config.json.
        tensorboard: write events, too.
        writes: False for all processes but the first.

    Raises:
        ValueError: if the folder holds a run with other settings, or another process has it open to write.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], tensorboard: bool = False, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.events: Any = None  # TensorBoard's writer
        self._lock: Any = None
        self._is_damaged = False  # the last checkpoint
        settings, file = json.loads(json.dumps(settings)), self.path / "config.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise ValueError(f"out must be a new folder, or a run with this configuration: {self.path} has another one")
        self.tensorboard = tensorboard and writes
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            wanted = f"out must be a folder in which nobody trains, {self.path}"
            self._lock = lock_file(self.path / LOCK, wanted)
            remove_unfinished(self.path)
            write_file(file, json.dumps(settings, indent=2) + "\n")

    def resume(self) -> dict[str, Any] | None:
        """The last checkpoint, where there is one; log lines of later steps are dropped: they will come again.

        Where the last one is damaged it is the one before, with a warning that says so.

        Raises:
            ValueError: if there is no whole checkpoint, but a damaged one, or one that is a pickle of anything but
                tensors and numbers.
        """
        files = [file for file in (self.path / LAST, self.path / BEFORE) if file.exists()]
        state = None
        for i, file in enumerate(files):
            try:
                state = _load_checkpoint(file)
                break
            except ValueError as error:
                if i == len(files) - 1:
                    raise
                self._is_damaged = True
                warnings.warn(f"{error}; the run goes on from {files[i + 1]}", stacklevel=2)
        step = state["step"] if state else 0
        if self.writes:
            self._cut_log(step)
        if self.tensorboard:
            writer = require("torch.utils.tensorboard", "train").SummaryWriter
            self.events = writer(str(self.path / "tensorboard"), purge_step=step + 1)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, and keep the one before."""
        if self.writes:
            last = self.path / LAST
            with written_file(last) as beside:
                torch.save(state, beside)
                with open(beside, "rb+") as content:
                    os.fsync(content.fileno())  # whole on the disk before the others move
                if last.exists() and not self._is_damaged:
                    os.replace(last, self.path / BEFORE)  # killed here, a run goes on from that one
            self._is_damaged = False
            if self.events:
                self.events.flush()

    def close(self) -> None:
        """Let other processes open it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_model(self, model: HyperCLIP) -> None:
        """Write the model, in place of one that is there."""
        with written_folder(self.path / "model", replace=True) as beside:
            model.save_pretrained(beside)

    def log(self, step: int, entry: dict[str, Any]) -> None:
        """Append one JSON line, and numbers to TensorBoard."""
        if not self.writes:
            return
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")
        if self.events is None:
            return
        for name, value in entry.items():
            values = value if isinstance(value, dict) else {"": value}
            for key, number in values.items():
                if number is not None:
                    self.events.add_scalar(f"{name}/{key}" if key else name, number, step)

    def _cut_log(self, step: int) -> None:
        file = self.path / "log.jsonl"
        if file.exists():
            lines = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
            write_file(file, "".join(line + "\n" for line in lines))


def _load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and numbers only: a pickle of anything else is refused, not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:  # torch.load does not look at checksums
                raise ValueError(f"{part} was damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"out must hold a whole checkpoint of a run, got {path}: {reason}") from error
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        lacks = sorted(PARTS - state.keys()) if isinstance(state, dict) else "everything"
        raise ValueError(f"out must hold a whole checkpoint of a run, got {path}, which lacks {lacks}")
    return state
