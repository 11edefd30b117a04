"""A confirmed change of tasks survives: SIGKILL and SIGTERM at random moments, disks that are full or gone, a rival.

HYPERCLIP_TRIALS sets how many times a server is killed; CI takes 10.
"""

import asyncio
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal

import httpx
import pytest

from hyperclip_fast.cli.main import main
from hyperclip_fast.serving.bank_file import BankFile
from hyperclip_fast.serving.options import ServeOptions
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.utils.files import written_file
from tests.serving.process import Nursery, serving_here
from tests.serving.test_serve_process import ask, metric
from tests.towers import patch_text_tower, tiny_model

TRIALS = int(os.environ.get("HYPERCLIP_TRIALS", "10"))
GONE = ["nobody put this"]


@pytest.fixture
def model(monkeypatch):
    patch_text_tower(monkeypatch)
    return tiny_model()


@pytest.fixture
def nursery(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with Nursery(tmp_path / "model") as nursery:
        yield nursery


class Changes:
    """What the clients know of the tasks: what the server confirmed, and what it has not answered yet."""

    def __init__(self):
        self.confirmed, self.asked, self.number, self.answers = {}, {}, 0, 0

    async def go_on(self, client, name, draw):
        """Change one task until the server dies; nobody else changes it."""
        with contextlib.suppress(httpx.TransportError):
            while True:
                self.number += 1
                removes = name in self.confirmed and draw.random() < 0.3
                self.asked[name] = None if removes else [f"version {self.number}", "other"]
                if removes:
                    answer = await client.delete(f"/v1/tasks/{name}")
                else:
                    answer = await client.put(f"/v1/tasks/{name}", json={"classes": self.asked[name]})
                assert answer.status_code in (200, 201, 204), answer.text
                self.answers += 1
                self._settle(name, self.asked.pop(name))

    def check(self, bank):
        """Each task is as it was confirmed, or as it was asked for without an answer; who looks knows from now on."""
        found = {name: list(bank.classes(name)) for name in bank.tasks}
        for name in {*found, *self.confirmed, *self.asked}:
            allowed = [self.confirmed.get(name), self.asked.get(name, GONE)]
            assert found.get(name) in allowed, f"{name}: {found.get(name)}, not {allowed}"
            self._settle(name, found.get(name))
        self.asked.clear()

    def _settle(self, name, classes):
        self.confirmed.pop(name, None)
        if classes is not None:
            self.confirmed[name] = classes


@pytest.mark.slow
def test_no_confirmed_change_is_lost_to_sigkill(nursery, model, tmp_path):
    bank, changes, draw = tmp_path / "tasks.safetensors", Changes(), random.Random(0)

    async def change(address):
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            clients = [asyncio.create_task(changes.go_on(client, f"task {i}", draw)) for i in range(6)]
            await asyncio.sleep(draw.uniform(0.01, 0.25))
            os.kill(nursery.process, signal.SIGKILL)
            await asyncio.gather(*clients)

    for _ in range(TRIALS):
        asyncio.run(change(nursery.start(bank, "--create")))
        assert nursery.wait() == -signal.SIGKILL
        changes.check(TaskBank.load(bank, model))
    assert changes.answers > 3 * TRIALS
    nursery.start(bank)
    assert not list(tmp_path.glob(".tmp-*"))  # what the last one was writing is gone
    os.kill(nursery.process, signal.SIGTERM)
    assert nursery.wait() == 0
    changes.check(TaskBank.load(bank, model))


@pytest.mark.slow
def test_no_accepted_request_is_lost_to_sigterm(nursery, model, tmp_path):
    """Requests that the server had counted are answered, whatever moment it is told to stop at; none gets half."""
    draw, answered = random.Random(0), 0
    bank = tmp_path / "tasks.safetensors"

    async def stop(address):
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=address, timeout=30, limits=limits) as client:
            assert (await client.put("/v1/tasks/pets", json={"classes": ["cat", "dog"]})).status_code in (200, 201)
            asked = [asyncio.create_task(ask(client, "pets")) for _ in range(60)]
            await asyncio.sleep(draw.uniform(0, 0.05))
            while await metric(client, "batch_images_sum") + await metric(client, "waiting_images") < 60:
                await asyncio.sleep(0.001)
            change = asyncio.create_task(client.put("/v1/tasks/last", json={"classes": ["x", str(len(asked))]}))
            await asyncio.sleep(draw.uniform(0, 0.02))
            os.kill(nursery.process, signal.SIGTERM)
            return await asyncio.gather(*asked), await asyncio.gather(change, return_exceptions=True)

    for _ in range(TRIALS):
        answers, (change,) = asyncio.run(stop(nursery.start(bank, "--create", "--max-batch", "2")))
        assert nursery.wait() == 0
        assert [answer.status_code for answer in answers] == [200] * 60
        answered += len(answers)
        if not isinstance(change, Exception) and change.status_code in (200, 201):
            assert "last" in TaskBank.load(bank, model).tasks
        log = nursery.log.read_text()
        assert "Traceback" not in log and "ERROR" not in log, log
    assert answered == 60 * TRIALS


