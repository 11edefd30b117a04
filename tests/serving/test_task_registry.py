"""A server's tasks: saved soon after changes but not for each, remembered without a name, refused with a reason."""

import asyncio
import json

import pytest
import torch

from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.task_registry import TaskLimits, TaskRegistry, read_bank, write_bank
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


def test_many_changes_are_few_saves_and_the_last_is_saved():
    saved = []

    async def run():
        registry = TaskRegistry(Maker(), save=saved.append, delay=0.05)
        for i in range(30):
            await registry.put(f"task {i}", ["a"])
            await asyncio.sleep(0.005)
        registry.remove("task 0")
        assert registry.unsaved
        await registry.close()
        assert not registry.unsaved

    asyncio.run(run())
    assert 2 <= len(saved) <= 10
    assert list(saved[-1]) == [f"task {i}" for i in range(1, 30)]
    assert len(saved[0]) < 30  # what was saved first did not change afterwards


def test_a_save_that_fails_is_tried_again_and_never_forgotten(monkeypatch):
    monkeypatch.setattr("hyperclip_fast.serving.task_registry.RETRY_SECONDS", 0.01)
    tries = []

    def save(tasks):
        tries.append(list(tasks))
        if len(tries) in (1, 2, 4):
            raise (OSError if len(tries) == 1 else RuntimeError)("disk full, or out of memory")

    async def run():
        registry = TaskRegistry(Maker(), save=save, delay=0)
        await registry.put("a", ["x"])
        for _ in range(500):
            if len(tries) == 3 and not registry.unsaved:
                break
            await asyncio.sleep(0.01)
        assert registry.failed_saves == 2
        await registry.put("b", ["x"])
        closing = registry.close()
        with pytest.raises(RuntimeError, match="out of memory"):
            await closing
        return registry.unsaved

    assert asyncio.run(run()) is True
    assert tries == [["a"]] * 3 + [["a", "b"]]


def test_a_file_holds_the_tasks_and_no_file_none(model, tmp_path):
    path = tmp_path / "tasks.safetensors"
    assert read_bank(path, model) == {}
    bank = TaskBank(model)
    bank.add_many({"pets": ["cat", "dog"], "food": ["pizza"]})
    tasks = {name: bank[name] for name in bank.tasks}
    write_bank(path, model, tasks)
    again = read_bank(path, model)
    assert list(again) == ["pets", "food"]
    for name, task in again.items():
        assert task.classes == tasks[name].classes
        assert torch.equal(task.row, tasks[name].row) and torch.equal(task.embeddings, tasks[name].embeddings)
    write_bank(path, model, {})
    assert list(tmp_path.iterdir()) == [] and read_bank(path, model) == {}


def test_files_that_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="folder that exists"):
        read_bank(tmp_path / "none" / "tasks.safetensors", model)
    bank = TaskBank(model)
    bank.add("pets", ["cat"])
    bank.save(tmp_path / "tasks.safetensors")
    with torch.no_grad():
        model.logit_bias.add_(1)
    with pytest.raises(ValueError, match="made by another one"):
        read_bank(tmp_path / "tasks.safetensors", model)


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
