"""Servers with a tiny model, for tests: a real `hyperclip serve` process, and one in a thread, which starts faster."""

import asyncio
import contextlib
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from hyperclip_fast.bench.serving import address_of, server_process
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.serving.app import ServeOptions, bank_service, create_app
from hyperclip_fast.serving.batching import ModelThread

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
import sys, time, pytest
sys.path.insert(0, sys.argv[1])
import hyperclip_fast.serving.batching as batching
from tests.towers import patch_text_tower
from hyperclip_fast.cli.main import main

real, slow = batching.classify_tasks, float(sys.argv[2])
batching.classify_tasks = lambda *args: time.sleep(slow) or real(*args)
patch_text_tower(pytest.MonkeyPatch())
sys.exit(main(sys.argv[3:]))
"""


@contextlib.contextmanager
def serving(model: str, bank: Path, *options: str, slow: float = 0.0):
    """The process with its address and the file of its messages; it is stopped where the test has not.

    Args:
        model: a folder.
        bank: the file of tasks; messages go beside it.
        options: more arguments of `hyperclip serve`.
        slow: seconds that each batch takes longer.
    """
    log = bank.with_suffix(".log")
    command = (sys.executable, "-c", LAUNCH, str(ROOT), str(slow))
    arguments = ["--model", model, "--bank", str(bank), "--threads", "1", *options]
    with log.open("w") as file, server_process(arguments, command, file) as process:
        process.address, process.log = address_of(process), log
        yield process


@contextlib.contextmanager
def serving_here(model: HyperCLIP, bank: Path, options: ServeOptions, slow: float = 0.0):
    """The address of a server that runs in a thread.

    Args:
        model: a tiny one.
        bank: the file of tasks.
        options: see ServeOptions.
        slow: seconds that each batch takes longer.
    """
    runner = ModelThread(model, threads=1)

    async def classify(*batch):
        await asyncio.sleep(slow)
        return await runner.classify(*batch)

    app = create_app(bank_service(bank, runner, options, classify))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            runner.close()
