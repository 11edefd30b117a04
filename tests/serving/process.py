"""Servers with a tiny model, for tests: a real `hyperclip serve` process, and one in a thread, which starts faster."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import uvicorn

from hyperclip_fast.bench.serving import address_of, server_process
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.serving.app import create_app
from hyperclip_fast.serving.batching import ModelThread
from hyperclip_fast.serving.gate.connections import Connections
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.service import bank_service

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

FORK = """
import json, os, sys, pytest
sys.path.insert(0, sys.argv[1])
from tests.towers import patch_text_tower
from hyperclip_fast.cli.main import main
import fastapi, httptools, prometheus_client, python_multipart, uvicorn, uvloop
import hyperclip_fast.serving.app, hyperclip_fast.hyperclip
import uvicorn.loops.auto, uvicorn.lifespan.on

patch_text_tower(pytest.MonkeyPatch())
for line in sys.stdin:
    process = os.fork()
    if not process:
        os._exit(main(json.loads(line)))
    print("process", process, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Nursery:
    """Processes of `hyperclip serve` with a tiny model, one after another; forked, so that each starts at once.

    Args:
        folder: of the model; the messages of all of them go beside it, to `log`.
    """

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder.with_suffix(".log")

    def __enter__(self):
        with self.log.open("w") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            self.parent = subprocess.Popen([sys.executable, "-c", FORK, str(ROOT)], text=True, **pipes)
        return self

    def start(self, bank: Path, *options: str) -> str:
        """Start a server; its address."""
        arguments = ["serve", "--model", str(self.folder), "--bank", str(bank), "--port", "0", "--threads", "1"]
        print(json.dumps([*arguments, *options]), file=self.parent.stdin, flush=True)
        self.process = int(self._read(r"process (\d+)"))
        return self._read(r"at (http\S+)")

    def wait(self) -> int:
        """How the server ended."""
        return int(self._read(r"ended (-?\d+)"))

    def _read(self, pattern: str) -> str:
        line = self.parent.stdout.readline()
        found = re.search(pattern, line)
        assert found, f"{line} {self.log.read_text()}"
        return found[1]

    def __exit__(self, *_):
        self.parent.stdin.close()
        self.parent.send_signal(signal.SIGTERM)
        self.parent.wait(30)
        self.parent.stdout.close()


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
    arguments = ["--model", model, "--bank", str(bank), "--create", "--threads", "1", *options]
    with log.open("w") as file, server_process(arguments, command, file) as process:
        process.address, process.log = address_of(process), log
        yield process


@contextlib.contextmanager
def serving_here(
    model: HyperCLIP, bank: Path, options: ServeOptions, slow: float = 0.0, connections: Connections | None = None
):
    """The address of a server that runs in a thread.

    Args:
        model: a tiny one.
        bank: the file of tasks.
        options: see ServeOptions.
        slow: seconds that each batch takes longer.
        connections: see Connections.
    """
    runner = ModelThread(model, threads=1)

    class Slow:
        async def classify(self, *batch):
            await asyncio.sleep(slow)
            return await runner.classify(*batch)

        embed = runner.embed

    app = create_app(bank_service(bank, runner, options, Slow(), create=True))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = connections or Connections()
        options = connections.uvicorn_options()
        config = uvicorn.Config(app, **options, log_config=None, access_log=False)  # messages reach caplog
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            runner.close()
