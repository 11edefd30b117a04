"""`make gpu-report`: the GPU's tests, then the benchmark, in a given number of minutes, written as it goes.

Into the folder `--out`, named after the device: <device>.json, <device>.md, <device>-roofline.png, <device>-tasks.png,
and on a GPU <device>-table.json, the part of kernels/tables.py that was measured here. What matters most is
measured first; what no time is left for is listed. On a CPU it measures less, by the same path.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hyperclip_fast.bench.cases.engines import release_memory
from hyperclip_fast.bench.cases.kernels import kernel_cases
from hyperclip_fast.bench.cases.models import model_cases
from hyperclip_fast.bench.cases.operations import OPERATIONS
from hyperclip_fast.bench.harness import plots
from hyperclip_fast.bench.harness.machine import default_device, describe, device_name
from hyperclip_fast.bench.harness.mixes import MIXES
from hyperclip_fast.bench.harness.report import LABELS, Report, header, markdown
from hyperclip_fast.bench.harness.runner import run_case
from hyperclip_fast.kernels import tables
from hyperclip_fast.utils.files import write_file

TI, S, B = "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"
NORMS = ["layer_norm", "add_layer_norm"]
PRODUCTS = [name for name in OPERATIONS if "linear" in name]
TESTS = "quick or gpu"
Plan = list[dict[str, Any]]


def kernel_plan(is_gpu: bool) -> Plan:
    """Arguments of kernel_cases, the most telling first."""
    if not is_gpu:
        small = {"widths": [192], "batches": [4], "steps": ["forward", "training"], "mixes": ["distinct"]}
        return [
            {"operations": NORMS, **small, "tasks": [1, 16, 4096], "engines": ["eager"]},
            {"operations": PRODUCTS, **small, "tasks": [1], "engines": ["eager"]},
            {"operations": ["add_layer_norm"], **small, "tasks": [16], "engines": ["compiled"]},
        ]
    widths, steps, both = [192, 384, 768], ["forward", "training"], ["compiled", "graph"]
    full = {"widths": widths, "batches": [256], "tasks": [256], "mixes": ["distinct"]}
    return [
        {"operations": ["add_layer_norm"], **full, "steps": steps, "engines": both},
        {"operations": ["linear_gelu"], **full, "steps": steps, "engines": ["graph"]},
        {"operations": ["add_layer_norm"], **full, "steps": steps, "engines": ["graph"], "tasks": [1, 16, 256, 4096]},
        {"operations": PRODUCTS, **full, "steps": steps, "engines": ["graph"]},
        {"operations": NORMS, **full, "steps": steps, "engines": ["graph"], "batches": [1, 8, 64, 256]},
        {"operations": ["add_layer_norm"], **full, "steps": ["forward"], "engines": ["graph"], "mixes": list(MIXES)},
        {"operations": PRODUCTS, **full, "steps": steps, "engines": ["graph"], "batches": [1, 8, 64]},
    ]


def model_plan(is_gpu: bool) -> Plan:
    """Arguments of model_cases, and providers to do without, the most telling first."""
    mix = {"mixes": ["distinct"]}
    if not is_gpu:
        return [
            {"models": [TI], "batches": [2], "steps": ["forward"], "tasks": [1, 16, 4096], "engines": ["eager"], **mix},
            {"models": [TI], "batches": [2], "steps": ["training"], "tasks": [16], "engines": ["eager"], **mix},
            {"models": [TI], "batches": [2], "steps": ["forward"], "tasks": [16], "engines": ["compiled"], **mix},
        ]
    quick, steps = ["eager", "graph"], ["forward", "training"]
    one = {"tasks": [256], **mix, "without": ["loop"]}  # 256 passes are a minute
    return [
        {"models": [S], "batches": [256], "steps": [*steps, "autocast"], "engines": quick, **one},
        {"models": [TI, B], "batches": [256], "steps": steps, "engines": quick, **one},
        {"models": [S], "batches": [64], "steps": ["forward"], "engines": ["eager", "compiled", "graph"], **one},
        {"models": [S], "batches": [256], "steps": steps, "engines": ["compiled"], **one},
        {"models": [TI, S, B], "batches": [1, 8], "steps": ["forward"], "engines": quick, **one},
        {"models": [S], "batches": [64], "steps": ["forward"], "engines": ["graph"], **one, "tasks": [1, 16, 4096]},
        {"models": [TI, B], "batches": [256], "steps": ["autocast"], "engines": quick, **one},
        {"models": [S], "batches": [64], "steps": ["forward"], "engines": ["eager"], **mix, "tasks": [16]},
        {"models": [TI, S, B], "batches": [8, 64], "steps": ["training"], "engines": quick, **one},
    ]


class OutOfTime(BaseException):
    """A part's time is over; no Exception, so that nothing takes it for a provider's failure."""


class _Deadline:
    """Interrupts what runs when the time, in seconds of time.monotonic, has come."""

    def __init__(self, when: float):
        self.left = max(0.01, when - time.monotonic())

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, self.left, 5)  # again, should the first be lost in a destructor

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)

    @staticmethod
    def _stop(*_):
        raise OutOfTime


def run_part(make, plan: Plan, report: Report, when: float, seconds: float, **common) -> None:
    """Measure a plan until it is done or the time has come; what was not begun or not finished goes to `skipped`.

    What the report holds already, without a failure, is not measured again.
    """
    done = {_group(row, row["engine"]) for row in report.rows}
    done -= {_group(row, row["engine"]) for row in report.rows if _may_do_better(row)}
    for i, entry in enumerate(plan):
        without = entry.get("without", ())
        arguments = {key: value for key, value in entry.items() if key != "without"}
        try:
            with _Deadline(when):
                for case in make(**arguments, **common):
                    new = [p for p in case.providers if _group(case.labels, p.engine) not in done]
                    case.providers = [provider for provider in new if provider.name not in without]
                    if case.providers:
                        release_memory(case.device)
                        report.add(run_case(case, seconds))
                        done |= {_group(case.labels, provider.engine) for provider in case.providers}
        except OutOfTime:
            report.skipped.extend(plan[i:])
            report.write()
            return
        except Exception as error:  # a failed capture may leave a GPU's state behind: the next entry has its own chance
            report.skipped.append({**entry, "error": f"{type(error).__name__}: {error}"[:200]})
            report.write()


def _may_do_better(row: Mapping[str, Any]) -> bool:
    """Whether a row of an earlier run tells of a failure that may have been mended."""
    return row["status"] in ("failed", "wrong") or row.get("reason", "").startswith("out of memory")


def _group(labels: Mapping[str, Any], engine: str) -> tuple:
    """What is measured together: the providers of a case on one engine, of which `labels` may be a row."""
    return (engine, *(labels.get(key) for key in LABELS))


def run_tests(files: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run one case of every test, and all that need a GPU, for at most so many seconds, side by side if pytest-xdist is
    there; each test's verdict counts from the moment it is printed, and `log` keeps what pytest said.
    """
    command = [sys.executable, "-m", "pytest", "-vv", "-rN", "--tb=short", "-p", "no:cacheprovider", "-m", TESTS]
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "worksteal"]
    environment = {**os.environ, "HYPERCLIP_HYPOTHESIS": "quick"}
    start = time.monotonic()
    with log.open("wb") as output:
        tests = subprocess.Popen(
            [*command, *files], stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = tests.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()
    lines = log.read_text(errors="replace").splitlines()
    verdicts = [verdict for verdict in map(verdict_of, lines) if verdict]
    count = Counter(verdict.lower() for _, verdict in verdicts)
    failures = [test for test, verdict in verdicts if verdict in ("FAILED", "ERROR")]
    status = "failed" if failures or code else "stopped" if code is None else "passed"
    return {
        "files": list(files),
        "status": status,
        "seconds": round(time.monotonic() - start),
        "summary": ", ".join(f"{number} {verdict}" for verdict, number in count.items()) or "\n".join(lines[-3:]),
        "failures": failures,
    }


def verdict_of(line: str) -> tuple[str, str] | None:
    """Test and verdict in a line of `pytest -vv`, with pytest-xdist or without."""
    words = r"(PASSED|SKIPPED|FAILED|ERROR|XFAIL|XPASS)"
    alone = re.match(rf"(\S+::.+?) {words}\b", line)
    shared = re.match(rf"\[gw\d+\] +\[ *\d+%\] {words} (\S+::.*\S)", line)
    return (alone[1], alone[2]) if alone else (shared[2], shared[1]) if shared else None


def widest(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """For each product the widest D up to which Triton beat the stock layers at every width, forward and in training.

    A norm joins a product only where no gradient is wanted: there the forward alone decides.
    """
    result = {}
    for name in dict.fromkeys(row.get("operation") for row in rows):
        mine = [row for row in rows if row.get("operation") == name and row["provider"] == "triton"]
        timed = [row for row in mine if row.get("ratio")]
        timed = [row for row in timed if row["step"] == "forward" or not name.startswith("norm_")]
        large = [row for row in timed if row["batch"] == max(row["batch"] for row in timed)]
        losing = [row["width"] for row in large if row["ratio"][1] <= 1]
        won = [row["width"] for row in large if row["width"] < min(losing, default=float("inf"))]
        if large:
            result[name] = max(won, default=0)
    return result


def kernel_table(found: dict[str, int], device: torch.device) -> dict[str, Any]:
    """What `widest` found, as `kernels/tables.py` loads it."""
    kind = tables.device_kind(device.type, device.index)
    return {"widest": {operation: {kind: width} for operation, width in found.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 if a test failed, or a provider computed wrongly or raised."""
    parser = argparse.ArgumentParser(prog="gpu-report", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default: %(default)s")
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="an earlier JSON of this machine: measure the rest")
    parser.add_argument("--tests", nargs="*", default=[], metavar="FILE", help="run these first; a quarter of the time")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    start, total, device = time.monotonic(), 60 * args.minutes, torch.device(args.device)
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    label = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    report = Report(describe(device, dtype), args.out / f"{label}.json")
    if args.keep:
        report.keep(args.keep)
    print(header(report.machine), flush=True)
    red: set[str] = set()
    if args.tests:
        report.more["tests"] = tests = run_tests(args.tests, 0.25 * total, args.out / f"{label}-tests.log")
        print(f"\ntests {tests['status']} in {tests['seconds']} s: {tests['summary']}", *tests["failures"], sep="\n")
        red = {name for name, operation in OPERATIONS.items() if any(operation.tests in f for f in tests["failures"])}
    common = {"dtype": dtype, "device": device}
    kernels = list(_without(kernel_plan(is_gpu), red))
    run_part(kernel_cases, kernels, report, start + 0.45 * total, 0.5, **common)
    run_part(model_cases, model_plan(is_gpu), report, start + 0.95 * total, 1.5, **common)
    report.more["not measured: their tests failed"] = sorted(red)
    report.more["widest"] = widest(report.rows)
    report.write()
    record = report.record()
    write_file(args.out / f"{label}.md", markdown(record))
    if report.more["widest"]:
        table = kernel_table(report.more["widest"], device)
        write_file(args.out / f"{label}-table.json", json.dumps(table, indent=1) + "\n")
    try:
        paths = plots.draw(record, args.out, f"{label}-")
    except ImportError as error:  # a host that has no matplotlib still has its figures
        paths = [error]
    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(report.rows)} rows in {minutes:.1f} minutes: {report.path}", *paths, sep="\n")
    return 1 if report.problems or red or report.more.get("tests", {}).get("status") == "failed" else 0


def _without(plan: Plan, red: set[str]) -> Iterator[dict[str, Any]]:
    """A plan without some operations."""
    for entry in plan:
        left = [operation for operation in entry["operations"] if operation not in red]
        if left:
            yield {**entry, "operations": left}


if __name__ == "__main__":
    sys.exit(main())
