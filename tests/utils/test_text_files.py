"""YAML, JSON and tables that people write: read whole, or refused with the file, the line and the reason."""

import json
import time

import pytest

from hyperclip_fast.utils.text_files import parse_yaml, read_yaml, table_lines

BOMB = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(30))
BAD = {
    "alias bomb": (BOMB, "aliases are not read"),
    "deep YAML": ("[" * 100_000, "nested too deep|expected"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(3000)), "nested too deep"),
    "timestamp": ("a: !!timestamp nothing", "groupdict"),
    "huge integer": ("a: " + "9" * 5000, "digits"),
    "huge float": ("a: !!int 1e999999", "invalid literal"),
    "no key": ("? [a, b]\n: c", "unhashable|list"),
    "twice": ("a: 1\nb: 2\na: 3", "the key 'a' comes twice.*line 3"),
    "an object": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor.*line 1"),
    "a tab": ("a:\n\t- b", "line 2"),
    "not text": ("a: \x00", "special characters"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_yaml_is_one_error_with_the_file(kind, tmp_path):
    text, reason = BAD[kind]
    (tmp_path / "tasks.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"(?s)--tasks must be a YAML or JSON file, .*tasks.yaml is not: .*({reason})"):
        read_yaml(tmp_path / "tasks.yaml", "--tasks")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', "[" * 100_000, "a: 1", ""])
def test_bad_json(text, tmp_path):
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(ValueError, match=r"must be a YAML or JSON file, .*tasks.json is not"):
        read_yaml(tmp_path / "tasks.json", "--tasks")


@pytest.mark.parametrize("suffix", ["json", "yaml", "txt"])
def test_json_is_read_as_json(suffix, tmp_path):
    """With the escapes that json.dump writes for an emoji, tabs, and a byte order mark."""
    tasks = {"faces": ["\U0001f600", "\U0001f622"], "a/b": ["x"]}
    path = tmp_path / f"tasks.{suffix}"
    path.write_text("\ufeff" + json.dumps(tasks, indent="\t"), encoding="utf-8")
    assert "\\ud83d" in path.read_text() and read_yaml(path, "--tasks") == tasks


def test_other_encodings_and_too_long_files(tmp_path, monkeypatch):
    path = tmp_path / "tasks.yaml"
    path.write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(ValueError, match=r"tasks.yaml is not: .utf-8. codec"):
        read_yaml(path, "--tasks")
    monkeypatch.setattr("hyperclip_fast.utils.text_files.MAX_BYTES", 3)
    with pytest.raises(ValueError, match=r"of at most 3 bytes, .*tasks.yaml has 4"):
        read_yaml(path, "--tasks")


def test_values_of_an_option():
    assert [parse_yaml(text) for text in ("1e-3", "[1, 2]", "{a: b}", "null", "a b")] == [
        "1e-3",
        [1, 2],
        {"a": "b"},
        None,
        "a b",
    ]


def test_a_table_of_a_spreadsheet(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefffilepath,title\r\na.png,"one, two"\r\n\r\nb.png\r\n c.png , x \r\n', encoding="utf-8")
    lines = [tuple(line.values()) for line in table_lines(path, ["filepath", "title"], "path")]
    assert lines == [("a.png", "one, two"), ("b.png", ""), ("c.png", "x")]


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('filepath\ttitle\na.png\t"begins\nb.png\tplain "quoted" text\n')
    titles = [line["title"] for line in table_lines(path, ["filepath", "title"], "path")]
    assert titles == ['"begins', 'plain "quoted" text']


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'a,b\n1,"2\n3,4\n', "line 3"),
        (b"a,b\n1,2\n1,2,3\n", "line 3 has 3 cells, the header 2"),
        (b"a,c\n1,2\n", "must have the columns a and b, and has"),
        (b"", "must have the columns a and b, and has"),
        ("a,b\nä,1\n".encode("latin-1"), "in UTF-8.*codec"),
    ],
)
def test_bad_tables(content, reason, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"manifest must be a table.*t.csv is not.*{reason}|{reason}"):
        table_lines(tmp_path / "t.csv", ["a", "b"], "manifest")
