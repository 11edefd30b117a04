"""ThreadSafeTaskBank: threads classify while tasks come, change and go, and each answer is that of one moment."""

import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hyperclip_fast.task_bank import TaskBank, ThreadSafeTaskBank
from tests.towers import patch_text_tower, tiny_model

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
STAYS = {"stays": ["sun", "moon", "star"]}
VERSIONS = [{"left": [f"left {i}", "other"], "right": [f"right {i}", "other", "more"]} for i in range(3)]
COMES = {"comes": ["here", "there"]}


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        yield tiny_model()


def answers_of(model, tasks):
    """What a bank of these tasks says of each image in each task."""
    bank = TaskBank(model)
    bank.add_many(tasks)
    return {task: bank.classify(IMAGES, [task] * len(IMAGES), topk=5) for task in tasks}


def is_same(ours, theirs):
    close = pytest.approx(theirs.probabilities, abs=1e-4)
    return (ours.task, ours.names) == (theirs.task, theirs.names) and ours.probabilities == close


def test_eight_threads_classify_while_tasks_change(model):
    """left and right are replaced together: no answer may mix their versions, nor be of anything but a version."""
    valid = [answers_of(model, version) for version in VERSIONS]
    constant = answers_of(model, {**STAYS, **COMES})
    bank, end = ThreadSafeTaskBank(model), time.monotonic() + 2.5
    bank.add_many({**STAYS, **VERSIONS[0]})
    seen, away = set(), threading.Event()

    def ask(seed):
        draw, count = random.Random(seed), 0
        while time.monotonic() < end:
            names = [draw.choice(("stays", "left", "right")) for _ in range(6)]
            found = bank.classify(IMAGES, names, topk=5)
            expected = [[(version | constant)[name][i] for i, name in enumerate(names)] for version in valid]
            fits = [k for k, wanted in enumerate(expected) if all(map(is_same, found, wanted))]
            assert fits, found
            seen.update(fits if len(fits) == 1 else ())
            try:
                (found,) = bank.classify(IMAGES[:1], ["comes"], topk=5)
                assert is_same(found, constant["comes"][0])
            except ValueError as error:
                assert "got 'comes'" in str(error)
                away.set()
            count += 1
        return count

    def change(offset):
        count = 0
        while time.monotonic() < end:
            count += 1
            bank.add_many(VERSIONS[(count + offset) % 3])
            if offset == 0:
                bank.add_many(COMES)
                assert "comes" in bank and bank.classes("comes") == ("here", "there")
                bank.remove("comes")
        return count

    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(ask, seed) for seed in range(8)]
        changed = [pool.submit(change, offset) for offset in range(2)]
        assert min(future.result() for future in asked) > 3 and min(future.result() for future in changed) > 3
    assert len(seen) > 1 and away.is_set()
    assert set(bank.tasks) == {"stays", "left", "right"} and len(bank) == 3


def test_it_answers_saves_and_loads_as_a_bank_does(model, tmp_path):
    shared, plain = ThreadSafeTaskBank(model), TaskBank(model)
    for bank in (shared, plain):
        bank.add_many({**STAYS, **VERSIONS[0]})
        bank.remove("left")
        bank.add("more", ["x", "y"])
        bank.save(tmp_path / f"{type(bank).__name__}.safetensors")
    names = ["stays", "more", "right", "stays", "more", "right"]
    assert shared.classify(IMAGES, names, 2) == plain.classify(IMAGES, names, 2)
    assert shared.tasks == plain.tasks == tuple(shared)
    files = [(tmp_path / f"{kind.__name__}.safetensors") for kind in (ThreadSafeTaskBank, TaskBank)]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = ThreadSafeTaskBank.load(files[1], model)
    assert loaded.classify(IMAGES, names, 2) == plain.classify(IMAGES, names, 2)
    loaded.add("new", ["a"])
    assert loaded["new"].classes == ("a",) and "new" not in shared


def test_what_is_refused_changes_nothing(model):
    bank = ThreadSafeTaskBank(model)
    bank.add_many(STAYS)
    for wrong in ({"new": ["a"], "": ["b"]}, {"new": ["a"], "bad": []}, {"new": ["a", "a"]}):
        with pytest.raises(ValueError, match="task"):
            bank.add_many(wrong)
    for call in (
        lambda: bank.remove("birds"),
        lambda: bank.classes("birds"),
        lambda: bank.classify(IMAGES[:1], ["birds"]),
    ):
        with pytest.raises(ValueError, match=r"1 tasks \(stays...\), got 'birds'"):
            call()
    with pytest.raises(ValueError, match="a task for each of 2 images"):
        bank.classify(IMAGES[:2], ["stays"])
    with pytest.raises(ValueError, match="topk must be"):
        bank.classify(IMAGES[:1], ["stays"], topk=0)
    assert bank.tasks == ("stays",) and bank.classify(IMAGES[:0], []) == []


def _answer(bank, pipe):
    torch.set_num_threads(1)
    bank.add("theirs", ["a", "b"])
    pipe.send(bank.classify(IMAGES, ["stays"] * 6, 3))


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_another_process_answers_alike(model, way):
    """A copy of it: what is added there stays there."""
    bank = ThreadSafeTaskBank(model)
    bank.add_many(STAYS)
    context = multiprocessing.get_context(way)
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(bank, theirs))
    process.start()
    assert ours.poll(60)
    assert all(map(is_same, ours.recv(), bank.classify(IMAGES, ["stays"] * 6, 3)))
    process.join(30)
    assert process.exitcode == 0 and bank.tasks == ("stays",)
