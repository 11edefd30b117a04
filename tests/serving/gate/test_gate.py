"""Who may ask: keys with roles and rates, pages of other origins, HTTPS; and places that slow or gone clients free."""

import asyncio
import gzip
import hashlib
import io
import ssl
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest
from starlette.testclient import TestClient

from hyperclip_fast.cli.main import main
from hyperclip_fast.serving.app import create_app
from hyperclip_fast.serving.batching import ModelThread
from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.gate.keys import new_key, read_keys
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.serving.service import bank_service
from tests.serving.asking import check_error
from tests.serving.process import serving, serving_here
from tests.serving.test_serve_process import ask, metric, png
from tests.towers import patch_text_tower, tiny_model

CAT = {"classes": ["cat", "dog"]}


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        yield tiny_model()


@pytest.fixture
def serve(model, tmp_path):
    """A client of a server with these options."""
    thread, clients = ModelThread(model, threads=1), []

    def start(options, **client):
        service = bank_service(tmp_path / "tasks.safetensors", thread, options, create=True)
        clients.append(TestClient(create_app(service), raise_server_exceptions=False, **client).__enter__())
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__()
    thread.close()


@pytest.fixture
def keys(tmp_path):
    """(key of a classifier, key of an administrator, their file)."""
    (asks, first), (changes, second) = new_key("classify", "app"), new_key("admin", "laptop")
    path = tmp_path / "keys.txt"
    path.write_text(f"# keys\n{first}\n\n{second}\n")
    return asks, changes, path


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_what_each_role_may(serve, keys):
    asks, changes, path = keys
    client = serve(ServeOptions(keys=read_keys(path)))
    refused = client.put("/v1/tasks/pets", json=CAT)
    check_error(refused, 401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    check_error(client.put("/v1/tasks/pets", json=CAT, headers=bearer(asks)), 403, "forbidden")
    check_error(client.delete("/v1/tasks/pets", headers=bearer(asks)), 403, "forbidden")
    assert client.get("/v1/tasks", headers=bearer(asks)).json() == {"tasks": []}
    assert client.put("/v1/tasks/pets", json=CAT, headers=bearer(changes)).status_code == 201
    for key in (asks, changes):
        answer = client.post("/v1/classify", files={"image": png()}, data={"task": "pets"}, headers=bearer(key))
        assert answer.status_code == 200 and len(answer.json()["results"]) == 1
        assert client.get("/metrics", headers=bearer(key)).status_code == 200
    assert client.get("/v1/tasks", headers={"Authorization": f"bearer {asks}"}).status_code == 200
    for wrong in ("", "Bearer", f"Bearer {asks[:-1]}", f"Basic {asks}", asks, f"Bearer {asks} {asks}", "Bearer \xff"):
        for path in ("/v1/tasks", "/metrics", "/nowhere", "/v1/tasks/pets"):
            check_error(client.get(path, headers={"Authorization": wrong.encode("latin-1")}), 401, "unauthorized")
        check_error(
            client.post("/v1/classify", headers={"Authorization": wrong.encode("latin-1")}), 401, "unauthorized"
        )
    for path in ("/healthz", "/readyz", "/"):
        assert client.get(path).status_code == 200


def test_a_rate_for_each_key(serve, keys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    asks, changes, path = keys
    client = serve(ServeOptions(keys=read_keys(path), rate=2.0))
    for _ in range(2):
        assert client.get("/v1/tasks", headers=bearer(asks)).status_code == 200
    refused = client.get("/v1/tasks", headers=bearer(asks))
    check_error(refused, 429, "too_many")
    assert refused.headers["retry-after"] == "1"
    assert client.get("/v1/tasks", headers=bearer(changes)).status_code == 200  # another's rate is its own
    assert client.get("/healthz").status_code == 200
    now[0] += 0.5
    assert client.get("/v1/tasks", headers=bearer(asks)).status_code == 200
    check_error(client.get("/v1/tasks", headers=bearer(asks)), 429, "too_many")
    now[0] += 1000
    assert [client.get("/v1/tasks", headers=bearer(asks)).status_code for _ in range(3)] == [200, 200, 429]


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least one key"),
        ("# nothing\n", "at least one key"),
        (f"root:{DIGEST}:a\n", "line 1 of"),
        (f"admin:{DIGEST}:a\nadmin:{'cd' * 31}:b\n", "line 2 of .* is none"),
        (f"admin:{DIGEST.upper()}:a\n", "line 1 of"),
        (f"admin:{DIGEST}:a\nclassify:{DIGEST}:b\n", "line 2 of .* repeats"),
        (f"admin:{DIGEST}:a\nadmin:{'cd' * 32}:a\n", "line 2 of .* repeats"),
        ("a plain key\n", "lines role:sha256:name"),
    ],
)
def test_key_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "keys.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_keys(path)
    assert "plain key" not in str(error.value)


