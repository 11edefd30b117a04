"""`hyperclip serve`: arguments, the model's thread, and a process that ends without losing what it accepted."""

import argparse
import re
import signal
import socket
from pathlib import Path

from hyperclip_fast.cli.arguments import add_command, add_model
from hyperclip_fast.utils.class_names import MAX_CHARACTERS, MAX_CLASSES
from hyperclip_fast.utils.extras import require

DESCRIPTION = """Serve tasks over HTTP. Requests for different tasks share batches. Clients add, replace and remove
tasks while the server runs. The command needs the extra serve."""
EXAMPLE = """example:
  hyperclip serve --bank tasks.safetensors
"""


def add_serve(commands) -> None:
    """Add the subcommand to the command line's parser."""
    parser = add_command(commands, "serve", "serve tasks over HTTP", DESCRIPTION, EXAMPLE)
    text = "file of the tasks: read at the start, and saved before the server confirms a change"
    parser.add_argument("--bank", required=True, metavar="FILE", help=text)
    parser.add_argument("--create", action="store_true", help="start with no tasks where FILE does not exist")
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    text = "another host name that clients use, such as a proxy's; repeatable; * allows any"
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    _add(parser, "--port", int, 8000, "port to listen on; 0 takes a free one")
    _add(parser, "--threads", int, None, "PyTorch's threads on a CPU; default: PyTorch's choice")
    _add(parser, "--max-batch", int, 32, "images in a forward pass")
    _add(parser, "--max-wait-ms", float, 2.0, "milliseconds that an image waits for others")
    text = "do not mix tasks in a batch; a baseline to measure against"
    parser.add_argument("--one-task-a-batch", action="store_true", help=text)
    _add(parser, "--decoders", int, 2, "threads that decode images")
    _add(parser, "--max-concurrent-requests", int, 256, "requests at a time; the server answers more with 503")
    _add(parser, "--max-mib", float, 8.0, "MiB of a request's body")
    _add(parser, "--max-seconds", float, 30.0, "seconds in which a request's body must arrive")
    _add(parser, "--max-megapixels", float, 32.0, "megapixels of an image")
    _add(parser, "--max-images", int, 16, "images in a request")
    _add(parser, "--max-tasks", int, 1000, "tasks with a name")
    _add(parser, "--max-ad-hoc", int, 100, "tasks without a name that the server remembers")
    _add(parser, "--max-classes", int, 1000, "class names in a task")
    _add(parser, "--max-length", int, 200, "characters in a class name or a task's name")
    _add(parser, "--drain-seconds", float, 30.0, "seconds to finish requests once the server is told to stop")
    parser.set_defaults(run=_serve)


def _add(parser: argparse.ArgumentParser, name: str, kind: type, default: float | None, text: str) -> None:
    more = "" if default is None else "; default: %(default)s"
    parser.add_argument(name, type=kind, default=default, metavar="N", help=text + more)


def _serve(args: argparse.Namespace) -> int:
    for module in ("fastapi", "prometheus_client", "python_multipart"):
        require(module, "serve")
    uvicorn = require("uvicorn", "serve")
    options = serve_options(args)

    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.serving.app import bank_service, create_app
    from hyperclip_fast.serving.batching import ModelThread

    runner = ModelThread(load_model(args.model, args.device), args.threads)
    service = bank_service(Path(args.bank), runner, options, create=args.create)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listening:
        address = f"http://{_in_url(args.host)}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=round(args.drain_seconds),
        )
        _until_stopped(uvicorn.Server(config), listening, f"Serving {len(service.registry)} tasks at {address}")
    runner.close()
    return 0


def _until_stopped(server, listening: socket.socket, greeting: str) -> None:
    """Run until SIGTERM or SIGINT, which are heard before the greeting is printed.

    The server raises the signal again once it has shut down: that must not kill us.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        print(greeting, flush=True)
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_options(args: argparse.Namespace):
    """ServeOptions of the arguments.

    Raises:
        ValueError: for a number out of range, or a host that no request could name.
    """
    from hyperclip_fast.serving.app import ServeOptions
    from hyperclip_fast.serving.task_registry import TaskLimits

    for name, value in vars(args).items():
        least: float = 0 if name in ("port", "max_wait_ms", "drain_seconds", "max_ad_hoc") else 1
        if name in ("max_mib", "max_seconds", "max_megapixels"):
            least = 0.001
        most = {"port": 65535, "max_classes": MAX_CLASSES, "max_length": MAX_CHARACTERS}.get(name, 10**9)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least} and at most {most}, got {value}")
    for host in args.allow_host:
        if host != "*" and not re.fullmatch(r"\[[\da-fA-F:.]+\]|[^\s:/*\[\]]+", host):
            raise ValueError(f"--allow-host must be a name without a port, [address] for IPv6, or *, got {host}")
    limits = TaskLimits(args.max_tasks, args.max_ad_hoc, args.max_classes, args.max_length)
    return ServeOptions(
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1000,
        mix=not args.one_task_a_batch,
        decoders=args.decoders,
        max_concurrent_requests=args.max_concurrent_requests,
        max_bytes=round(args.max_mib * 2**20),
        max_seconds=args.max_seconds,
        max_pixels=round(args.max_megapixels * 1e6),
        max_images=args.max_images,
        limits=limits,
        hosts=("localhost", "127.0.0.1", "[::1]", _in_url(args.host), *args.allow_host),
    )


def _in_url(host: str) -> str:
    """An address as a URL, and so a request's Host, has it."""
    return f"[{host}]" if ":" in host else host
