"""`hyperclip serve`: arguments, the model's thread, and a process that ends without losing what it accepted."""

import argparse
import logging
import re
import signal
import socket
import ssl
import sys
from pathlib import Path

from hyperclip_fast.cli.arguments import add_command, add_model
from hyperclip_fast.utils.class_names import MAX_CHARACTERS, MAX_CLASSES
from hyperclip_fast.utils.extras import require

DESCRIPTION = """Serve tasks over HTTP. Requests for different tasks share batches. Clients add, replace and remove
tasks while the server runs. The command needs the extra serve."""
EXAMPLE = """example:
  hyperclip serve --bank tasks.safetensors --create
"""
LEAST = {"port": 0, "max_wait_ms": 0, "drain_seconds": 0, "max_ad_hoc": 0, "rate": 0.001, "idle_seconds": 0.1}
LEAST |= {"max_mib": 0.001, "max_total_mib": 0.001, "max_seconds": 0.001, "max_megapixels": 0.001, "min_rate": 0.001}


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
    text = "another origin, as https://here.example, whose pages may send requests (CORS); repeatable; * allows any"
    parser.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN", help=text)
    text = "file of the keys that requests must carry, a line role:sha256:name each; default: no request needs a key"
    parser.add_argument("--api-key-file", metavar="FILE", help=text)
    _add(parser, "--rate", float, None, "requests a second of one key; default: any number")
    parser.add_argument("--ssl-certfile", metavar="FILE", help="certificate in PEM, to serve HTTPS")
    parser.add_argument("--ssl-keyfile", metavar="FILE", help="its private key")
    parser.add_argument("--access-log", action="store_true", help="a line on stderr for every request")
    _add(parser, "--port", int, 8000, "port to listen on; 0 takes a free one")
    _add(parser, "--threads", int, None, "PyTorch's threads on a CPU; default: PyTorch's choice")
    _add(parser, "--max-batch", int, 32, "images in a forward pass")
    _add(parser, "--max-wait-ms", float, 2.0, "milliseconds that an image waits for others")
    text = "do not mix tasks in a batch; a baseline to measure against"
    parser.add_argument("--one-task-a-batch", action="store_true", help=text)
    _add(parser, "--decoders", int, 2, "threads that decode images")
    _add(parser, "--max-concurrent-requests", int, 256, "requests at a time; the server answers more with 503")
    _add(parser, "--max-concurrent-changes", int, 32, "changes of tasks at a time, beside those")
    _add(parser, "--max-mib", float, 8.0, "MiB of a request's body")
    _add(parser, "--max-total-mib", float, 512.0, "MiB of the bodies of all requests together")
    _add(parser, "--max-seconds", float, 30.0, "seconds in which a request's body must arrive")
    _add(parser, "--min-rate", float, 1024.0, "bytes a second at which it must arrive")
    _add(parser, "--max-connections", int, 1000, "connections at a time")
    _add(parser, "--max-connections-of-address", int, 256, "connections of one address, other machines'")
    _add(parser, "--idle-seconds", float, 15.0, "seconds for which a connection may be idle, send a header or not read")
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
    for module in ("fastapi", "prometheus_client", "python_multipart", "httptools"):
        require(module, "serve")
    uvicorn = require("uvicorn", "serve")
    options = serve_options(args)
    _check_certificate(args.ssl_certfile, args.ssl_keyfile)
    _log()

    from hyperclip_fast.hyperclip import load_model
    from hyperclip_fast.serving.app import create_app
    from hyperclip_fast.serving.batching import ModelThread
    from hyperclip_fast.serving.gate.connections import Connections, is_loopback
    from hyperclip_fast.serving.service import bank_service

    runner = ModelThread(load_model(args.model, args.device), args.threads)
    service = bank_service(Path(args.bank), runner, options, create=args.create)
    connections = Connections(args.max_connections, args.max_connections_of_address, args.idle_seconds)
    _allow_files(args.max_connections)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listening:
        scheme = "https" if args.ssl_certfile else "http"
        address = f"{scheme}://{_in_url(args.host)}:{listening.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(service),
            **connections.uvicorn_options(),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=round(args.drain_seconds),
            ssl_certfile=args.ssl_certfile,
            ssl_keyfile=args.ssl_keyfile,
        )
        if not options.keys and not is_loopback(args.host):
            print(f"warning: whoever reaches {args.host} can change the tasks; see --api-key-file", file=sys.stderr)
        _until_stopped(uvicorn.Server(config), listening, f"Serving {len(service.registry)} tasks at {address}")
    runner.close()
    return 0


def _check_certificate(certificate: str | None, key: str | None) -> None:
    """Raise ValueError unless these are a certificate and its key, or neither is given."""
    if (certificate is None) != (key is None):
        raise ValueError(f"--ssl-certfile and --ssl-keyfile must be given together, got {certificate} and {key}")
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except OSError as error:
            wanted = "--ssl-certfile and --ssl-keyfile must be a certificate and its key in PEM"
            raise ValueError(f"{wanted}, got {certificate} and {key}: {error}") from error


def _log() -> None:
    """Messages go to stderr, with the time: a line for each client that has gone, or for every request."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("hyperclip_fast.access").setLevel(logging.INFO)


def _allow_files(connections: int) -> None:
    """Let the process have files open for so many connections, as far as the system does."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 200  # beside what the libraries open
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


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
    from hyperclip_fast.serving.gate.bodies import BodyLimits
    from hyperclip_fast.serving.gate.keys import read_keys
    from hyperclip_fast.serving.options import ServeOptions
    from hyperclip_fast.serving.task_registry import TaskLimits

    for name, value in vars(args).items():
        least = LEAST.get(name, 1.0)
        most = {"port": 65535, "max_classes": MAX_CLASSES, "max_length": MAX_CHARACTERS}.get(name, 10**9)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least:g} and at most {most}, got {value}")
    for host in args.allow_host:
        if host != "*" and not re.fullmatch(r"\[[\da-fA-F:.]+\]|[^\s:/*\[\]]+", host):
            raise ValueError(f"--allow-host must be a name without a port, [address] for IPv6, or *, got {host}")
    for origin in args.allow_origin:
        if origin != "*" and not re.fullmatch(r"https?://[^\s/*]+", origin):
            raise ValueError(f"--allow-origin must be a scheme and a host, as https://here.example, or *, got {origin}")
    if args.rate is not None and args.api_key_file is None:
        raise ValueError(f"--rate must come with --api-key-file: it is for each key, got {args.rate} and no file")
    mib = 2**20
    return ServeOptions(
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1000,
        mix=not args.one_task_a_batch,
        decoders=args.decoders,
        bodies=BodyLimits(
            args.max_concurrent_requests,
            args.max_concurrent_changes,
            max_bytes=round(args.max_mib * mib),
            max_total_bytes=round(args.max_total_mib * mib),
            max_seconds=args.max_seconds,
            min_rate=args.min_rate,
        ),
        max_pixels=round(args.max_megapixels * 1e6),
        max_images=args.max_images,
        limits=TaskLimits(args.max_tasks, args.max_ad_hoc, args.max_classes, args.max_length),
        hosts=("localhost", "127.0.0.1", "[::1]", _in_url(args.host), *args.allow_host),
        origins=tuple(args.allow_origin),
        keys=read_keys(args.api_key_file) if args.api_key_file is not None else (),
        rate=args.rate,
        access_log=args.access_log,
    )


def _in_url(host: str) -> str:
    """An address as a URL, and so a request's Host, has it."""
    return f"[{host}]" if ":" in host else host
