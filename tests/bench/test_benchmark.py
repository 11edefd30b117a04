"""The benchmark measures what it says, refuses what computes wrongly, and keeps what it measured."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hyperclip_fast.bench import choices, gpu_report
from hyperclip_fast.bench.cases import kernels as kernel_cases
from hyperclip_fast.bench.cases import models as model_cases
from hyperclip_fast.bench.cases import operations
from hyperclip_fast.bench.cases.engines import ENGINES, captured
from hyperclip_fast.bench.cases.operations import OPERATIONS
from hyperclip_fast.bench.harness import plots, report, runner
from hyperclip_fast.bench.harness.machine import describe, peak_bytes
from hyperclip_fast.bench.harness.mixes import MIXES, make_task_ids
from hyperclip_fast.cli.main import main
from hyperclip_fast.kernels import tables
from hyperclip_fast.utils import timing

CPU = torch.device("cpu")
TINY = {"img_size": 32, "depth": 1}
MACHINE = {
    **{"device": "a machine", "type": "cpu", "dtype": "float32", "threads": 1, "cores": 2, "commit": None},
    **{"versions": {"torch": "2"}, "allocator": {}},
    **{"copy_bytes_per_second": 1e10, "product_flops_per_second": 1e11},
}


def kernel_rows(*names, engines=("eager",), steps=("forward", "training"), tasks=(1, 5), mixes=("distinct",)):
    cases = kernel_cases.kernel_cases(names, [24], [3], tasks, mixes, steps, engines, torch.float32, CPU, tokens=7)
    return [row for case in cases for row in runner.run_case(case, 0.0, repeats=1)]


def model_rows(engines, steps, tasks=(1, 3), names=None):
    cases = model_cases.model_cases(
        ["vit_tiny_patch16_224"], [5], tasks, ["distinct"], steps, engines, torch.float32, CPU, **TINY
    )
    rows = []
    for case in cases:
        case.providers = [provider for provider in case.providers if names is None or provider.name in names]
        rows += runner.run_case(case, 0.0, repeats=1)
    return rows


def assert_ratios_to_stock(rows):
    """With one round a ratio is exactly that of two times, on the same engine."""
    stock = {(row["engine"], row["tasks"]): row["seconds"][1] for row in rows if row["provider"] == "stock"}
    for row in rows:
        assert row["ratio"][1] == pytest.approx(stock[row["engine"], row["tasks"]] / row["seconds"][1])


def statuses(rows):
    return {(row["provider"], row["engine"]): row["status"] for row in rows}


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_providers_of_an_operation_agree(name):
    """Each was compared with float64 by the runner: outputs, and gradients of every input."""
    rows = kernel_rows(name, mixes=list(MIXES))
    assert len({row["step"] for row in rows}) == 2
    for row in rows:
        if row["provider"] in ("liger", "triton"):
            assert row["status"] == "unavailable" and row["reason"]
        else:
            assert row["status"] == "ok" and 0 < row["error"] < 1e-5
            assert row["seconds"][1] > 0 and row["peak_bytes"] > 0 and row["bytes"] > 0 and row["flops"] > 0
    assert {"stock", "ours"} <= {row["provider"] for row in rows}


@pytest.mark.slow
def test_compiled_operations_are_measured_against_compiled_stock(monkeypatch):
    operation = replace(OPERATIONS["add_layer_norm"], eager_only=("single", "naive"))
    monkeypatch.setitem(OPERATIONS, "add_layer_norm", operation)
    rows = kernel_rows("add_layer_norm", engines=("eager", "compiled"), steps=("training",), tasks=(5,))
    assert statuses(rows)["ours", "compiled"] == statuses(rows)["stock", "compiled"] == "ok"
    assert ("single", "compiled") not in statuses(rows)
    assert_ratios_to_stock(rows)


def wrong_row(x, weight, bias, task_ids):
    ids = task_ids.clone()
    ids[-1] = (ids[-1] + 1) % len(weight)
    return operations._our_layer_norm(x, weight, bias, ids)


def wrong_gradient(x, weight, bias, task_ids):
    return operations._our_layer_norm(x, weight, bias.detach() + 0 * bias, task_ids)


@pytest.mark.parametrize("wrong, red", [(wrong_row, ("forward", "training")), (wrong_gradient, ("training",))])
def test_no_speed_of_what_computes_wrongly(monkeypatch, wrong, red):
    operation = OPERATIONS["layer_norm"]
    providers = {**operation.providers, "ours": wrong}
    monkeypatch.setitem(OPERATIONS, "layer_norm", replace(operation, providers=providers))
    rows = kernel_rows("layer_norm", tasks=(5,))
    for row in rows:
        is_red = row["provider"] == "ours" and row["step"] in red
        assert row["status"] == ("wrong" if is_red else "unavailable" if row["provider"] == "liger" else "ok")
        assert ("seconds" in row) == (row["status"] == "ok")


def test_a_failure_is_reported_and_the_others_are_measured(monkeypatch, capsys, tmp_path):
    def broken(x, weight, bias):
        raise RuntimeError("no such instruction\nand more")

    operation = OPERATIONS["linear_gelu"]
    monkeypatch.setitem(
        OPERATIONS, "linear_gelu", replace(operation, providers={**operation.providers, "ours": broken})
    )
    sizes = ["--operations", "linear_gelu", "--widths", "8", "--batches", "1", "--engines", "eager"]
    file = tmp_path / "run.json"
    assert main(["bench", "kernels", *sizes, "--steps", "forward", "--seconds", "0.01", "--json", str(file)]) == 1
    rows = json.loads(file.read_text())["rows"]
    assert statuses(rows) == {("stock", "eager"): "ok", ("ours", "eager"): "failed", ("triton", "eager"): "unavailable"}
    assert "failed: RuntimeError: no such instruction\n" in capsys.readouterr().out


def test_relative_error_sees_one_row_among_many():
    exact = torch.randn(1000, 4, dtype=torch.float64)
    ours = exact.clone()
    ours[7] *= 1.5
    assert runner.relative_error(exact.float(), exact) < 1e-7
    assert runner.relative_error(ours, exact) > 0.05
    assert runner.relative_error(torch.full_like(exact, math.nan), exact) == math.inf
    with pytest.raises(ValueError, match="ours must have shape"):
        runner.relative_error(ours[:1], exact)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(1, 6), st.sampled_from(list(MIXES)))
def test_least_bytes_of_a_norm_are_its_tensors_and_the_rows_in_use(batch, tokens, width, tasks, mix):
    shape = operations.Shape(batch, tokens, width, tasks, mix, torch.float16, CPU)
    operation = OPERATIONS["add_layer_norm"]
    inputs = operation.named_inputs("ours", operation.inputs(shape))
    out, total = operation.providers["ours"](**inputs)
    rows = inputs["weight"][inputs["task_ids"].unique()]
    forward = sum(tensor.nbytes for tensor in (inputs["x"], inputs["delta"], out, total, rows, rows))
    assert operation.work(inputs, False)[0] == forward
    incoming, kept, gradients = 2 * out.nbytes, total.nbytes + rows.nbytes, 2 * inputs["weight"].nbytes + out.nbytes
    assert operation.work(inputs, True)[0] == forward + incoming + kept + gradients


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.sampled_from(["linear_gelu", "linear_add"]))
def test_least_bytes_of_a_product_are_its_tensors(batch, tokens, width, name):
    operation = OPERATIONS[name]
    shape = operations.Shape(batch, tokens, width, 1, "identical", torch.float32, CPU)
    inputs = operation.named_inputs("ours", operation.inputs(shape))
    out = operation.providers["ours"](**inputs)
    forward = out.nbytes + sum(tensor.nbytes for tensor in inputs.values())
    needed = {key: tensor for key, tensor in inputs.items() if key != "residual"}  # its gradient is the incoming one
    backward = out.nbytes + inputs["x"].nbytes + inputs["weight"].nbytes + sum(map(torch.numel, needed.values())) * 4
    assert [operation.work(inputs, step)[0] for step in (False, True)] == [forward, forward + backward]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 9))
def test_mixes(batch, tasks, seed):
    ids = {mix: make_task_ids(mix, batch, tasks, seed) for mix in MIXES}
    for mix, value in ids.items():
        assert value.shape == (batch,) and value.dtype == torch.int64
        assert value.min() >= 0 and value.max() < tasks
        assert torch.equal(value, make_task_ids(mix, batch, tasks, seed))
    assert len(ids["identical"].unique()) == 1
    assert len(ids["distinct"].unique()) == min(batch, tasks)


def test_skewed_is_zipf():
    counts = make_task_ids("skewed", 60_000, 3).bincount(minlength=3)
    assert torch.allclose(counts / counts.sum(), torch.tensor([6, 3, 2]) / 11, atol=0.01)
    with pytest.raises(ValueError, match="mix must be one of identical"):
        make_task_ids("sorted", 1, 1)


def test_rounds_alternate_and_keep_to_the_time():
    calls = []

    def clock(function):
        function()
        return float(len(calls))

    def candidate(name):
        return lambda: calls.append(name)

    candidates = {"a": candidate("a"), "b": candidate("b")}
    times = timing.interleaved(candidates, 3, warmup=0, clock=clock)
    assert "".join(calls) == "abbaab" and times == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    begin = time.perf_counter()
    slow = timing.interleaved({"sleep": lambda: time.sleep(0.01)}, 1000, seconds=0.02)
    assert timing.MIN_ROUNDS <= len(slow["sleep"]) < 20 and time.perf_counter() - begin < 5


def test_speedup_is_taken_round_by_round():
    """A machine that gets ten times slower half-way moves the medians' ratio, not the rounds'."""
    ours, theirs = [1.0, 1.0, 10.0, 10.0, 10.0], [1.2, 1.2, 12.0, 12.0, 12.0]
    assert timing.speedup(ours, theirs) == pytest.approx((1.2, 1.2, 1.2))
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_peak_bytes_counts_what_lives_at_once():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert peak_bytes(call, CPU) == pytest.approx(8000, rel=0.02)  # two vectors at a time, of three in all


def test_towers_agree_forward_and_in_training():
    rows = model_rows(["eager", "graph"], ["forward", "training"])
    for row in rows:
        if row["engine"] == "graph":
            assert row["status"] == "unavailable" and "GPU" in row["reason"]
        else:
            assert row["status"] == "ok" and row["error"] < 1e-5, row
    assert {row["provider"] for row in rows} == {"stock", "naive", "ours", "single", "loop"}
    assert_ratios_to_stock([row for row in rows if row["step"] == "forward" and row["status"] == "ok"])


def test_a_timed_step_has_gradients_from_every_image():
    sizes = ([5], [3], ["distinct"], ["training"], ["eager"], torch.float32, CPU)
    (case,) = model_cases.model_cases(["vit_tiny_patch16_224"], *sizes, **TINY)
    provider = next(provider for provider in case.providers if provider.name == "ours")
    run = provider.build()
    before = [gradient.clone() for gradient in run()[1] if gradient is not None]
    assert case.check(provider, run) < 1e-5
    after = [gradient for gradient in run()[1] if gradient is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before))


@pytest.mark.slow
def test_engines_run_ours_and_stock():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = model_rows(["frozen", "onnxruntime"], ["forward"], [3], ["stock", "ours"])
    assert len(rows) == 4 and all(row["status"] == "ok" and row["ratio"] for row in rows), rows
    (row,) = model_rows(["compiled"], ["forward"], [3], ["ours"])
    assert row["status"] == "ok", row
    rows = model_rows(["frozen", "onnxruntime"], ["training"], [3], ["ours"])
    assert {row["status"] for row in rows} == {"unavailable"}


@pytest.mark.parametrize("name", ["ours", "naive", "loop"])
@pytest.mark.parametrize("step", ["forward", "training"])
def test_a_tower_that_takes_another_row_is_wrong(monkeypatch, name, step):
    build = model_cases._Mixture._build

    def shifted(self, provider, engine):
        ids = self.task_ids
        self.task_ids = (ids + (provider == name)) % len(self.table)
        try:
            return build(self, provider, engine)
        finally:
            self.task_ids = ids

    monkeypatch.setattr(model_cases._Mixture, "_build", shifted)
    rows = model_rows(["eager"], [step], [3], ["stock", name])
    assert statuses(rows) == {("stock", "eager"): "ok", (name, "eager"): "wrong"}


@pytest.mark.gpu
def test_a_graph_replays_with_new_inputs():
    value = torch.ones(4, device="cuda")
    run = captured(lambda: value * 2, value.device, [])
    value.fill_(3)
    assert torch.equal(run().cpu(), torch.full((4,), 6.0))
    rows = [row for step in ("forward", "training") for row in gpu_rows(step)]
    assert {row["status"] for row in rows} == {"ok"}, rows


def gpu_rows(step):
    sizes = ([8], [5], ["distinct"], [step], ["eager", "graph"], torch.bfloat16, torch.device("cuda"))
    for case in model_cases.model_cases(["vit_tiny_patch16_224"], *sizes, **TINY):
        yield from runner.run_case(case, 0.0, repeats=1)


@pytest.mark.slow
def test_command_prints_writes_and_draws(capsys, tmp_path):
    sizes = ["--widths", "8", "--batches", "2", "--tasks", "1", "4", "--mixes", "distinct", "--engines", "eager"]
    outputs = ["--json", str(tmp_path / "new" / "run.json"), "--plots", str(tmp_path / "plots")]
    assert main(["bench", "kernels", *sizes, "--seconds", "0.01", *outputs]) == 0
    text = capsys.readouterr().out
    assert "a large copy moves" in text and "add_layer_norm  training  D 8  B 2  N 197  T 4  distinct" in text
    assert "pip install liger-kernel" in text
    record = json.loads((tmp_path / "new" / "run.json").read_text())
    assert set(record) == {"machine", "rows", "skipped"}
    assert record["machine"].keys() == describe(CPU, torch.float32).keys()
    assert {row["operation"] for row in record["rows"]} == set(OPERATIONS)
    for row in record["rows"]:
        assert {"operation", "step", "width", "batch", "tokens", "provider", "engine", "status"} <= set(row)
        if row["status"] == "ok":
            low, middle, high = row["seconds"]
            assert 0 < low <= middle <= high and len(row["ratio"]) == 3 and row["repeats"] >= 5
    assert [file.name for file in tmp_path.joinpath("new").iterdir()] == ["run.json"]
    for name in ("roofline", "tasks"):
        image = Image.open(tmp_path / "plots" / f"{name}.png")
        assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 24)) > 100
    assert "| 8 | 2 | 197 | 4 | distinct | ours eager |" in report.markdown(record)


def test_sweeps_show_one_task_in_every_mix():
    rows = [{"operation": "layer_norm", "step": "forward", "mix": mix, "tasks": tasks, "batch": 1}
            for tasks, mix in ((1, "identical"), (9, "identical"), (9, "distinct"))]  # fmt: skip
    panels = plots._sweeps(rows)
    assert [[row["tasks"] for row in panel] for panel in panels.values()] == [[1, 9], [1, 9]]
    assert plots._sweeps(rows[1:]) == {}


@pytest.mark.parametrize("command", [[], ["kernels"], ["model"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *command, "--help"])
    assert stop.value.code == 0 and "usage: hyperclip bench" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["kernels", "--tasks", "0"], "--tasks must be at least 1, got 0"),
        (["model", "--batches", "4", "-3"], "--batches must be at least 1, got -3"),
        (["kernels", "--seconds", "0"], "--seconds must be positive"),
        (["model", "--models", "vit_teeny_patch16_224"], "vit_teeny_patch16_224"),
    ],
)
def test_bad_arguments_are_messages(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("hyperclip_fast.bench.command.describe", lambda *_: MACHINE)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_device_report_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    """End to end: a red test takes its operations out; the time ends in the middle of the models."""
    plan = {"widths": [8], "batches": [1], "tasks": [1], "mixes": ["distinct"], "steps": ["forward"]}
    kernels = [{"operations": ["layer_norm", "linear_gelu"], **plan, "engines": ["eager"]}] * 2
    model = {"models": ["vit_tiny_patch16_224"], "batches": [1], "steps": ["forward"], "tasks": [1]}
    models = [{**model, "mixes": ["distinct"], "engines": ["eager"], "without": ["loop"]}]
    monkeypatch.setattr(gpu_report, "kernel_plan", lambda _: kernels)
    monkeypatch.setattr(gpu_report, "model_plan", lambda _: models)
    monkeypatch.setattr(gpu_report, "model_cases", endless_cases)
    monkeypatch.setattr(gpu_report, "describe", lambda *_: MACHINE)
    monkeypatch.setattr(gpu_report, "device_name", lambda _: "A Machine (R) 1")
    result = {"status": "failed", "seconds": 1, "summary": "1 failed", "failures": ["FAILED test_layer_norm.py::test"]}
    monkeypatch.setattr(gpu_report, "run_tests", lambda files, seconds, log: result)
    arguments = ["--minutes", "0.2", "--out", str(tmp_path / "out"), "--device", "cpu", "--tests", "test_layer_norm.py"]
    begin = time.monotonic()
    assert gpu_report.main(arguments) == 1
    assert time.monotonic() - begin < 120
    record = json.loads((tmp_path / "out" / "a-machine-r-1.json").read_text())
    assert record["tests"] == result
    measured = [(row.get("operation"), row["provider"]) for row in record["rows"]]
    assert measured == [("linear_gelu", name) for name in ("stock", "ours", "triton")]  # once, though planned twice
    assert record["skipped"] == models and record["widest"] == {}
    text = (tmp_path / "out" / "a-machine-r-1.md").read_text()
    assert "Tests failed: 1 failed" in text and "| stock eager |" in text and "no time was left" in text
    assert (tmp_path / "out" / "a-machine-r-1-roofline.png").is_file()


def endless_cases(**_):
    time.sleep(600)
    yield


@pytest.mark.slow
def test_red_tests_are_named_and_slow_ones_stopped(tmp_path):
    red, slow, log = tmp_path / "test_red.py", tmp_path / "test_slow.py", tmp_path / "tests.log"
    bad = "@pytest.mark.parametrize('x', ['a b'])\ndef test_bad(x):\n    assert False\n"
    head = "import time\nimport pytest\npytestmark = pytest.mark.gpu\n"
    red.write_text(f"{head}def test_good():\n    pass\n{bad}")
    slow.write_text(f"{head}def test_slow():\n    time.sleep(600)\n")
    result = gpu_report.run_tests([str(red)], 300, log)
    assert result["status"] == "failed" and result["summary"] == "1 passed, 1 failed"
    assert "assert False" in log.read_text()
    assert len(result["failures"]) == 1 and result["failures"][0].endswith("test_red.py::test_bad[a b]")
    result = gpu_report.run_tests([str(slow)], 3, log)
    assert result["status"] == "stopped" and result["failures"] == []
    result = gpu_report.run_tests([str(tmp_path / "test_none.py")], 300, log)
    assert result["status"] == "failed" and "no tests ran" in result["summary"]


def test_a_report_adds_to_an_earlier_one(tmp_path):
    row = {"operation": "layer_norm", "width": 8, "provider": "ours", "engine": "eager", "status": "ok", "ratio": None}
    row |= {"seconds": (1.0, 1.0, 1.0), "peak_bytes": None, "bytes": 1, "step": "forward"}
    graph = {**row, "engine": "graph", "seconds": (0.8, 0.8, 0.8)}
    earlier = report.Report({**MACHINE, "commit": "a1"}, tmp_path / "earlier.json")
    earlier.add([row, graph, {**row, "width": 16, "status": "failed", "reason": "OutOfMemory"}])
    later = report.Report({**MACHINE, "commit": "b2"}, tmp_path / "later.json")
    later.keep(tmp_path / "earlier.json")
    later.add([{**row, "width": 16}])
    assert [(each["width"], each.get("commit")) for each in later.rows] == [(8, "a1"), (8, "a1"), (16, None)]
    text = report.markdown(later.record())
    assert text.count("| ours eager (host-bound) |") == 1 and text.count("| ours eager |") == 1
    with pytest.raises(ValueError, match="must be of device another, got"):
        report.Report({**MACHINE, "device": "another"}).keep(tmp_path / "earlier.json")


def test_widest_ends_where_a_step_is_lost():
    def row(operation, width, ratio, step="forward", batch=8, provider="triton"):
        ratio = None if ratio is None else (0.5, ratio, 2.0)
        labels = {"operation": operation, "width": width, "step": step, "batch": batch}
        return {**labels, "provider": provider, "engine": "eager", "ratio": ratio}

    rows = [
        *(row("linear_gelu", width, ratio) for width, ratio in ((192, 1.3), (384, 1.2), (768, 1.1))),
        row("linear_gelu", 768, 0.9, step="training"),
        row("linear_gelu", 384, 0.5, batch=1),  # a small batch decides nothing
        row("linear_add", 192, 0.8),
        row("linear_add", 384, 1.2),
        row("layer_norm", 192, 1.2, provider="ours"),
        row("norm_linear", 192, 1.2),
        row("norm_linear", 192, 0.9, step="training"),
        row("linear", 192, None),
    ]
    assert gpu_report.widest(rows) == {"linear_gelu": 384, "linear_add": 0, "norm_linear": 192}


def test_the_kernels_load_the_table_that_was_measured(tmp_path, monkeypatch):
    found = {name: 96 + i for i, name in enumerate(gpu_report.PRODUCTS)}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(gpu_report.kernel_table(found, CPU)))
    for name in found:
        monkeypatch.setitem(tables.WIDEST, name, dict(tables.WIDEST[name]))
    tables.load(path)
    assert {name: tables.WIDEST[name]["large"] for name in found} == found


@pytest.mark.parametrize("is_gpu", [False, True])
def test_plans_name_what_exists(is_gpu):
    for entry in gpu_report.kernel_plan(is_gpu):
        assert set(entry["operations"]) <= set(OPERATIONS) and set(entry["engines"]) <= set(kernel_cases.ENGINES)
    for entry in gpu_report.model_plan(is_gpu):
        assert set(entry["engines"]) <= set(model_cases.TOWERS) and set(entry["mixes"]) <= set(MIXES)
    if is_gpu:
        assert {B for entry in gpu_report.model_plan(True) for B in entry["batches"]} == {1, 8, 64, 256}


def test_the_arguments_name_what_there_is():
    assert tuple(operations.OPERATIONS) == choices.OPERATIONS and tuple(MIXES) == choices.MIXES
    assert choices.ENGINES == tuple(ENGINES) == tuple(model_cases.TOWERS)
    assert choices.KERNEL_ENGINES == kernel_cases.ENGINES
    kernel_providers = {name for operation in operations.OPERATIONS.values() for name in operation.providers}
    assert set(choices.KERNEL_PROVIDERS) == kernel_providers
    assert set(choices.MODEL_PROVIDERS) == {name for names in model_cases.TOWERS.values() for name in names}
