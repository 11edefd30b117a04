"""Connections: how many, how many from one address, and how long one may be idle, send a header or not read.

uvicorn has no such limits, so this is its protocol with a clock and a count. Where it answers by itself, to what is no
HTTP, it answers in the server's JSON.
"""

import asyncio
import functools
import ipaddress
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.http_errors import error_response

MAX_HEADER = 64 << 10  # bytes


@dataclass
class Connections:
    """Limits of a server's connections, and those that are open.

    Args:
        most: open at a time.
        most_of_address: of one address; those of this machine are not counted.
        idle_seconds: for which a connection may be idle, send the headers of one request, or leave an answer unread.
    """

    most: int = 1000
    most_of_address: int = 256
    idle_seconds: float = 15.0
    open: int = 0
    of_address: Counter[str] = field(default_factory=Counter)

    def enter(self, address: str) -> bool:
        """Count a connection, if there is room for it."""
        if self.open >= self.most or (not is_loopback(address) and self.of_address[address] >= self.most_of_address):
            return False
        self.open += 1
        self.of_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count no more one that had entered."""
        self.open -= 1
        self.of_address[address] -= 1
        if not self.of_address[address]:
            del self.of_address[address]

    def uvicorn_options(self) -> dict[str, Any]:
        """What uvicorn.Config takes."""
        protocol = functools.partial(LimitedProtocol, self)
        return {"http": protocol, "ws": "none", "timeout_keep_alive": self.idle_seconds, "server_header": False}


def is_loopback(host: str) -> bool:
    """Whether an address or a host's name is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, within the limits of `Connections`."""

    def __init__(self, limits: Connections, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._limits = limits
        self._address: str | None = None  # of a connection that is counted
        self._clock: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._is_in_header = False
        self._is_message_whole = True
        self._is_broken = False  # what came behind the request that is being answered was no HTTP
        self._header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Refuse it, or count it and start the clock."""
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else ""
        if not self._limits.enter(address):
            transport.write(_answer(503, "busy", "too many connections are open: close some, and try again"))
            transport.close()
            return
        self._address = address
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        if self._address is not None:
            self._limits.leave(self._address)
            self._address = None
            self._stop_clock()
            if self._unread is not None:
                self._unread.cancel()
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A request's header has until the clock's end, from its first byte on."""
        if self._address is None or self.transport.is_closing():
            return
        if self._clock is None and self._is_idle():
            self._start_clock()
        super().data_received(data)
        self._header_bytes = self._header_bytes + len(data) if self._is_in_header else 0
        if self._header_bytes > MAX_HEADER:
            self._refuse(431, "too_large", f"the header must be of at most {MAX_HEADER} bytes")

    def on_message_begin(self) -> None:
        """A header begins."""
        self._is_in_header, self._is_message_whole = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A header has come: the limits of bodies take over."""
        self._is_in_header = False
        self._stop_clock()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request has come."""
        self._is_message_whole = True
        self._stop_clock()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What is left of the body of a request that was answered before its end is not awaited for ever."""
        super().on_response_complete()
        if self._is_broken:
            self.transport.close()
        elif not self._is_message_whole and self._is_idle():
            self._start_clock()

    def pause_writing(self) -> None:
        """The client does not read its answer: it has as long as for a header."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._limits.idle_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an earlier request is being answered: that answer is the last, then."""
        if self._is_idle() or (self.cycle.more_body and not self.pipeline):
            self._refuse(400, "bad_request", "the request must be HTTP/1.1")
        else:
            self._is_broken = True
            self.pipeline.clear()
            self.flow.pause_reading()

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.transport.write(_answer(status, code, message))
        self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_clock(self) -> None:
        self._stop_clock()
        self._clock = self.loop.call_later(self._limits.idle_seconds, self._end)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _end(self) -> None:
        if self._is_in_header:
            text = f"the header must arrive within {self._limits.idle_seconds:g} seconds"
            self._refuse(408, "too_slow", text)
        else:
            self.transport.close()


def _answer(status: int, code: str, message: str) -> bytes:
    """A whole answer, for where there is no app to give it."""
    response = error_response(RequestError(status, code, message, {"Connection": "close"}))
    head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%s\r\n%s" % (status, head, response.body)
