"""NormSpec and NormParams: columns, views, ids, files, and what they refuse."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

from hyperclip_fast import HyperViT, NormParams, NormSpec
from hyperclip_fast.utils.files import load_safetensors, save_safetensors

SPEC = NormSpec(("a.norm", "b", "c"), (3, 5, 2), ("*",))
widths_lists = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def make(tasks=4, ids=None, spec=SPEC, dtype=torch.float32):
    return NormParams(spec, torch.randn(tasks, spec.num_params, dtype=dtype), ids)


def same(a, b):
    ids = a.task_ids is None if b.task_ids is None else torch.equal(a.task_ids, b.task_ids)
    return a.spec == b.spec and a.table.dtype == b.table.dtype and torch.equal(a.table, b.table) and ids


def test_vit_tiny_has_9600():
    vit = HyperViT.from_timm("vit_tiny_patch16_224")
    assert vit.norm_spec.num_params == 9600 == vit.base_params.table.shape[1]
    assert len(vit.norm_spec.names) == 25 and set(vit.norm_spec.widths) == {192}
    assert vit.norm_spec.names[:2] == ("blocks.0.norm1", "blocks.0.norm2") and vit.norm_spec.names[-1] == "norm"


@settings(max_examples=50, deadline=None)
@given(widths=widths_lists, tasks=st.integers(1, 4))
def test_a_row_is_weight_and_bias_layer_after_layer(widths, tasks):
    spec = NormSpec([f"n{i}" for i in range(len(widths))], widths)
    params = make(tasks, spec=spec)
    assert spec.num_params == 2 * sum(widths) == sum(spec.sizes)
    column = 0
    for i, (width, (weight, bias)) in enumerate(zip(widths, params.layers(), strict=True)):
        assert spec.offsets[i] == column
        assert torch.equal(weight, params.table[:, column : column + width])
        assert torch.equal(bias, params.table[:, column + width : column + 2 * width])
        for ours, ref in zip(params.layer(i), (weight, bias), strict=True):
            assert torch.equal(ours, ref) and ours.data_ptr() == ref.data_ptr()
        column += 2 * width


@settings(max_examples=25, deadline=None)
@given(widths=widths_lists, tasks=st.integers(1, 4), data=st.data())
def test_row_and_state_dict_are_inverse(widths, tasks, data):
    params = make(tasks, spec=NormSpec([f"n{i}" for i in range(len(widths))], widths))
    task = data.draw(st.integers(0, tasks - 1))
    state = params.state_dict(task)
    assert torch.equal(params.spec.row(state), params.table[task])
    state["n0.weight"] += 1  # a copy: the table keeps its numbers
    assert not torch.equal(params.spec.row(state), params.table[task])


def test_views_share_the_table_and_one_split_is_the_graph():
    params = make()
    params.table.requires_grad_()
    pieces = [piece for pair in params.layers() for piece in pair]
    assert len({piece.grad_fn for piece in pieces}) == 1
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    probes = [torch.randn_like(piece) for piece in pieces]
    sum((piece * probe).sum() for piece, probe in zip(pieces, probes)).backward()
    assert torch.equal(params.table.grad, torch.cat(probes, dim=1))


def test_indexing_and_gather():
    params = make(4)
    picked = params[[2, 0, 2]]
    assert picked.table is params.table and picked.task_ids.tolist() == [2, 0, 2] and picked.num_tasks == 4
    assert picked[torch.tensor([1], dtype=torch.int32)].task_ids.dtype == torch.int32
    assert torch.equal(picked.gather().table, params.table[[2, 0, 2]]) and picked.gather().task_ids is None
    assert params.gather() is params
    one = make(1)[[0, 0]]
    assert one.gather() is one


def test_gather_gives_gradients_to_the_rows_in_use():
    params = make(4)
    params.table.requires_grad_()
    probe = torch.randn(3, SPEC.num_params)
    (params[[2, 0, 2]].gather().table * probe).sum().backward()
    expected = torch.stack([probe[1], torch.zeros(20), probe[0] + probe[2], torch.zeros(20)])
    assert torch.equal(params.table.grad, expected)


def test_to_changes_dtype_and_place():
    params = make(3, [2, 1])
    half = params.to(dtype=torch.bfloat16)
    assert half.table.dtype == torch.bfloat16 and torch.equal(half.table, params.table.bfloat16())
    assert half.task_ids.tolist() == [2, 1] and half.spec is params.spec
    meta = params.to("meta")
    assert meta.table.device.type == meta.task_ids.device.type == "meta"
    assert same(params.to(), params) and same(make(2).to("cpu"), make(2)) is False
    with pytest.raises(ValueError, match=r"table must be floating point, got torch.int32"):
        params.to(dtype=torch.int32)


@pytest.mark.parametrize("ids", [None, [1, 0, 3], torch.tensor([1, 2], dtype=torch.int32), torch.arange(4)[::2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_file_round_trip(tmp_path, ids, dtype):
    params = make(4, ids, dtype=dtype)
    params.save(tmp_path / "rows.safetensors")
    assert same(NormParams.load(str(tmp_path / "rows.safetensors")), params)
    assert NormParams.load(tmp_path / "rows.safetensors").spec.modulate == ("*",)
    assert os.listdir(tmp_path) == ["rows.safetensors"]


def test_expanded_and_transposed_tables_are_saved(tmp_path):
    for table in (torch.randn(1, 20).expand(3, -1), torch.randn(20, 3).T, torch.randn(3, 40)[:, ::2].requires_grad_()):
        NormParams(SPEC, table).save(tmp_path / "rows")
        assert torch.equal(NormParams.load(tmp_path / "rows").table, table)


def test_file_has_the_usual_permissions(tmp_path):
    make().save(tmp_path / "rows")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "rows").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path, old = tmp_path / "rows", make()
    old.save(path)

    def half(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("disk full")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(*(("pathlib.Path.write_bytes", half) if step == "write_bytes" else ("os.replace", refuse)))
    with pytest.raises(OSError, match="disk full"):
        make().save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["rows"] and same(NormParams.load(path), old)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    make(4, [1, 2]).save(folder / "whole")
    content = (folder / "whole").read_bytes()
    (folder / "cut").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError, match="path must be a whole safetensors file, got"):
        NormParams.load(folder / "cut")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(tmp_path_factory, data):
    """Whatever bit of the header flips: rows of the same shape, or a ValueError, never another error."""
    folder = tmp_path_factory.mktemp("bits")
    make(4, [1, 2]).save(folder / "rows")
    content = bytearray((folder / "rows").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "rows").write_bytes(content)
    try:
        params = NormParams.load(folder / "rows")
    except ValueError:
        return
    assert params.table.shape == (4, params.spec.num_params)


FOREIGN = [b"", b"not a tensor file", b"\0" * 64, b'{"names": []}' * 9, bytes(range(256)) * 4]


@pytest.mark.parametrize("content", FOREIGN, ids=["empty", "text", "zeros", "json", "bytes"])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="path must be a whole safetensors file, got"):
        NormParams.load(tmp_path / "file")


def test_safetensors_of_something_else_are_refused(tmp_path):
    cases = {
        "no_spec": ({"table": torch.ones(1, 20)}, None),
        "no_table": ({"weight": torch.ones(1, 20)}, {"norm_spec": SPEC.to_json()}),
        "bad_spec": ({"table": torch.ones(1, 20)}, {"norm_spec": "{}"}),
        "narrow": ({"table": torch.ones(1, 19)}, {"norm_spec": SPEC.to_json()}),
        "ids": ({"table": torch.ones(1, 20), "task_ids": torch.tensor([1])}, {"norm_spec": SPEC.to_json()}),
    }
    messages = {
        "no_spec": "path must be a file of NormParams",
        "no_table": "path must be a file of NormParams, got .*weight",
        "bad_spec": "text must be a NormSpec in JSON",
        "narrow": r"table must be \(T, P\) with P = 20, got shape \(1, 19\)",
        "ids": r"task_ids must lie in \[0, T\) with T = 1, got 1",
    }
    for name, (tensors, metadata) in cases.items():
        save_file(tensors, tmp_path / name, metadata)
        with pytest.raises(ValueError, match=messages[name]):
            NormParams.load(tmp_path / name)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        NormParams.load(tmp_path / "rows")
    with pytest.raises(FileNotFoundError):
        make().save(tmp_path / "no_folder" / "rows")


def test_safetensors_helpers_keep_tensors_and_metadata(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4)}
    save_safetensors(tensors, tmp_path / "file", {"key": "value"})
    loaded, metadata = load_safetensors(tmp_path / "file")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert metadata == {"key": "value"}
    save_file(tensors, tmp_path / "bare")
    assert load_safetensors(tmp_path / "bare")[1] == {}


@settings(max_examples=30, deadline=None)
@given(widths=widths_lists)
def test_spec_round_trips_through_json(widths):
    spec = NormSpec([f"blocks.{i}.é" for i in range(len(widths))], widths, ["blocks.*"])
    back = NormSpec.from_json(spec.to_json())
    assert back == spec and back.modulate == spec.modulate and hash(back) == hash(spec)
    assert isinstance(json.loads(spec.to_json())["names"], list)


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"names": ["a"], "widths": ["b"], "modulate": []}', '{"names"'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="text must be a NormSpec in JSON, got"):
        NormSpec.from_json(text)


@pytest.mark.parametrize(
    ("names", "widths", "message"),
    [
        (["a"], [1, 2], "widths must have one entry a name, got 2 for 1 names"),
        (["a", "a"], [1, 2], "names must be unique"),
        (["a", "b"], [1, 0], r"widths must be positive, got \(1, 0\)"),
    ],
)
def test_spec_refuses(names, widths, message):
    with pytest.raises(ValueError, match=message):
        NormSpec(names, widths)


def test_specs_compare_by_columns_not_by_pattern():
    assert NormSpec(SPEC.names, SPEC.widths) == SPEC
    assert NormSpec(SPEC.names, (3, 5, 3)) != SPEC and NormSpec(("a", "b", "c"), SPEC.widths) != SPEC


def test_spec_from_model():
    model = nn.ModuleDict({"norm1": nn.LayerNorm(4), "fc": nn.Linear(4, 4), "norm2": nn.LayerNorm(3)})
    spec = NormSpec.from_model(model, iter(["norm*"]))
    assert spec.names == ("norm1", "norm2") and spec.widths == (4, 3) and spec.modulate == ("norm*",)
    with pytest.raises(ValueError, match=r"modulate must match a norm layer of ModuleDict, got \('x',\)"):
        NormSpec.from_model(model, ["x"])
    model["norm3"] = nn.LayerNorm(3, bias=False)
    with pytest.raises(ValueError, match=r"modulate: norm3 \(LayerNorm\) must have a weight and a bias"):
        NormSpec.from_model(model, ["norm*"])


def test_row_refuses_other_state_dicts():
    state = make().state_dict()
    with pytest.raises(ValueError, match=r"state_dict must hold b.bias of shape \(5,\), got nothing"):
        SPEC.row({key: value for key, value in state.items() if key != "b.bias"})
    with pytest.raises(ValueError, match=r"state_dict must hold c.weight of shape \(2,\), got shape \(3,\)"):
        SPEC.row({**state, "c.weight": torch.ones(3)})


def test_an_empty_batch_may_be_a_list():
    params = NormParams(SPEC, torch.ones(2, 20))[[]]
    assert params.task_ids.dtype == torch.int64 and params.gather().table.shape == (0, 20)


@pytest.mark.parametrize(
    ("table", "ids", "message"),
    [
        (torch.ones(20), None, r"table must be \(T, P\) with P = 20, got shape \(20,\)"),
        (torch.ones(2, 19), None, r"table must be \(T, P\) with P = 20, got shape \(2, 19\)"),
        (torch.ones(2, 20, dtype=torch.int64), None, "table must be floating point, got torch.int64"),
        (torch.ones(2, 20), [0, 2], r"task_ids must lie in \[0, T\) with T = 2, got 2"),
        (torch.ones(2, 20), [0, -1], r"task_ids must lie in \[0, T\) with T = 2, got -1"),
        (torch.ones(2, 20), [[0]], r"task_ids must be \(B,\), got shape \(1, 1\)"),
        (torch.ones(2, 20), 1, r"task_ids must be \(B,\), got shape \(\)"),
        (torch.ones(2, 20), [0.0], "task_ids must be int64 or int32, got torch.float32"),
        (torch.ones(2, 20), [True], "task_ids must be int64 or int32, got torch.bool"),
        (torch.ones(2, 20), torch.tensor([0], dtype=torch.uint8), "task_ids must be int64 or int32, got torch.uint8"),
    ],
)
def test_params_refuse(table, ids, message):
    with pytest.raises(ValueError, match=message):
        NormParams(SPEC, table, ids)


@pytest.mark.parametrize("ids", [None, [1, 0]])
def test_pytree_round_trip(ids):
    params = make(3, ids)
    leaves, treespec = pytree.tree_flatten({"params": params})
    back = pytree.tree_unflatten(leaves, treespec)["params"]
    assert same(back, params) and back.table is params.table
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(params)[0]]
    assert paths[0] == ".table" and (ids is None or paths[1] == ".task_ids")
    doubled = pytree.tree_map_only(torch.Tensor, lambda tensor: 2 * tensor, make(3))
    assert isinstance(doubled, NormParams) and doubled.spec == SPEC
    assert pytree.treespec_loads(pytree.treespec_dumps(treespec)) == treespec


def test_repr_says_the_sizes():
    assert repr(make(3, [1, 0])) == "NormParams(T=3, P=20, B=2, torch.float32, cpu)"


def test_a_spec_may_be_traced_before_its_first_use():
    """What a spec computes once must not wait for torch.compile, which cannot trace the lock of Python 3.11's cache."""
    spec = NormSpec(("a", "b"), (2, 3))
    table = torch.randn(4, 10)
    layers = torch.compile(lambda table: NormParams(spec, table).layers(), fullgraph=True, backend="eager")(table)
    assert torch.equal(layers[1][0], table[:, 4:7])


