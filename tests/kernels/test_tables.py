"""The kernels' tables, read from a file and written to one."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from hyperclip_fast.kernels import tables
from hyperclip_fast.kernels.tables import TABLES, Tiles, choose_tiles, is_chosen, layer_norm_tiles

GIVEN = {
    "widest": {"linear_add": {"large": 384}},
    "tiles": {"large": {"2": [[64, 64, 32, 4, 4, 2], [64, 128, 32, 4, 4, 2], [128, 64, 64, 1, 8, 1]]}},
    "layer_norm": {"256": [[16, 8], [4, 2]]},
}


@pytest.fixture(autouse=True)
def restored():
    before = copy.deepcopy(TABLES)
    yield
    tables._update(TABLES, before)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_replaces_what_it_holds_and_nothing_else(tmp_path):
    before = copy.deepcopy(TABLES)
    tables.load(write(tmp_path / "table.json", GIVEN))
    x, device = torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.device("cpu")
    assert [is_chosen("linear_add", x, width) for width in (384, 385)] == [True, False]
    assert choose_tiles(device, 2, 256 * 197, 3072, 768) == Tiles(128, 64, 64, 1, 8, 1)
    assert choose_tiles(device, 4, 256 * 197, 3072, 768) == before["tiles"]["large"][4][2]
    assert layer_norm_tiles(192) == (256, (16, 8), (4, 2))
    assert TABLES["widest"]["linear_gelu"] == before["widest"]["linear_gelu"]
    assert TABLES["tiles"]["amd"] == before["tiles"]["amd"]


def test_what_was_saved_loads_as_it_was(tmp_path):
    before = copy.deepcopy(TABLES)
    tables.save(tmp_path / "default.json")
    tables.load(write(tmp_path / "given.json", GIVEN))
    changed = copy.deepcopy(TABLES)
    tables.save(tmp_path / "changed.json")
    assert changed != before
    for name, expected in (("default", before), ("changed", changed)):
        tables.load(tmp_path / f"{name}.json")
        assert expected == TABLES
        assert type(TABLES["tiles"]["large"][2][0]) is Tiles
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.json", "default.json", "given.json"]


REFUSED = {
    "not JSON": ("{", "path must be a JSON file of kernel tables"),
    "a list": ([], r"must have keys among \['widest', 'tiles', 'norm_tiles', 'layer_norm'\]"),
    "another table": ({"wides": {}}, "must have keys among"),
    "another operation": ({"widest": {"linear": {"large": 3}}}, "widest must have keys among .*'linear_add'"),
    "another device": ({"widest": {"linear_add": {"h100": 3}}}, "linear_add must have keys among .*'large'"),
    "a negative width": ({"widest": {"linear_add": {"large": -1}}}, "large must be an integer of at least 0, got -1"),
    "a width in words": ({"widest": {"linear_add": {"large": "all"}}}, "large must be an integer"),
    "true": ({"widest": {"linear_add": {"large": True}}}, "large must be an integer"),
    "too few tiles": ({"tiles": {"large": {"2": [[64, 64, 64, 8, 4, 3]]}}}, "2 must be a list of 3"),
    "a short tile": ({"tiles": {"large": {"2": [[64] * 5] * 3}}}, r"2\[0\] must be a list of 6"),
    "an odd block": ({"tiles": {"large": {"2": [[48, 64, 64, 8, 4, 3]] * 3}}}, "must hold powers of two"),
    "a small block": ({"tiles": {"large": {"2": [[64, 64, 8, 8, 4, 3]] * 3}}}, "blocks of at least 16"),
    "no stage": ({"tiles": {"large": {"2": [[64, 64, 64, 8, 4, 0]] * 3}}}, "at least one stage"),
    "no warp": ({"layer_norm": {"256": [[8, 4], [8, 0]]}}, r"256\[1\] must hold powers of two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_file_is_refused_and_changes_nothing(case, tmp_path):
    content, message = REFUSED[case]
    if isinstance(content, dict):
        content = {**content, "tiles": content.get("tiles", GIVEN["tiles"])}  # with something right in it
    before = copy.deepcopy(TABLES)
    with pytest.raises(ValueError, match=message):
        tables.load(write(tmp_path / "table.json", content))
    assert before == TABLES


@pytest.mark.slow
def test_the_environment_names_a_file(tmp_path):
    path = write(tmp_path / "table.json", {"widest": {"linear_add": {"amd": 192}}})
    code = "from hyperclip_fast.kernels.tables import WIDEST; print(WIDEST['linear_add'])"
    environment = {**os.environ, "HYPERCLIP_KERNEL_TABLE": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "{'large': 0, 'small': 0, 'amd': 192}", done.stderr
