"""Connections over real sockets: idle ones, headers that never end, too many, and what is no HTTP."""

import contextlib
import re
import socket
import time

import httpx
import pytest

from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.gate.connections import MAX_HEADER, Connections
from hyperclip_fast.serving.options import ServeOptions
from tests.serving.process import serving_here
from tests.towers import patch_text_tower, tiny_model

IDLE = 0.6
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        yield tiny_model()


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    limits, bank = Connections(most=30, idle_seconds=IDLE), tmp_path_factory.mktemp("bank") / "tasks.safetensors"
    options = ServeOptions(bodies=BodyLimits(max_bytes=100_000))
    with serving_here(model, bank, options, connections=limits) as address:
        yield address
        time.sleep(0.1)
        assert limits.open == 0 and not limits.of_address


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read_all(connection):
    """What comes until the server closes, and how long that took."""
    begin, parts = time.monotonic(), []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts), time.monotonic() - begin


def test_an_idle_connection_is_closed(address):
    with connect(address) as connection:
        answer, seconds = read_all(connection)
    assert answer == b"" and IDLE / 2 < seconds < 5 * IDLE


def test_a_connection_that_idles_after_an_answer_is_closed(address):
    with connect(address) as connection:
        for _ in range(2):
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(IDLE / 2)
        answer, seconds = read_all(connection)
    assert answer == b"" and seconds < 5 * IDLE


@pytest.mark.parametrize("before", [b"", GET], ids=["first", "second"])
def test_a_header_that_never_ends_is_refused(address, before):
    """Also where its bytes keep coming, and where an earlier request was answered."""
    with connect(address) as connection:
        if before:
            connection.sendall(before)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        begin = time.monotonic()
        connection.settimeout(0.05)
        answer = b""
        while time.monotonic() < begin + 10 * IDLE and not answer:
            with contextlib.suppress(TimeoutError):
                connection.sendall(b"X-A: b\r\n")
                answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408") and b'"code":"too_slow"' in answer
    assert IDLE / 2 < time.monotonic() - begin < 5 * IDLE


def test_a_header_that_is_too_long_is_refused(address):
    with connect(address) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(2 * MAX_HEADER // 1000):
            connection.sendall(b"X-A: " + b"b" * 1000 + b"\r\n")
            time.sleep(0.001)
        assert read_all(connection)[0].startswith(b"HTTP/1.1 431")
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_any_number_of_requests_on_one_connection(address):
    """The bound is for one header, not for all of them."""
    with httpx.Client(base_url=address, headers={"X": "a" * 8000}) as client:
        assert {client.get("/healthz").status_code for _ in range(2 * MAX_HEADER // 8000)} == {200}


def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(address):
    with connect(address) as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < begin + 10 * IDLE:
                connection.sendall(bytes(1000))
                time.sleep(0.02)
        assert time.monotonic() - begin < 5 * IDLE


@pytest.mark.slow
def test_a_client_that_does_not_read_is_closed(address):
    """Its answer is larger than what lies in buffers on the way."""
    for i in range(40):
        httpx.put(f"{address}/v1/tasks/{i}", json={"classes": [f"{j:0200}" for j in range(400)]}).raise_for_status()
    size = len(httpx.get(f"{address}/v1/tasks").content)
    read = 0
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = address.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.sendall(b"GET /v1/tasks HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3 * IDLE)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                read += len(part)
    for i in range(40):
        httpx.delete(f"{address}/v1/tasks/{i}").raise_for_status()
    assert read < size
    assert len(httpx.get(f"{address}/v1/tasks").content) < size


def test_so_many_connections_and_no_more(address):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(address)) for _ in range(30)]
        for connection in held:
            connection.sendall(GET)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        late = stack.enter_context(connect(address))
        answer, _ = read_all(late)
        assert answer.startswith(b"HTTP/1.1 503") and b'"code":"busy"' in answer
        held[0].close()
        time.sleep(0.1)
        again = stack.enter_context(connect(address))
        again.sendall(GET)
        assert again.recv(65536).startswith(b"HTTP/1.1 200")


def test_connections_of_one_address():
    limits = Connections(most=5, most_of_address=2)
    assert [limits.enter("10.0.0.1") for _ in range(3)] == [True, True, False]
    assert limits.enter("10.0.0.2")  # another's
    limits.leave("10.0.0.1")
    assert limits.enter("10.0.0.1")
    limits = Connections(most=5, most_of_address=2)
    assert [limits.enter("127.0.0.1") for _ in range(6)] == [True] * 5 + [False]  # this machine's own, up to all


BAD = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "length is a word": b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    "length is negative": b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunk size": b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n",
    "header with a null": b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    "path beyond ASCII": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "path with a space": b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_http_gets_json_too(address, name, caplog):
    with connect(address) as connection:
        connection.sendall(BAD[name])
        answer, _ = read_all(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4") and b"application/json" in head and body.startswith(b'{"error":'), answer
    assert not [record for record in caplog.records if record.exc_info]


HEAD = b"POST /v1/classify?task=a HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


def test_a_body_that_is_longer_than_announced(address):
    """What is left is no request; the first is answered, and nothing behind it."""
    with connect(address) as connection:
        connection.sendall(HEAD % 2 + b"four")
        answer, _ = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 404") and answer.count(b"HTTP/1.1") == answer.count(b'{"error":') == 1


def test_a_body_that_is_shorter_than_announced(address):
    with connect(address) as connection:
        connection.sendall(HEAD % 90 + b"four")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection)[0] == b""  # nobody is there to be answered
    assert "hyperclip_pending_requests 0.0" in httpx.get(f"{address}/metrics").text


def test_pipelined_requests_are_answered_in_turn(address):
    with connect(address) as connection:
        put = b"PUT /v1/tasks/%d HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n"
        body = b'{"classes":["a"]}'
        last = b"GET /v1/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        connection.sendall(b"".join(put % i + body for i in range(5)) + GET + last)
        answer, _ = read_all(connection)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"201"] * 5 + [b"200"] * 2
    assert all(b'"name":"%d"' % i in answer.rpartition(b"\r\n\r\n")[2] for i in range(5))


@pytest.mark.parametrize(
    "behind",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        GET + b"nonsense\r\n\r\n",
    ],
    ids=["no request", "a broken body", "behind another"],
)
def test_nonsense_behind_a_request_does_not_take_its_answer(address, behind):
    body = b'{"classes":["a"]}'
    put = b"PUT /v1/tasks/behind HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n"
    with connect(address) as connection:
        connection.sendall(put + body + behind)
        answer, seconds = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 20") and answer.count(b"HTTP/1.1") == 1 and seconds < IDLE
