"""A run's record: printed as it grows, and kept as JSON (whole after every case), as a Markdown table, as plots.

The JSON: {"machine": what bench.machine.describe returns, "rows": what bench.runner.run_case returns, for all cases,
"skipped": arguments of the cases for which no time was left}; a device report adds "tests" and "widest".
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperclip_fast.bench.harness.runner import BASELINE
from hyperclip_fast.utils.files import write_file

Row = dict[str, Any]
LABELS = ("operation", "model", "step", "width", "batch", "tokens", "tasks", "mix")
LETTERS = {"width": "D", "batch": "B", "tokens": "N", "tasks": "T"}


class Report:
    """Rows of a run, printed and written as they come.

    Args:
        machine: what bench.machine.describe returned.
        path: a JSON file, replaced after each case; None: none.
    """

    def __init__(self, machine: dict[str, Any], path: str | Path | None = None):
        self.machine, self.path = machine, None if path is None else Path(path)
        self.rows: list[Row] = []
        self.skipped: list[Row] = []
        self.more: dict[str, Any] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, path: str | Path) -> None:
        """Begin with the rows of an earlier report, each of which tells its commit.

        Raises:
            ValueError: if it was made on another device, or with other numbers.
        """
        earlier = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, theirs, ours in _conditions(earlier["machine"], self.machine):
            if theirs != ours:
                raise ValueError(f"{path} must be of {name} {ours}, got {theirs}")
        commit = earlier["machine"]["commit"]
        self.rows = [{**row, "commit": row.get("commit", commit)} for row in earlier["rows"]]

    def add(self, rows: Sequence[Row]) -> None:
        """Print one case's rows and write all rows so far; kept rows of the same name go."""
        new = {_identity(row) for row in rows}
        self.rows = [row for row in self.rows if _identity(row) not in new] + list(rows)
        print(case_table(rows, self.machine), flush=True)
        self.write()

    def write(self) -> None:
        """Write the JSON: a run that is stopped leaves what it measured."""
        if self.path is None:
            return
        write_file(self.path, json.dumps(self.record(), indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {"machine": self.machine, **self.more, "rows": self.rows, "skipped": self.skipped}

    @property
    def problems(self) -> int:
        """Providers that computed wrongly or raised."""
        return sum(row["status"] in ("wrong", "failed") for row in self.rows)


def _conditions(theirs: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two runs must share, for their rows to stand in one report: names, and both values."""
    packages = (("torch", "triton", "timm"), theirs["versions"], ours["versions"])
    return [
        *((name, theirs[name], ours[name]) for name in ("device", "dtype")),
        *((name, packages[1].get(name), packages[2].get(name)) for name in packages[0]),
    ]


def _identity(row: Row) -> tuple:
    return tuple(row.get(key) for key in (*LABELS, "provider", "engine"))


def header(machine: dict[str, Any]) -> str:
    """What was measured on, in four lines or five."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    allocator = " ".join(f"{key}={value}" for key, value in machine["allocator"].items())
    lines = [
        f"{machine['device']}, {machine['threads']} of {machine['cores']} cores, {machine['dtype']}",
        f"{versions}{commit}",
        f"a large copy moves {machine['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"a large product makes {machine['product_flops_per_second'] / 1e12:.2f} TFLOP/s",
        "seconds and ratios are medians of interleaved rounds, with their quartiles; "
        f"a ratio is to {BASELINE} on the same engine, above 1 is faster",
    ]
    return "\n".join(lines + ([f"allocator: {allocator}"] if allocator else []))


def title(row: Row) -> str:
    """What a case measures, in one line."""
    words = [f"{LETTERS[key]} {row[key]}" if key in LETTERS else str(row[key]) for key in LABELS if key in row]
    return "  ".join(words)


def cells(row: Row, machine: dict[str, Any]) -> list[str]:
    """Time, its spread, ratio, its spread, rates and memory of a row; empty where unknown, or why there are none."""
    if row["status"] != "ok":
        return [f"{row['status']}: {row['reason']}"]
    low, middle, high = row["seconds"]
    spread = f"{100 * (low / middle - 1):+.0f}/{100 * (high / middle - 1):+.0f} %"
    ratio = ["", ""] if row["ratio"] is None else [f"{row['ratio'][1]:.3f}", "{0:.2f}-{2:.2f}".format(*row["ratio"])]
    if "bytes" in row:
        rate = row["bytes"] / middle
        rates = [f"{rate / 1e9:.1f}", f"{100 * rate / machine['copy_bytes_per_second']:.0f} %"]
    else:
        rates = [f"{row['batch'] / middle:.1f}"]
    return [duration(middle), spread, *ratio, *rates, _megabytes(row["peak_bytes"])]


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


def columns(rows: Sequence[Row]) -> list[str]:
    """Names of the cells."""
    rates = ["GB/s", "of copy"] if "operation" in rows[0] else ["images/s"]
    return ["time", "spread", "ratio", "quartiles", *rates, "peak MB"]


def duration(seconds: float) -> str:
    """Seconds, in a unit that suits them."""
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def case_table(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """A case for the terminal: its title and a line a provider."""
    repeats = max((row.get("repeats", 0) for row in rows), default=0)
    widths = (11, 12, 9, 13, 11, 9, 9) if "operation" in rows[0] else (11, 12, 9, 13, 11, 9)
    lines = [f"\n{title(rows[0])}   ({repeats} rounds)"]
    lines.append(f"  {'provider':<20}" + "".join(f"{name:>{width}}" for name, width in zip(columns(rows), widths)))
    for row in rows:
        values = cells(row, machine)
        text = "  " + values[0] if len(values) == 1 else "".join(f"{v:>{w}}" for v, w in zip(values, widths))
        lines.append(f"  {row['provider'] + ' ' + row['engine']:<20}{text}")
    return "\n".join(lines)


def host_bound(rows: Sequence[Row]) -> set[tuple]:
    """Eager rows whose time is the host's: as a CUDA graph the same work takes less than 90 % of it."""
    median = {_identity(row): row["seconds"][1] for row in rows if row["status"] == "ok"}
    eager = (identity for identity in median if identity[-1] == "eager")
    return {identity for identity in eager if median.get((*identity[:-1], "graph"), 1e9) < 0.9 * median[identity]}


def markdown(record: dict[str, Any]) -> str:
    """All rows of a record, as Markdown tables by operation or model and step."""
    machine = record["machine"]
    parts = [f"# {machine['device']}", header(machine).replace("\n", "  \n")]
    if "tests" in record:
        parts.append(f"Tests {record['tests']['status']}: {record['tests']['summary']}")
        parts += record["tests"]["failures"]
    waiting = host_bound(record["rows"])
    groups: dict[str, list[Row]] = {}
    for row in record["rows"]:
        groups.setdefault(f"{row.get('operation') or row['model']}, {row['step']}", []).append(row)
    for name, rows in groups.items():
        keys = [key for key in LABELS[3:] if any(key in row for row in rows)]
        names = [*(LETTERS.get(key, key) for key in keys), "provider", *columns(rows)]
        parts.append(f"## {name}")
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        for row in rows:
            values = cells(row, machine)
            values += [""] * (len(columns(rows)) - len(values))
            labels = [str(row.get(key, "")) for key in keys]
            name = f"{row['provider']} {row['engine']}" + (" (host-bound)" if _identity(row) in waiting else "")
            lines.append("| " + " | ".join([*labels, name, *values]) + " |")
        parts.append("\n".join(lines))
    if record.get("skipped"):
        lines = (", ".join(f"{key} {value}" for key, value in entry.items()) for entry in record["skipped"])
        parts += ["## Not measured, or not all of it: no time was left", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"
