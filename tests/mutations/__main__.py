"""Sensitivity of the kernels' tests: each mutation is one small mistake in a kernel, and some test must notice it.

    python -m tests.mutations [--only PATTERN]      # all of them take about half an hour on one core

A mutation replaces a text that occurs once in a function, in a copy of the project, never in the checkout; the tests of
that kernel then run in Triton's interpreter, in a child process that finds torch and timm already imported. The exit
status is 1 if a mutation survives. One that changes neither a value nor an access is no mistake and not listed.
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

from tests.mutations.table import MUTATIONS, TESTS

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """One replacement in one function of a file under kernels/."""

    module: str
    function: str
    old: str
    new: str

    def __str__(self):
        return f"{self.module}.{self.function}: {' '.join(self.old.split())!r} -> {' '.join(self.new.split())!r}"

    def apply(self, source: str) -> str:
        """The mutated source of the module.

        Raises:
            ValueError: if the function is not there, or `old` is not there exactly once.
        """
        nodes = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == self.function]
        if len(nodes) != 1:
            raise ValueError(f"{self}: the source has {len(nodes)} functions of this name, expected 1")
        lines = source.splitlines(keepends=True)
        first, last = nodes[0].lineno - 1, nodes[0].end_lineno
        body = "".join(lines[first:last])
        if body.count(self.old) != 1:
            raise ValueError(f"{self}: the text occurs {body.count(self.old)} times in the function, expected once")
        return "".join(lines[:first]) + body.replace(self.old, self.new) + "".join(lines[last:])


def mutations() -> list[Mutation]:
    """All of them, in the order of the table."""
    return [
        Mutation(module, function, *texts)
        for module, functions in MUTATIONS.items()
        for function, pairs in functions.items()
        for texts in pairs
    ]


def source_of(module: str) -> str:
    return (ROOT / "kernels" / f"{module}.py").read_text()


def run_tests(project: Path, tests: tuple[str, ...]) -> str:
    """ "passed", "failed", or what else became of them."""
    log = project / "tests.log"
    child = multiprocessing.get_context("fork").Process(target=_run_tests, args=(project, tests, log))
    child.start()
    child.join(timeout=1800)
    if child.is_alive():  # a loop without an end
        child.kill()
        child.join()
    if child.exitcode < 0 or child.exitcode == pytest.ExitCode.TESTS_FAILED:
        return "failed"
    return "passed" if child.exitcode == pytest.ExitCode.OK else f"no verdict: {log.read_text()[-2000:]}"


def _run_tests(project: Path, tests: tuple[str, ...], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(project)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failure is enough: shrinking it takes minutes
    hypothesis.settings.register_profile("mutations", deadline=None, derandomize=True, phases=phases)
    os.environ["HYPERCLIP_HYPOTHESIS"] = "mutations"
    sys.path[0] = str(project)  # in the place of the checkout
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # the copy's, not the checkout's
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:warnings"]
    os._exit(pytest.main([*options, *tests]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression, searched in 'module.function: old -> new'")
    only = parser.parse_args().only
    chosen = [mutation for mutation in mutations() if re.search(only, str(mutation))]
    survived = []
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("timm", "triton", "torch._dynamo", "torch._inductor"):  # once, not in every child
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        for name in files:
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
        for tests in sorted({TESTS[mutation.module] for mutation in chosen}):
            if (verdict := run_tests(project, tests)) != "passed":
                raise SystemExit(f"{' '.join(tests)} without any mutation: {verdict}")
        for mutation in chosen:
            path, source = project / "kernels" / f"{mutation.module}.py", source_of(mutation.module)
            path.write_text(mutation.apply(source))
            start = time.perf_counter()
            verdict = run_tests(project, TESTS[mutation.module])
            path.write_text(source)
            word = {"failed": "killed", "passed": "SURVIVED"}.get(verdict, verdict)
            print(f"{word:<9}{time.perf_counter() - start:5.0f} s  {mutation}", flush=True)
            if verdict != "failed":
                survived.append(mutation)
    print(f"\n{len(chosen) - len(survived)} of {len(chosen)} mutations killed")
    for mutation in survived:
        print(f"not killed: {mutation}")
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
