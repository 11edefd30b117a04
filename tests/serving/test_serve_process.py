"""`hyperclip serve` over real sockets: signals under load, bodies that do not end, tasks that change meanwhile."""

import asyncio
import io
import signal
import socket
import time

import httpx
import pytest
from PIL import Image

from hyperclip_fast.cli.main import main
from hyperclip_fast.serving.gate.bodies import BodyLimits
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.task_bank import TaskBank
from tests.serving.process import serving, serving_here
from tests.towers import patch_text_tower, tiny_model

TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"]}


def png(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def model(monkeypatch, tmp_path):
    patch_text_tower(monkeypatch)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    return model


async def put_tasks(client):
    for name, classes in TASKS.items():
        assert (await client.put(f"/v1/tasks/{name}", json={"classes": classes})).status_code == 201


async def metric(client, name):
    lines = (await client.get("/metrics")).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"hyperclip_{name} "))


def ask(client, task):
    return client.post("/v1/classify", files={"image": png()}, data={"task": task})


@pytest.mark.slow
def test_a_signal_under_load_loses_no_accepted_request(model, tmp_path):
    bank = tmp_path / "tasks.safetensors"

    async def run(process):
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=process.address, timeout=30, limits=limits) as client:
            await put_tasks(client)
            asked = [asyncio.create_task(ask(client, task)) for task in ["pets", "food"] * 20]
            while await metric(client, "batch_images_sum") + await metric(client, "waiting_images") < 40:
                await asyncio.sleep(0.01)  # from here on each has its task
            assert (await client.delete("/v1/tasks/food")).status_code == 204  # requests for it are waiting
            assert (await client.put("/v1/tasks/last", json={"classes": ["x"]})).status_code == 201
            assert await metric(client, "waiting_images") > 10
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*asked)

    with serving(str(tmp_path / "model"), bank, "--max-batch", "4", slow=0.25) as process:
        answers = asyncio.run(run(process))
        assert process.wait(timeout=20) == 0, process.log.read_text()
        log = process.log.read_text()
        assert "Traceback" not in log and "ERROR" not in log, log
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", int(process.address.rsplit(":", 1)[1])), timeout=1)
    for task, answer in zip(["pets", "food"] * 20, answers):
        assert answer.status_code == 200
        (result,) = answer.json()["results"]
        assert sorted(each["name"] for each in result["ranked"]) == TASKS[task]
    assert TaskBank.load(bank, model).tasks == ("pets", "last")


def test_nothing_is_lost_while_tasks_come_and_go(model, tmp_path):
    """Each answer names the classes of a version of its task that was there while the request was under way."""

    async def ask_on(client, answers, until):
        while time.monotonic() < until:
            begin = time.monotonic()
            answer = await ask(client, "changing")
            names = sorted(each["name"] for each in answer.json()["results"][0]["ranked"])
            answers.append((begin, time.monotonic(), answer.status_code, names))

    async def change_on(client, versions, until):
        while time.monotonic() < until:
            classes = [f"version {len(versions)}", "other"]
            begin = time.monotonic()
            assert (await client.put("/v1/tasks/changing", json={"classes": classes})).status_code in (200, 201)
            versions.append((begin, time.monotonic(), sorted(classes)))
            extra = f"/v1/tasks/extra {len(versions)}"
            assert (await client.put(extra, json={"classes": ["a"]})).status_code == 201
            assert (await client.delete(extra)).status_code == 204

    async def run(address):
        answers, versions = [], []
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            await change_on(client, versions, 0)
            await client.put("/v1/tasks/changing", json={"classes": ["version 0", "other"]})
            versions.append((0, 0, ["other", "version 0"]))
            until = time.monotonic() + 2
            await asyncio.gather(
                change_on(client, versions, until), *(ask_on(client, answers, until) for _ in range(8))
            )
        return answers, versions

    bank = tmp_path / "tasks.safetensors"
    with serving_here(model, bank, ServeOptions(), slow=0.01) as address:
        answers, versions = asyncio.run(run(address))
    assert list(TaskBank.load(bank, model).classes("changing")) == [f"version {len(versions) - 1}", "other"]
    assert len(answers) > 50 and len(versions) > 5
    for begin, end, status, names in answers:
        assert status == 200
        index = next(i for i, version in enumerate(versions) if version[2] == names)
        assert versions[index][0] <= end  # not before somebody put it
        assert index + 1 == len(versions) or versions[index + 1][1] >= begin  # nor after the next one was there


