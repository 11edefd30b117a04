"""`hyperclip bench serving`: a loaded server that mixes tasks in its batches, against the same one that does not.

Both servers run as processes of their own on loopback and take turns, round by round, under the same closed loop:
so many clients, each sending its next request when it has its answer, each request for a task drawn at random. Then the
mixing server is loaded while tasks are replaced, removed and added, and every answer is checked: a request is lost
unless it was answered by a version of its task that was there while the request was under way, or refused, 404, while
its task was away.
"""

import argparse
import asyncio
import contextlib
import io
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hyperclip_fast.bench.harness.machine import describe
from hyperclip_fast.bench.harness.report import Report
from hyperclip_fast.utils.extras import require
from hyperclip_fast.utils.timing import quartiles, speedup

COMMAND = (sys.executable, "-m", "hyperclip_fast.cli")
MODES = {"mixed": (), "one task a batch": ("--one-task-a-batch",)}


@dataclass
class Served:
    """A task as the clients know it: which versions may answer a request, and whether it may be away."""

    name: str
    put: int = 0  # the newest version whose arrival the server confirmed
    sent: int = 0  # the newest version that was sent
    away: bool = False  # a removal was sent, and no return was confirmed since
    removals: int = 0

    def classes(self, version: int, number: int) -> list[str]:
        """Class names of a version; they tell it."""
        return [f"{self.name} {version} {i}" for i in range(number)]


@dataclass
class Tally:
    """What became of the requests of one round."""

    seconds: list[float] = field(default_factory=list)  # of each answered request
    refused: int = 0  # 404, while the task was away
    lost: list[str] = field(default_factory=list)


def run_serving(args: argparse.Namespace) -> int:
    """Run the comparison and the churn, and print both; 1 if a request was lost."""
    require("aiohttp", "bench")
    for name in ("threads", "tasks", "classes", "clients", "max_batch", "rounds", "seconds"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.model and args.tower:
        raise ValueError(f"--model and --tower exclude each other, got {args.model} and {args.tower}")
    machine = describe(torch.device(args.device), torch.float32)
    settings = {
        name: getattr(args, name)
        for name in ("tower", "model", "threads", "tasks", "classes", "clients", "max_batch", "rounds", "seconds")
    }
    print(f"{machine['device']}, {machine['cores']} cores; torch {machine['versions']['torch']}")
    print(", ".join(f"{name} {value}" for name, value in settings.items() if value is not None), flush=True)
    report = Report({**machine, "settings": settings}, args.json)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(args, Path(folder), report))
    report.write()
    return 1 if any(row["lost"] for row in report.rows) else 0


