"""A part of the embeddings as a file: safetensors, npy with a JSON file beside it, or parquet.

The bytes depend on the content alone, and each file is written beside and renamed: a part is there or it is not.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.files import save_safetensors, write_file


@dataclass(frozen=True)
class Part:
    """R rows of embeddings.

    Args:
        embeddings: (R, E) float32, of length 1.
        images: the picture of each row.
        tasks: the task of each row.
        broken: pictures that were skipped, with the reason.
    """

    embeddings: Tensor
    images: tuple[str, ...]
    tasks: tuple[str, ...]
    broken: dict[str, str]

    def about(self) -> str:
        """All but the embeddings, as JSON."""
        rows = {"images": self.images, "tasks": self.tasks, "broken": self.broken}
        return json.dumps(rows, ensure_ascii=False)


@dataclass(frozen=True)
class Format:
    """How a part is written and what it left out is read; `suffix` is that of the file that is written last."""

    suffix: str
    write: Callable[[Part, Path], None]
    broken: Callable[[Path], dict[str, str]]


def _write_safetensors(part: Part, path: Path) -> None:
    save_safetensors({"embeddings": part.embeddings}, path, {"about": part.about()})


def _safetensors_broken(path: Path) -> dict[str, str]:
    with require("safetensors", "embed").safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])["broken"]


def _write_npy(part: Part, path: Path) -> None:
    buffer = io.BytesIO()
    require("numpy", "embed").save(buffer, part.embeddings.numpy(), allow_pickle=False)
    write_file(path.with_suffix(".npy"), buffer.getvalue())
    write_file(path, part.about().encode())


def _npy_broken(path: Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8"))["broken"]


def _write_parquet(part: Part, path: Path) -> None:
    arrow, parquet = require("pyarrow", "embed"), require("pyarrow.parquet", "embed")
    values = arrow.array(part.embeddings.numpy().reshape(-1))
    columns = {
        "image": arrow.array(part.images, arrow.string()),
        "task": arrow.array(part.tasks, arrow.string()),
        "embedding": arrow.FixedSizeListArray.from_arrays(values, part.embeddings.shape[1]),
    }
    table = arrow.table(columns).replace_schema_metadata({"broken": json.dumps(part.broken, ensure_ascii=False)})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue())


def _parquet_broken(path: Path) -> dict[str, str]:
    return json.loads(require("pyarrow.parquet", "embed").read_schema(path).metadata[b"broken"])


FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _safetensors_broken),
    "npy": Format(".json", _write_npy, _npy_broken),
    "parquet": Format(".parquet", _write_parquet, _parquet_broken),
}