def test_a_key_is_made_by_a_command(tmp_path):
    command = [sys.executable, "-m", "hyperclip_fast.serving.gate.keys", "admin", "my laptop"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    key = done.stderr.split()[-1]
    assert done.stdout == f"admin:{hashlib.sha256(key.encode()).hexdigest()}:my laptop\n"
    (tmp_path / "keys.txt").write_text(done.stdout)
    assert read_keys(tmp_path / "keys.txt")[0].name == "my laptop"
    assert subprocess.run([*command[:-1], "a:b"], capture_output=True).returncode == 2


@pytest.mark.parametrize(
    "headers, is_own",
    [
        ({}, True),
        ({"Origin": "http://testserver"}, True),
        ({"Origin": "https://testserver"}, True),  # a proxy speaks HTTPS
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://testserver:8000"}, False),
        ({"Origin": "http://testserver.evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_pages_of_other_origins_change_nothing(serve, headers, is_own):
    client = serve(ServeOptions())
    assert client.put("/v1/tasks/pets", json=CAT).status_code == 201
    changes = [
        lambda: client.put("/v1/tasks/food", json=CAT, headers=headers),
        lambda: client.post("/v1/classify", files={"image": png()}, data={"task": "pets"}, headers=headers),
        lambda: client.delete("/v1/tasks/pets", headers=headers),
    ]
    for change in changes:
        answer = change()
        if is_own:
            assert answer.status_code in (200, 201, 204)
        else:
            check_error(answer, 403, "other_origin")
    left = {task["name"] for task in client.get("/v1/tasks", headers=headers).json()["tasks"]}
    assert left == ({"food"} if is_own else {"pets"})


def test_cors_is_off_unless_an_origin_is_named(serve):
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "PUT"}
    asks["Access-Control-Request-Headers"] = "authorization, content-type"
    client = serve(ServeOptions())
    check_error(client.options("/v1/tasks/pets", headers=asks), 403, "other_origin")
    assert "access-control-allow-origin" not in client.get("/v1/tasks", headers=asks).headers
    client = serve(ServeOptions(origins=("https://app.example",)))
    allowed = client.options("/v1/tasks/pets", headers=asks)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example"
    answer = client.put("/v1/tasks/pets", json=CAT, headers={"Origin": "https://app.example"})
    assert answer.status_code == 201 and answer.headers["access-control-allow-origin"] == "https://app.example"
    other = client.put("/v1/tasks/pets", json=CAT, headers={"Origin": "https://other.example"})
    check_error(other, 403, "other_origin")
    assert "access-control-allow-origin" not in other.headers


def test_what_serve_refuses(tmp_path, keys, capsys):
    start = ["serve", "--bank", str(tmp_path / "b.safetensors"), "--create"]
    (tmp_path / "no.pem").write_text("no certificate")
    pem = str(tmp_path / "no.pem")
    for options, message in (
        (["--ssl-certfile", pem], "must be given together"),
        (["--ssl-certfile", pem, "--ssl-keyfile", pem], "a certificate and its key in PEM"),
        (["--allow-origin", "here.example"], "a scheme and a host"),
        (["--allow-origin", "https://here.example/page"], "a scheme and a host"),
        (["--rate", "3"], "must come with --api-key-file"),
        (["--rate", "0", "--api-key-file", str(keys[2])], "--rate must be at least"),
        (["--api-key-file", pem], "lines role:sha256:name"),
        (["--idle-seconds", "0"], "--idle-seconds must be at least"),
    ):
        assert main([*start, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_https_with_keys_and_a_log(model, tmp_path, keys):
    asks, changes, path = keys
    model.save_pretrained(tmp_path / "model")
    certificate, secret = tmp_path / "cert.pem", tmp_path / "secret.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    make += f" -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {secret} -out {certificate}"
    subprocess.run(make.split(), check=True, capture_output=True)
    options = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(secret), "--api-key-file", str(path))
    trusted = ssl.create_default_context(cafile=str(certificate))
    with serving(str(tmp_path / "model"), tmp_path / "bank.safetensors", *options, "--access-log") as process:
        assert process.address.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=process.address, verify=trusted) as client:
            assert client.put("/v1/tasks/pets", json=CAT).status_code == 401
            assert client.put("/v1/tasks/pets%0Aroot", json=CAT, headers=bearer(changes)).status_code == 404
            assert client.put("/v1/tasks/pets", json=CAT, headers=bearer(changes)).status_code == 201
            answer = client.post("/v1/classify", files={"image": png()}, data={"task": "pets"}, headers=bearer(asks))
            assert answer.status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(process.address.replace("https", "http") + "/healthz")
    lines = process.log.read_text().splitlines()
    wanted = ("- PUT /v1/tasks/pets 401", "- PUT /v1/tasks/pets%0Aroot 404", "laptop PUT /v1/tasks/pets 201")
    for text in (*wanted, "app POST /v1/classify 200"):
        assert len([line for line in lines if f"127.0.0.1 {text} " in line]) == 1, lines
    assert asks not in process.log.read_text() and "Traceback" not in process.log.read_text()


def test_a_server_that_faces_others_without_keys_says_so(model, tmp_path, capsys, monkeypatch):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    model.save_pretrained(tmp_path / "model")
    start = ["serve", "--model", str(tmp_path / "model"), "--bank", str(tmp_path / "b"), "--create", "--port", "0"]
    monkeypatch.setattr("hyperclip_fast.hyperclip.create_text_tower", lambda name, **_: model.text_tower)
    for host, warns in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        assert main([*start, "--host", host]) == 0
        assert ("can change the tasks" in capsys.readouterr().err) == warns


def test_questions_leave_places_for_changes(model, tmp_path):
    """All places of questions are taken; tasks change as if there were none."""
    options = ServeOptions(bodies=BodyLimits(max_concurrent_requests=4, max_concurrent_changes=2), max_batch=1)

    async def run(address):
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            assert (await client.put("/v1/tasks/pets", json=CAT)).status_code == 201
            asked = [asyncio.create_task(ask(client, "pets")) for _ in range(30)]
            while await metric(client, "pending_requests") < 4:
                await asyncio.sleep(0.005)
            changes = [(await client.put(f"/v1/tasks/{i}", json=CAT)).status_code for i in range(8)]
            return changes, [answer.status_code for answer in await asyncio.gather(*asked)]

    with serving_here(model, tmp_path / "tasks.safetensors", options, slow=0.3) as address:
        changes, answers = asyncio.run(run(address))
    assert changes == [201] * 8 and answers.count(200) >= 4 and answers.count(503) > 10


def test_bodies_that_arrive_hold_no_place_and_are_bounded_together(model, tmp_path):
    limits = BodyLimits(max_concurrent_requests=2, max_bytes=60_000, max_total_bytes=100_000, max_seconds=2.0)

    async def run(address):
        host, port = address.removeprefix("http://").split(":")
        head = b"POST /v1/classify?task=pets HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: "
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            assert (await client.put("/v1/tasks/pets", json=CAT)).status_code == 201
            slow = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
            for _, writer in slow:
                writer.write(head + b"50000\r\n\r\n" + bytes(1000))
            await asyncio.sleep(0.2)
            assert (await ask(client, "pets")).status_code == 200
            while await metric(client, "pending_requests") > 0:
                await asyncio.sleep(0.005)
            for _, writer in slow[:2]:
                writer.write(bytes(45_000))  # with all the others more than the bodies may hold
            await asyncio.sleep(0.2)
            first = [await asyncio.wait_for(reader.read(200), 5) for reader, _ in slow[:2]]
            late = [await asyncio.wait_for(reader.read(200), 5) for reader, _ in slow[2:]]
            for _, writer in slow:
                writer.close()
            again = (await ask(client, "pets")).status_code
        return first, late, again

    with serving_here(model, tmp_path / "tasks.safetensors", ServeOptions(bodies=limits)) as address:
        first, late, again = asyncio.run(run(address))
    assert sum(answer.startswith(b"HTTP/1.1 503") for answer in first) == 1 and again == 200
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in late)


def test_a_rate_that_is_too_low_ends_before_the_deadline(model, tmp_path, monkeypatch):
    monkeypatch.setattr("hyperclip_fast.serving.gate.bodies.GRACE", 0.5)
    options = ServeOptions(bodies=BodyLimits(max_seconds=20.0, min_rate=1000.0))

    async def send(address, rate):
        """Up to two seconds of a body at a rate; the answer, and when it came."""
        host, port = address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = "POST /v1/classify?task=none HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: "
        writer.write(f"{head}{rate * 2}\r\n\r\n".encode())
        begin = time.monotonic()
        answer = asyncio.ensure_future(reader.read(100))
        for _ in range(20):
            if not answer.done():
                writer.write(bytes(rate // 10))
                await asyncio.sleep(0.1)
        status = (await asyncio.wait_for(answer, 5))[:12]
        writer.close()
        return status, time.monotonic() - begin

    async def run(address):
        return await asyncio.gather(send(address, 200), send(address, 20_000))

    with serving_here(model, tmp_path / "tasks.safetensors", options) as address:
        (slow, seconds), (fast, _) = asyncio.run(run(address))
    assert slow == b"HTTP/1.1 408" and seconds < 4
    assert fast == b"HTTP/1.1 404"  # it was read to its end: only its task is unknown


def test_clients_that_go_are_counted_as_such_and_their_images_are_not_classified(model, tmp_path, caplog):
    options = ServeOptions(max_batch=2, bodies=BodyLimits(max_concurrent_requests=12))

    async def run(address):
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=address, timeout=30, limits=limits) as client:
            assert (await client.put("/v1/tasks/pets", json=CAT)).status_code == 201
            asked = [asyncio.create_task(ask(client, "pets")) for _ in range(12)]
            while await metric(client, "waiting_images") < 8:
                await asyncio.sleep(0.005)
            for each in asked[2:]:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            while await metric(client, "pending_requests") > 0:
                await asyncio.sleep(0.005)
            text = (await client.get("/metrics")).text
            assert (await ask(client, "pets")).status_code == 200  # the places are free again
        host, port = address.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.sleep(0.2)
        return text

    caplog.set_level("INFO", logger="hyperclip_fast.access")
    with serving_here(model, tmp_path / "tasks.safetensors", options, slow=0.4) as address:
        text = asyncio.run(run(address))
        again = httpx.get(f"{address}/metrics").text
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if "#" not in line}
    gone = counts['hyperclip_requests_total{method="POST",route="/v1/classify",status="499"}']
    assert gone == 10 and counts["hyperclip_batch_images_sum"] <= 4
    assert 'hyperclip_requests_total{method="POST",route="none",status="499"} 1.0' in again
    assert 'status="500"' not in again
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "POST /v1/classify 499" in line]) == 11
    assert not [record for record in caplog.records if record.exc_info]


def test_a_packed_body_is_refused(serve):
    client = serve(ServeOptions())
    packed = io.BytesIO(gzip.compress(bytes(1 << 20)))
    headers = {"Content-Encoding": "gzip", "Content-Type": "image/png"}
    check_error(client.post("/v1/classify?task=a", content=packed.getvalue(), headers=headers), 415, "bad_encoding")
    headers = {"Content-Encoding": "identity", "Content-Type": "image/png"}
    check_error(client.post("/v1/classify?task=a", content=png(), headers=headers), 404, "unknown_task")


def test_changes_have_a_bound_of_their_own(serve):
    client = serve(replace(ServeOptions(), bodies=BodyLimits(max_concurrent_changes=0)))
    check_error(client.put("/v1/tasks/pets", json=CAT), 503, "busy")
    check_error(client.delete("/v1/tasks/pets"), 503, "busy")
    check_error(
        client.post("/v1/classify?task=a", content=png(), headers={"Content-Type": "image/png"}), 404, "unknown_task"
    )
