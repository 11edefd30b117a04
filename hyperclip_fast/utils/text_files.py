"""Files that people write: YAML or JSON, and tables. What is wrong with one is a ValueError with its name and line."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20  # of a YAML or JSON file: a million class names take half of it


def read_yaml(path: str | Path, name: str) -> Any:
    """The content of a YAML or JSON file, of plain values only; JSON is read as JSON.

    Args:
        path: the file.
        name: what to call it in an error.

    Raises:
        ValueError: for a file that is neither, that is too long or nested too deep, or in which a key comes twice.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{name} must be a file of at most {MAX_BYTES} bytes, {path} has {path.stat().st_size}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return parse_json(text) if path.suffix.lower() == ".json" else parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a YAML or JSON file, {path} is not: {error}") from error


def parse_yaml(text: str) -> Any:
    """A value in YAML or JSON.

    Raises:
        ValueError: if it is neither.
    """
    import yaml

    if text.lstrip()[:1] in ("{", "["):  # YAML's flow style, too, but JSON's escapes are others
        try:
            return parse_json(text)
        except json.JSONDecodeError:
            pass
    try:
        return yaml.load(text, _loader(yaml))  # noqa: S506  # a SafeLoader
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def parse_json(text: str) -> Any:
    """A value in JSON, as the standard has it: Python's reader takes NaN, and numbers that no float holds, too.

    Raises:
        ValueError: if it is none, is nested too deep, or has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:20])


def _distinct(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


def _loader(yaml: Any) -> Any:
    """A loader of plain values: without aliases, by which a short file may stand for any amount, or keys twice."""

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                event = self.peek_event()
                raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [(self.construct_object(key, deep=True), value) for key, value in node.value]
            seen: set[Any] = set()
            for (key, _), (mark, _) in zip(pairs, node.value):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", mark.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep)

    return PlainLoader


def table_lines(path: str | Path, columns: Sequence[str], name: str) -> list[dict[str, str]]:
    """The lines of a CSV file, or of a TSV file where its name ends so, with a header; cells without spaces around.

    In a CSV file a cell may be quoted, in a TSV file a quote is a character like others. A spreadsheet's byte order
    mark is no part of the first column's name. Empty lines are none; cells that a line lacks are empty.

    Args:
        path: the file.
        columns: those that it must have.
        name: what to call it in an error.

    Raises:
        ValueError: for a file without these columns, in another encoding than UTF-8, with a line of more cells than
            the header has, or with a quote that nobody closes.
    """
    path, lines = Path(path), []
    options: dict[str, Any] = {"strict": True}
    if path.suffix.lower() == ".tsv":
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, **options)
            header = [cell.strip() for cell in next(reader, [])]
            if not set(columns) <= set(header):
                raise ValueError(f"it must have the columns {' and '.join(columns)}, and has {header}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) > len(header):
                    raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}")
                cells += [""] * (len(header) - len(cells))
                lines.append({key: cell.strip() for key, cell in zip(header, cells)})
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be a table in UTF-8, {path} is not: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{name} must be a table, {path} is not: line {reader.line_num}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} must be a table, {path} is not: {error}") from error
    return lines