@contextlib.contextmanager
def server_process(arguments: Sequence[str], command: Sequence[str], stderr: Any) -> Iterator[subprocess.Popen]:
    """A `hyperclip serve` process on a free port; it is told to stop at the end.

    Args:
        arguments: of serve, apart from --port.
        command: what runs hyperclip.
        stderr: a file for the process's messages.
    """
    process = subprocess.Popen(
        [*command, "serve", "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def address_of(process: subprocess.Popen) -> str:
    """Where a process of `server_process` listens, once it does.

    Raises:
        ChildProcessError: if it does not start.
    """
    found = re.search(r"https?://\S+", process.stdout.readline())
    if not found:
        raise ChildProcessError(f"the server must say where it listens, it ended with status {process.wait(10)}")
    return found.group()


async def _measure(args: argparse.Namespace, folder: Path, report: Report) -> None:
    model = _random_model(args.tower, folder / "model") if args.tower else args.model
    common = ["--device", args.device, "--threads", str(args.threads), "--max-batch", str(args.max_batch)]
    common += ["--max-concurrent-requests", str(2 * args.clients), "--max-tasks", str(args.tasks + 1)]
    common += ["--model", str(model)] if model else []
    images, draw = _images(), random.Random(args.seed)
    tasks = [Served(f"task {i}") for i in range(args.tasks)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log.txt", "w"))
        processes = {}
        for mode, more in MODES.items():
            arguments = [*common, *more, "--create", "--bank", str(folder / f"{mode}.safetensors")]
            processes[mode] = stack.enter_context(server_process(arguments, COMMAND, log))
        addresses = {mode: address_of(process) for mode, process in processes.items()}
        async with _session(args.clients + 1) as session:
            for task in tasks:
                await asyncio.gather(*(_put(session, each, task, 0, args.classes) for each in addresses.values()))
            for address in addresses.values():
                await _load(session, address, images, tasks, args.clients, 1.0, draw)  # warm
            for i in range(args.rounds):
                for mode in reversed(MODES) if i % 2 else MODES:
                    row = await _round(session, addresses[mode], images, tasks, args, draw)
                    report.rows.append({"mode": mode, "round": i, **row})
            row = await _round(session, addresses["mixed"], images, tasks, args, draw, churn=True)
            report.rows.append({"mode": "mixed, tasks change", "round": 0, **row})
    print(_table(report.rows))


def _session(connections: int) -> Any:
    """An HTTP client of so many connections."""
    aiohttp = require("aiohttp", "bench")
    connector = aiohttp.TCPConnector(limit=connections)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60))


def _random_model(tower: str, folder: Path) -> Path:
    """A model whose time is a trained one's, and whose answers are noise."""
    from hyperclip_fast.hyperclip import HyperCLIP
    from hyperclip_fast.hyperclip_config import HyperCLIPConfig

    HyperCLIP(HyperCLIPConfig(image_tower=tower)).save_pretrained(folder)
    return folder


def _images(number: int = 16, side: int = 96) -> list[bytes]:
    """PNG files of smooth noise."""
    image_module = require("PIL.Image", "serve")
    files = []
    for i in range(number):
        file = io.BytesIO()
        coarse = image_module.effect_noise((6, 6), 20 * (i + 1)).convert("RGB")
        coarse.resize((side, side), image_module.Resampling.BICUBIC).save(file, "png")
        files.append(file.getvalue())
    return files


async def _round(
    session: Any,
    address: str,
    images: list[bytes],
    tasks: list[Served],
    args: argparse.Namespace,
    draw: random.Random,
    churn: bool = False,
) -> dict[str, Any]:
    """Load a server for a round: figures by name."""
    before = await _batches(session, address)
    begin = time.perf_counter()
    loading = _load(session, address, images, tasks, args.clients, args.seconds, draw)
    changing = _change(session, address, tasks, args.classes, begin + args.seconds, draw) if churn else _none()
    tally, changes = await asyncio.gather(loading, changing)
    elapsed = time.perf_counter() - begin
    images_run, passes = (after - earlier for earlier, after in zip(before, await _batches(session, address)))
    cuts = statistics.quantiles(tally.seconds, n=100, method="inclusive")
    return {
        "requests": len(tally.seconds) + tally.refused + len(tally.lost),
        "refused": tally.refused,
        "lost": len(tally.lost),
        "reasons": tally.lost[:5],
        "changes": changes,
        "per_second": len(tally.seconds) / elapsed,
        "p50_ms": 1000 * cuts[49],
        "p99_ms": 1000 * cuts[98],
        "images_a_batch": images_run / max(1, passes),
    }


async def _none() -> int:
    return 0


async def _load(
    session: Any,
    address: str,
    images: list[bytes],
    tasks: list[Served],
    clients: int,
    seconds: float,
    draw: random.Random,
) -> Tally:
    """So many clients that ask one after another; every request is waited for."""
    tally, end = Tally(), time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            await _ask(session, address, draw.choice(images), draw.choice(tasks), tally)

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def _ask(session: Any, address: str, image: bytes, task: Served, tally: Tally) -> None:
    """One request, and whether its answer is right."""
    first, away, removals = task.put, task.away, task.removals
    begin = time.perf_counter()
    try:
        async with session.post(
            f"{address}/v1/classify",
            params={"task": task.name, "topk": 1},
            data=image,
            headers={"Content-Type": "image/png"},
        ) as answer:
            status, content = answer.status, await answer.json()
    except (OSError, asyncio.TimeoutError, ValueError, require("aiohttp", "bench").ClientError) as error:
        tally.lost.append(repr(error))
        return
    if status == 404 and (away or task.removals > removals):
        tally.refused += 1
        return
    if status != 200:
        tally.lost.append(f"{status} {content}")
        return
    name = content["results"][0]["ranked"][0]["name"]
    if any(name.startswith(f"{task.name} {version} ") for version in range(first, task.sent + 1)):
        tally.seconds.append(time.perf_counter() - begin)
    else:
        tally.lost.append(f"{name!r} for {task.name!r}, versions {first} to {task.sent}")


async def _change(
    session: Any, address: str, tasks: list[Served], classes: int, end: float, draw: random.Random
) -> int:
    """Replace a task, or remove it and add it again, until `end`; how many changes were made."""
    changes = 0
    while time.perf_counter() < end:
        task = draw.choice(tasks)
        if draw.random() < 0.5:
            task.away, task.removals = True, task.removals + 1
            async with session.delete(f"{address}/v1/tasks/{task.name}") as answer:
                answer.raise_for_status()
            changes += 1
        await _put(session, address, task, task.sent + 1, classes)
        changes += 1
    return changes


async def _put(session: Any, address: str, task: Served, version: int, classes: int) -> None:
    task.sent = version
    body = {"classes": task.classes(version, classes)}
    async with session.put(f"{address}/v1/tasks/{task.name}", json=body) as answer:
        answer.raise_for_status()
    task.put, task.away = version, False


async def _batches(session: Any, address: str) -> tuple[float, float]:
    """Images that were classified so far, and forward passes."""
    async with session.get(f"{address}/metrics") as answer:
        text = await answer.text()
    return tuple(
        float(re.search(rf"^hyperclip_batch_images_{what} (\S+)$", text, re.MULTILINE)[1]) for what in ("sum", "count")
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """Medians over the rounds of each mode, and the ratio of throughputs round by round."""
    columns = ("per_second", "p50_ms", "p99_ms", "images_a_batch")
    lines = ["| server | requests/s | p50 ms | p99 ms | images a batch | requests | refused | lost |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        figures = [f"{quartiles([row[name] for row in mine])[1]:.1f}" for name in columns]
        counts = [str(sum(row[name] for row in mine)) for name in ("requests", "refused", "lost")]
        lines.append(f"| {' | '.join([mode, *figures, *counts])} |")
    mixed, single = ([1 / row["per_second"] for row in rows if row["mode"] == mode] for mode in MODES)
    low, middle, high = speedup(mixed, single)
    changes = rows[-1]["changes"]
    lines.append(f"\nmixed over one task a batch, requests/s: {middle:.2f} ({low:.2f} to {high:.2f})")
    lines.append(f"while tasks changed: {changes} changes")
    problems = [reason for row in rows for reason in row["reasons"]]
    return "\n".join([*lines, *(f"lost: {json.dumps(reason)}" for reason in problems)])