def test_layers_without_a_bias():
    spec = NormSpec(("a", "b", "c"), (2, 3, 4), ("*",), (True, False, True))
    assert spec.keys == ("a.weight", "a.bias", "b.weight", "c.weight", "c.bias")
    assert spec.sizes == (2, 2, 3, 4, 4) and spec.offsets == (0, 4, 7) and spec.num_params == 15
    params = NormParams(spec, torch.arange(30.0).view(2, 15))
    assert params.layers()[1][1] is None and params.layer(1)[1] is None
    assert torch.equal(params.layers()[2][0], params.layer(2)[0]) and params.layer(2)[0][0].tolist() == [7, 8, 9, 10]
    assert torch.equal(spec.row(params.state_dict(1)), params.table[1])
    again = NormSpec.from_json(spec.to_json())
    assert again == spec and again.biases == spec.biases and spec != NormSpec(spec.names, spec.widths)
    assert "biases" not in NormSpec(spec.names, spec.widths).to_json()  # older files and ours are the same
    with pytest.raises(ValueError, match="biases must have one entry a name, got 1 for 3"):
        NormSpec(spec.names, spec.widths, biases=(True,))


def test_the_same_content_is_written_as_the_same_bytes(tmp_path):
    metadata = {f"key {i}": "wert ä" * i for i in range(20)}
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7), "c": torch.tensor(1.5, dtype=torch.bfloat16)}
    contents = set()
    for _ in range(8):
        save_safetensors(tensors, tmp_path / "file", metadata)
        contents.add((tmp_path / "file").read_bytes())
        loaded, found = load_safetensors(tmp_path / "file")
        assert found == metadata and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert len(contents) == 1 and len(loaded) == 3