@pytest.mark.slow
def test_a_full_disk_refuses_changes_and_the_next_save_heals(nursery, model, tmp_path):
    """The server may write little more to a file than the bank has, as if the disk were full; then what it likes."""
    bank = tmp_path / "tasks.safetensors"
    address = nursery.start(bank, "--create")
    with httpx.Client(base_url=address, timeout=30) as client:
        assert client.put("/v1/tasks/first", json={"classes": ["a", "b"]}).status_code == 201
        before = bank.read_bytes()
        resource.prlimit(nursery.process, resource.RLIMIT_FSIZE, (len(before) + 200, resource.RLIM_INFINITY))
        for change in (
            lambda: client.put("/v1/tasks/second", json={"classes": ["c"]}),
            lambda: client.put("/v1/tasks/third", json={"classes": ["c"]}),
        ):
            refused = change()
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_saved"
            assert refused.headers["retry-after"] == "5"
        assert [task["name"] for task in client.get("/v1/tasks").json()["tasks"]] == ["first"]
        assert client.get("/readyz").json() == {"status": "ready", "tasks": 1, "saves": "failing"}
        text = client.get("/metrics").text
        assert "hyperclip_saves_fail 1.0" in text and "hyperclip_failed_saves 2.0" in text
        files = {"image": (tmp_path / "model" / "config.json").read_bytes()}  # no image: but the task is still known
        assert client.post("/v1/classify", files=files, data={"task": "first"}).json()["error"]["code"] == "bad_image"
        assert bank.read_bytes() == before and not list(tmp_path.glob(".tmp-*"))
        resource.prlimit(nursery.process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert client.put("/v1/tasks/second", json={"classes": ["c"]}).status_code == 201
        assert client.get("/readyz").json()["saves"] == "ok"
        assert "hyperclip_saves_fail 0.0" in client.get("/metrics").text
    os.kill(nursery.process, signal.SIGTERM)
    assert nursery.wait() == 0
    assert TaskBank.load(bank, model).tasks == ("first", "second")
    assert "Traceback" not in nursery.log.read_text()


def test_a_folder_that_goes_away_and_comes_back(model, tmp_path):
    bank = tmp_path / "bank" / "tasks.safetensors"
    bank.parent.mkdir()
    with serving_here(model, bank, ServeOptions()) as address, httpx.Client(base_url=address) as client:
        assert client.put("/v1/tasks/a", json={"classes": ["x"]}).status_code == 201
        shutil.rmtree(bank.parent)
        assert client.put("/v1/tasks/b", json={"classes": ["x"]}).status_code == 503
        assert client.delete("/v1/tasks/a").status_code == 503
        assert [task["name"] for task in client.get("/v1/tasks").json()["tasks"]] == ["a"]
        bank.parent.mkdir()
        assert client.put("/v1/tasks/b", json={"classes": ["x"]}).status_code == 201
    assert TaskBank.load(bank, model).tasks == ("a", "b")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_served_and_not_changed(model, tmp_path):
    bank = tmp_path / "bank" / "tasks.safetensors"
    bank.parent.mkdir()
    BankFile(bank, model, create=True).close()
    (bank.parent / ".tasks.safetensors.lock").unlink()
    bank.parent.chmod(0o555)
    try:
        with (
            pytest.warns(UserWarning, match="nothing can be written"),
            serving_here(model, bank, ServeOptions()) as address,
        ):
            assert httpx.put(f"{address}/v1/tasks/a", json={"classes": ["x"]}).status_code == 503
            assert httpx.get(f"{address}/readyz").json()["saves"] == "failing"
    finally:
        bank.parent.chmod(0o755)


def _hold(path, model, is_held, may_end):
    bank = BankFile(path, model, create=True)
    is_held.set()
    may_end.wait(60)
    bank.close()


def test_two_servers_do_not_share_a_file(model, tmp_path):
    path, link = tmp_path / "tasks.safetensors", tmp_path / "link.safetensors"
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(path, model, is_held, may_end))
    other.start()
    assert is_held.wait(60)
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(ValueError, match=f"no other server serves, .*: process {other.pid} does"):
            BankFile(name, model)
    other.kill()  # a lock ends with its process
    other.join()
    BankFile(path, model).close()


def test_a_file_that_is_not_there_is_made_only_when_asked_for(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "typo.safetensors"
    assert main(["serve", "--model", str(tmp_path / "model"), "--bank", str(path)]) == 2
    assert "typo.safetensors, which does not exist; --create" in capsys.readouterr().err
    assert not path.exists() and not list(tmp_path.glob(".typo*"))
    bank = BankFile(path, model, create=True)
    assert bank.read() == {} and TaskBank.load(path, model).tasks == ()
    bank.close()
    BankFile(path, model).close()
    with pytest.raises(ValueError, match="folder that exists"):
        BankFile(tmp_path / "none" / "tasks.safetensors", model, create=True)


def test_what_a_killed_server_left_goes_and_what_others_write_stays(model, tmp_path):
    names = ("a.safetensors", "b.safetensors")
    begun = []
    for name in names:
        with written_file(tmp_path / name) as beside:
            begun.append(beside)
    for beside in begun:
        beside.write_text("unfinished")
    (tmp_path / names[0]).unlink()
    BankFile(tmp_path / names[0], model, create=True).close()
    assert [beside.exists() for beside in begun] == [False, True]
