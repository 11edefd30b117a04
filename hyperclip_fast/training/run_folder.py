"""A run's folder: config.json, log.jsonl, events for TensorBoard, checkpoint.pt (for resuming) and model/.

Only the first process writes. Files are written beside and renamed.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import remove_unfinished, write_file, written_file, written_folder


class RunFolder:
    """Where one run keeps what it writes.

    Args:
        path: the folder; made where it is missing.
        settings: of the run, written as config.json.
        tensorboard: write events, too.
        writes: False for all processes but the first.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], tensorboard: bool = False, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.events: Any = None  # TensorBoard's writer
        settings, file = json.loads(json.dumps(settings)), self.path / "config.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise ValueError(f"out must be a new folder, or a run with this configuration: {self.path} has another one")
        self.tensorboard = tensorboard and writes
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.path)
            write_file(file, json.dumps(settings, indent=2) + "\n")

    def resume(self) -> dict[str, Any] | None:
        """The last checkpoint, where there is one; log lines of later steps are dropped: they will come again.

        Raises:
            ValueError: if the checkpoint is cut short, or is a pickle of anything but tensors and numbers.
        """
        file = self.path / "checkpoint.pt"
        state = _load_checkpoint(file) if file.exists() else None
        step = state["step"] if state else 0
        if self.writes:
            self._cut_log(step)
        if self.tensorboard:
            writer = require("torch.utils.tensorboard", "train").SummaryWriter
            self.events = writer(str(self.path / "tensorboard"), purge_step=step + 1)
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint."""
        if self.writes:
            with written_file(self.path / "checkpoint.pt") as beside:
                torch.save(state, beside)
            if self.events:
                self.events.flush()

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
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"out must hold a whole checkpoint of a run, got {path}: {reason}") from error
