"""A server's tasks: saved before a change is confirmed, remembered without a name, refused with a reason."""

import asyncio
import json
import threading

import pytest
import torch

from hyperclip_fast.serving.bank_file import BankFile
from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.task_registry import TaskLimits, TaskRegistry
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.tasks import AdaptedTask
from tests.towers import patch_text_tower, tiny_model

NONE = torch.empty(0)


class Maker:
    """A `make` that counts what it made, and takes a turn of the event loop over it."""

    def __init__(self):
        self.made = []

    async def __call__(self, classes):
        self.made.append(tuple(classes))
        await asyncio.sleep(0)
        return AdaptedTask(tuple(classes), NONE, NONE)


@pytest.fixture
def model(monkeypatch):
    patch_text_tower(monkeypatch)
    return tiny_model()


def test_a_task_without_a_name_is_made_once_and_the_oldest_goes():
    async def run():
        make = Maker()
        registry = TaskRegistry(make, TaskLimits(ad_hoc=2))
        same = await asyncio.gather(*(registry.ad_hoc(["a", "b"]) for _ in range(5)))
        assert len(set(same)) == 1 and make.made == [("a", "b")]
        await registry.ad_hoc(["c"])
        assert await registry.ad_hoc(["a", "b"]) is same[0]  # used again: now ["c"] is the oldest
        await registry.ad_hoc(["d"])
        assert await registry.ad_hoc(["a", "b"]) is same[0]
        await registry.ad_hoc(["c"])
        return make.made

    assert asyncio.run(run()) == [("a", "b"), ("c",), ("d",), ("c",)]


def test_nothing_is_remembered_where_none_may_be():
    async def run():
        make = Maker()
        registry = TaskRegistry(make, TaskLimits(ad_hoc=0))
        answers = await asyncio.gather(*(registry.ad_hoc(["a"]) for _ in range(3)))
        assert [answer.classes for answer in answers] == [("a",)] * 3
        return make.made

    assert asyncio.run(run()) == [("a",)] * 3


def test_room_counts_tasks_that_are_being_made():
    async def run():
        registry = TaskRegistry(Maker(), TaskLimits(tasks=2))
        results = await asyncio.gather(*(registry.put(str(i), ["a"]) for i in range(5)), return_exceptions=True)
        assert len(registry) == 2
        return results

    results = asyncio.run(run())
    assert results[:2] == [True, True] and all(error.status == 409 for error in results[2:])


def test_changes_that_come_during_a_save_share_the_next_and_wait_for_it():
    saved, may_go_on = [], threading.Event()

    def save(tasks):
        may_go_on.wait(20)
        saved.append(list(tasks))

    async def run():
        registry = TaskRegistry(Maker(), save=save)
        first = asyncio.create_task(registry.put("first", ["a"]))
        await asyncio.sleep(0.05)  # its save is under way
        others = [asyncio.create_task(registry.put(f"task {i}", ["a"])) for i in range(30)]
        removal = asyncio.create_task(registry.remove("first"))
        await asyncio.sleep(0.05)
        assert len(registry) == 0 and not any(each.done() for each in (first, removal, *others))
        with pytest.raises(RequestError, match="got 'first'"):
            registry.get("first")  # nobody may rely on it yet
        may_go_on.set()
        assert await asyncio.gather(first, *others) == [True] * 31
        await removal
        assert list(registry) == [f"task {i}" for i in range(30)]

    asyncio.run(run())
    assert saved == [["first"], [f"task {i}" for i in range(30)]]


def test_what_cannot_be_saved_is_refused_and_the_next_save_heals():
    tries = []

    def save(tasks):
        tries.append(list(tasks))
        if len(tries) in (2, 3):
            raise (OSError if len(tries) == 2 else RuntimeError)("disk full, or out of memory")

    async def run():
        registry = TaskRegistry(Maker(), save=save)
        assert await registry.put("a", ["x"])
        results = await asyncio.gather(
            registry.put("b", ["x"]), registry.put("a", ["y"]), registry.remove("a"), return_exceptions=True
        )
        assert [(each.status, each.code) for each in results] == [(503, "not_saved")] * 3
        assert list(registry) == ["a"] and registry.get("a").classes == ("x",)
        with pytest.raises(RequestError, match="could not be saved"):
            await registry.put("b", ["x"])
        assert registry.saves_fail and registry.failed_saves == 2
        assert await registry.put("b", ["z"])  # new: the refused one never was
        assert not registry.saves_fail and list(registry) == ["a", "b"]

    asyncio.run(run())
    assert tries[-1] == ["a", "b"] and len(tries) == 4


def test_a_change_whose_client_has_gone_is_saved_with_the_others():
    may_go_on = threading.Event()

    async def run():
        registry = TaskRegistry(Maker(), save=lambda tasks: may_go_on.wait(20))
        gone, stays = (asyncio.create_task(registry.put(name, ["a"])) for name in ("gone", "stays"))
        await asyncio.sleep(0.05)
        gone.cancel()
        may_go_on.set()
        assert await stays
        await registry.close()
        return list(registry)

    assert asyncio.run(run()) == ["gone", "stays"]


def test_a_bank_file_holds_the_tasks(model, tmp_path):
    file = BankFile(tmp_path / "tasks.safetensors", model, create=True)
    assert file.read() == {}
    bank = TaskBank(model)
    bank.add_many({"pets": ["cat", "dog"], "food": ["pizza"]})
    tasks = {name: bank[name] for name in bank.tasks}
    file.write(tasks)
    bank.save(tmp_path / "by bank.safetensors")
    assert (tmp_path / "by bank.safetensors").read_bytes() == file.path.read_bytes()
    again = file.read()
    assert list(again) == ["pets", "food"]
    for name, task in again.items():
        assert task.classes == tasks[name].classes
        assert torch.equal(task.row, tasks[name].row) and torch.equal(task.embeddings, tasks[name].embeddings)
    file.write({})
    assert file.read() == {}


def test_the_bank_of_another_model_is_refused(model, tmp_path):
    BankFile(tmp_path / "tasks.safetensors", model, create=True).close()
    with torch.no_grad():
        model.logit_bias.add_(1)
    with pytest.raises(ValueError, match="made by another one"):
        BankFile(tmp_path / "tasks.safetensors", model).read()


@pytest.mark.parametrize(
    "classes, message",
    [
        ([], "non-empty list of class names"),
        (list("abcd"), "at most 3 class names, got 4"),
        (["a", "b", "a"], "got 'a' twice"),
        (["a", "\t"], "not blank"),
        (["a" * 10], "at most 9 characters, got 10"),
        (["a\nb"], "no control characters"),
        ([json.loads('"\\ud83d"')], "no control characters"),
    ],
)
def test_classes_that_are_refused(classes, message):
    async def run():
        make = Maker()
        registry = TaskRegistry(make, TaskLimits(classes=3, length=9))
        for refused in (registry.put("task", classes), registry.ad_hoc(classes)):
            with pytest.raises(RequestError, match=message) as error:
                await refused
            assert error.value.status == 422
        assert make.made == [] and len(registry) == 0

    asyncio.run(run())


def test_names_of_any_script_are_taken():
    async def run():
        registry = TaskRegistry(Maker())
        assert await registry.put("família", ["猫", "👩‍🚀", "ß\u00a0ß"])
        return registry.get("família").classes

    assert asyncio.run(run()) == ("猫", "👩‍🚀", "ß\u00a0ß")
