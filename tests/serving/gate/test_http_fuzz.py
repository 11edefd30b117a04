"""Damaged requests over real sockets: each gets a 4xx in JSON, or is a good one still; nothing leaves a traceback.

The seed is fixed, the time bounded; a failure shows the request that led to it.
"""

import base64
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.gate.connections import Connections
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.task_registry import TaskLimits
from tests.serving.asking import png
from tests.serving.gate.test_connections import connect, read_all
from tests.serving.process import serving_here
from tests.towers import patch_text_tower, tiny_model

SECONDS, SEED = float(os.environ.get("HYPERCLIP_FUZZ_SECONDS", "8")), 0
FORM = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
FORM += png() + b'\r\n--b\r\nContent-Disposition: form-data; name="task"\r\n\r\npets\r\n--b--\r\n'
IMAGES = {"images": [base64.b64encode(png()).decode()], "tasks": ["pets"]}
TOKENS = (
    *(b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"-1", b"[" * 3000, b'{"a":' * 500, b"null", b"true", b'"\\ud800"'),
    *(b"\x00", b"\r\n", b"\r\n\r\n", b"\n", b"\xff\xfe", b"%00", b"%0A", b"%ff", b"../", b"//", b";", b":", b'"'),
    *(b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Connection: close\r\n", b"Host: \r\n", b"HTTP/2.0"),
    *(b"multipart/form-data", b"boundary=", b"; charset=utf-16", b"application/json", b"Range: bytes=0-1\r\n"),
    *(b"HTTP/1.0", b"Expect: 100-continue\r\n", b"image/png", b"classes", b'"classes": ["a"], ', b"--b\r\n", b"--b--"),
    *(b"name=", b"\xf0\x9f\x98\x80", b"A" * 3000, b"\\"),
)


def request(line, kind=None, body=b""):
    head = [line + b" HTTP/1.1", b"Host: x"]
    if kind:
        head += [b"Content-Type: " + kind, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*head, b"", b""]) + body


GOOD = (
    request(b"POST /v1/classify", b"multipart/form-data; boundary=b", FORM),
    request(b"POST /v1/classify", b"application/json", json.dumps({**IMAGES, "topk": 2, "threshold": 0.0}).encode()),
    request(b"POST /v1/classify?task=pets&topk=1", b"image/png", png()),
    request(b"POST /v1/embed", b"application/json", json.dumps(IMAGES).encode()),
    request(b"PUT /v1/tasks/new", b"application/json", b'{"classes": ["owl", "swan"]}'),
    request(b"DELETE /v1/tasks/new"),
    request(b"GET /v1/tasks/pets"),
    request(b"GET /"),
)


def damaged(draw):
    """A good request, or two behind each other, with some bytes changed, cut, repeated, or put in."""
    content = bytearray(b"".join(draw.choices(GOOD, k=draw.choice((1, 1, 1, 2)))))
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        if draw.random() < 0.6:  # most of a request's meaning is at its beginning
            place = min(place, draw.randrange(250))
        length = draw.choice((1, 1, 3, 10, 100))
        kind = draw.randrange(5)
        if kind == 0:
            content[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = content[place : place + length]
        else:
            content[place:place] = draw.choice(TOKENS)
    return bytes(content)


def check_answers(answer, sent):
    """Each answer is a whole one, in JSON where it is an error, and none says that the server failed."""
    while answer:
        head, _, rest = answer.partition(b"\r\n\r\n")
        found = re.match(rb"HTTP/1\.1 (\d{3})", head)
        assert found, (answer[:300], sent)
        status = int(found[1])
        if status == 100:
            answer = rest
            continue
        assert status < 500, (status, rest[:300], sent)
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        body, answer = (rest[: int(length[1])], rest[int(length[1]) :]) if length else (b"", rest)
        if status >= 400 and body:
            assert json.loads(body)["error"]["status"] == status, (body, sent)


@pytest.mark.slow
def test_damaged_requests(tmp_path, caplog, monkeypatch):
    patch_text_tower(monkeypatch)
    bodies = BodyLimits(max_bytes=100_000, max_seconds=0.3)
    options = ServeOptions(bodies=bodies, limits=TaskLimits(tasks=20, ad_hoc=5, classes=50))

    def attack(address, seed):
        draw, number = random.Random(seed), 0
        while time.monotonic() < end:
            sent = damaged(draw)
            check_answers(send(address, sent), sent)
            number += 1
        return number

    connections = Connections(idle_seconds=0.2)
    with serving_here(tiny_model(), tmp_path / "b.safetensors", options, connections=connections) as address:
        assert httpx.put(f"{address}/v1/tasks/pets", json={"classes": ["cat", "dog"]}).status_code == 201
        for good in GOOD:
            answer = send(address, good)
            assert answer.startswith(b"HTTP/1.1 2"), (answer, good)
        end = time.monotonic() + SECONDS
        with ThreadPoolExecutor(8) as pool:
            number = sum(pool.map(attack, [address] * 8, range(SEED, SEED + 8)))
        text = httpx.get(f"{address}/metrics").text
    assert number > 100 and "hyperclip_pending_requests 0.0" in text and 'status="500"' not in text
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def send(address, content):
    """All that a server answers to a client that sends and then waits."""
    with connect(address) as connection:
        try:
            connection.sendall(content)
        except ConnectionError:
            return b""  # refused before the end, and closed
        return read_all(connection)[0]
