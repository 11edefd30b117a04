"""The clients: their answers are the bank's, they come again where the server says so, and no longer than told."""

import asyncio
import subprocess
import sys
import time

import httpx
import pytest
import torch

from hyperclip_fast.serving import client as client_module
from hyperclip_fast.serving.client import AsyncClient, Classes, Client, ServerError
from hyperclip_fast.serving.gate.keys import new_key, read_keys
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.tasks import adapt_tasks, embed_tasks
from tests.serving.asking import TASKS, expected, png
from tests.serving.process import serving_here


class Waiting:
    """A Client whose methods are AsyncClient's, each waited for."""

    def __init__(self, *args, **options):
        self.loop = asyncio.new_event_loop()
        self.client = AsyncClient(*args, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loop.run_until_complete(self.client.close())
        self.loop.close()

    def __getattr__(self, name):
        return lambda *args, **options: self.loop.run_until_complete(getattr(self.client, name)(*args, **options))


@pytest.fixture(params=[Client, Waiting], ids=["threads", "asyncio"])
def kind(request):
    return request.param


def test_all_that_a_client_does(kind, model, tmp_path):
    (key, line), path = new_key("admin", "test"), tmp_path / "keys.txt"
    path.write_text(line)
    picture = tmp_path / "red.png"
    picture.write_bytes(png())
    options = ServeOptions(keys=read_keys(path))
    with serving_here(model, tmp_path / "tasks.safetensors", options) as address, kind(address, key) as client:
        for name, classes in TASKS.items():
            client.put(name, classes)
        client.put("a/b ?", ["x"])
        assert client.tasks() == {**TASKS, "a/b ?": ["x"]}
        client.remove("a/b ?")
        found = client.classify([picture, png("blue")], tasks=["pets", "food"], topk=2)
        for ours, theirs in zip(found, expected(model, [png(), png("blue")], ["pets", "food"], 2), strict=True):
            parts = zip(ours.names, ours.probabilities, ours.scores)
            ranked = [{"name": name, "probability": share, "score": score} for name, share, score in parts]
            assert {"task": ours.task, "ranked": ranked} == theirs
        assert client.classify([png()], labels=["a"], threshold=1.0) == [Classes(None, (), (), ())]
        assert client.classify([png()], labels=["a"], threshold=5e-100)[0].names == ("a",)
        good, bad = client.classify([str(picture), b"none"], tasks="pets")
        assert len(good.names) == 3 and isinstance(bad, ServerError) and bad.code == "bad_image"
        made = adapt_tasks(model, [TASKS["pets"]])
        image = model.preprocess(png())[None]
        torch.testing.assert_close(torch.tensor(client.embed([png()], "pets")), embed_tasks(model, image, made))
        with pytest.raises(ServerError, match=r"got 'birds' \(404 unknown_task\)"):
            client.classify([png()], "birds")
        with pytest.raises(ValueError, match="either tasks or labels"):
            client.classify([png()])
        with pytest.raises(ValueError, match="at least one image"):
            client.classify([], "pets")
        with kind(address, "wrong") as stranger, pytest.raises(ServerError, match="401 unauthorized"):
            stranger.tasks()


class Flaky:
    """A transport that refuses some times before it answers."""

    def __init__(self, *refusals):
        self.refusals, self.times = list(refusals), []

    def __call__(self, request):
        self.times.append(time.monotonic())
        if not self.refusals:
            return httpx.Response(200, json={"tasks": []})
        refusal = self.refusals.pop(0)
        if isinstance(refusal, Exception):
            raise refusal
        status, after = refusal
        problem = {"code": "busy", "message": "busy", "status": status}
        return httpx.Response(status, json={"error": problem}, headers={"Retry-After": after} if after else {})


def with_transport(kind, flaky, **options):
    client = kind("http://test", **options)
    real, inner = (httpx.Client, client) if kind is Client else (httpx.AsyncClient, client.client)
    inner._http = real(base_url="http://test", transport=httpx.MockTransport(flaky))
    return client


def test_it_comes_again_where_the_server_is_busy(kind, monkeypatch):
    flaky = Flaky((503, ""), httpx.ConnectError("refused"), (429, "1"), (503, "Wed, 21 Oct 2015 07:28:00 GMT"))
    with with_transport(kind, flaky) as client:
        assert client.tasks() == {}
    pauses = [after - before for before, after in zip(flaky.times, flaky.times[1:])]
    assert len(pauses) == 4 and pauses[2] > 1.0 and pauses[0] < 0.5 and max(pauses) < 4


def test_it_gives_up_in_the_end_and_at_once_where_it_is_no_use(kind, monkeypatch):
    monkeypatch.setattr(client_module, "MOST_SECONDS", 0.01)
    for refusals, retries, tries, error in (
        ([(503, "9")] * 9, 2, 3, ServerError),
        ([(503, "")], 0, 1, ServerError),
        ([(400, "")], 5, 1, ServerError),
        ([(500, "")], 5, 1, ServerError),
        ([httpx.ConnectError("refused")] * 9, 2, 3, httpx.ConnectError),
        ([httpx.ReadError("cut")], 5, 1, httpx.ReadError),  # it may have been done
    ):
        flaky = Flaky(*refusals)
        with with_transport(kind, flaky, retries=retries) as client, pytest.raises(error):
            client.tasks()
        assert len(flaky.times) == tries
    with pytest.raises(ValueError, match="retries must not be negative"):
        kind("http://test", retries=-1)


def test_what_a_proxy_answers_is_an_error_too(kind):
    def proxy(request):
        return httpx.Response(502, text="<h1>Bad Gateway</h1>")

    with (
        with_transport(kind, proxy) as client,
        pytest.raises(ServerError, match=r"Bad Gateway.* \(502 unknown\)"),
    ):
        client.tasks()


def test_a_client_loads_no_pytorch():
    code = "import sys, hyperclip_fast.serving.client as c; c.Client('http://x'); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "fastapi", "timm", "numpy"} & set(done.stdout.split())