def send_forever(address, most, pause=0.0):
    """Send a chunked body that does not end; the answer, and how many bytes were sent until it came."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = "POST /v1/classify?task=pets HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.setblocking(False)
        chunk, sent, answer = b"8000\r\n" + bytes(0x8000) + b"\r\n", 0, b""
        rest = b""
        while sent < most and b"}}" not in answer:
            try:
                rest = rest or chunk
                done = connection.send(rest if pause == 0 else rest[:1])
                rest, sent = rest[done:], sent + done
            except BlockingIOError:
                time.sleep(0.001)
            try:
                answer += connection.recv(65536)
            except BlockingIOError:
                time.sleep(pause)
    return answer.decode(), sent


def test_bodies_that_do_not_end(model, tmp_path):
    options = ServeOptions(bodies=BodyLimits(max_bytes=500_000, max_seconds=0.5))
    with serving_here(model, tmp_path / "tasks.safetensors", options) as address:
        answer, sent = send_forever(address, 64 << 20)
        assert answer.startswith("HTTP/1.1 413") and '"code":"too_large"' in answer and sent < 16 << 20
        begin = time.monotonic()
        answer, _ = send_forever(address, 10_000, pause=0.05)
        assert answer.startswith("HTTP/1.1 408") and '"code":"too_slow"' in answer
        assert 0.4 < time.monotonic() - begin < 5
        text = httpx.get(f"{address}/metrics").text
        assert "hyperclip_pending_requests 0.0" in text  # others may come again


@pytest.mark.slow
def test_hosts_that_a_server_answers_to(model, tmp_path):
    options = ("--allow-host", "here.example", "--allow-host", "[fe80::1]")
    with serving(str(tmp_path / "model"), tmp_path / "tasks.safetensors", *options) as process:
        port = process.address.rsplit(":", 1)[1]
        for host, status in (
            (f"127.0.0.1:{port}", 200),
            (f"localhost:{port}", 200),
            ("here.example", 200),
            (f"[fe80::1]:{port}", 200),
            (f"rebound.example:{port}", 400),
        ):
            assert httpx.get(f"{process.address}/v1/tasks", headers={"Host": host}).status_code == status
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0  # and not the signal's


def test_what_serve_refuses(model, tmp_path, capsys):
    folder, bank = str(tmp_path / "model"), tmp_path / "tasks.safetensors"
    other = tiny_model(embed_dim=8)
    made = TaskBank(other)
    made.add("pets", ["cat"])
    made.save(bank)
    assert main(["serve", "--model", folder, "--bank", str(bank)]) == 2
    assert "made by another one" in capsys.readouterr().err
    assert main(["serve", "--model", folder, "--bank", str(tmp_path / "none" / "tasks.safetensors")]) == 2
    assert "folder that exists" in capsys.readouterr().err
    new = ["serve", "--model", folder, "--bank", str(tmp_path / "new.safetensors"), "--create"]
    for option, value in (("--max-batch", "0"), ("--max-mib", "nan"), ("--port", "-1"), ("--max-wait-ms", "-1")):
        assert main([*new, option, value]) == 2
        assert f"{option} must be at least" in capsys.readouterr().err
    assert main([*new, "--port", "70000"]) == 2
    assert "at most 65535" in capsys.readouterr().err
    for option, value, message in (
        ("--max-length", "1001", "at most 1000, got 1001"),
        ("--max-classes", "10001", "at most 10000, got 10001"),
        ("--max-mib", "inf", "at most 1000000000, got inf"),
        ("--max-megapixels", "1e308", "at most 1000000000, got 1e+308"),
        ("--max-wait-ms", "nan", "at most 1000000000, got nan"),
        ("--allow-host", "http://here", "must be a name without a port"),
        ("--allow-host", "here:80", "must be a name without a port"),
    ):
        assert main([*new, option, value]) == 2
        assert message in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main([*new, "--port", port]) == 2
    assert "in use" in capsys.readouterr().err
