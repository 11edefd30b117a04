"""Micro-batches: who shares one, what each is answered by, and that nothing accepted is lost."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_fast.serving.batching import Batcher, ModelThread
from hyperclip_fast.serving.errors import RequestError
from hyperclip_fast.serving.task_registry import TaskRegistry
from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.tasks import AdaptedTask, adapt_tasks, classify_tasks, embed_tasks
from tests.towers import patch_text_tower, tiny_model

TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"], "one": ["thing"], "many": list("abcdefg")}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
NONE = torch.empty(0)


def fake_task(*classes):
    return AdaptedTask(classes, NONE, NONE)


class Recorder:
    """A `classify` that answers with each task's own class names, and holds batches back while `gate` is shut."""

    def __init__(self):
        self.batches, self.gate, self.broken = [], asyncio.Event(), False
        self.gate.set()

    async def __call__(self, images, tasks, topk):
        self.batches.append(list(tasks))
        await self.gate.wait()
        if self.broken:
            raise RuntimeError("broken")
        return [[(name, 1.0) for name in task.classes[:k]] for task, k in zip(tasks, topk)]


async def started(recorder, **options):
    batcher = Batcher(recorder, **options)
    batcher.start()
    return batcher


async def settle():
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_mixed_batch_answers_as_the_bank_does(monkeypatch):
    patch_text_tower(monkeypatch)
    model = tiny_model()
    bank = TaskBank(model)
    bank.add_many(TASKS)
    names = ["many", "one", "food", "many", "pets", "pets", "food", "one"]
    topk = [1, 2, 3, 4, 5, 6, 7, 8]
    made = dict(zip(TASKS, adapt_tasks(model, list(TASKS.values()))))
    ranked = classify_tasks(model, IMAGES, [made[name] for name in names], topk)
    for ours, expected, k in zip(ranked, bank.classify(IMAGES, names, 8), topk):
        found, shares, scores = zip(*ours)
        assert found == expected.names[:k]
        for mine, theirs in ((shares, expected.probabilities[:k]), (scores, expected.scores[:k])):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-6, rtol=1e-5)


def test_embeddings_of_a_mixed_batch_are_each_tasks_own(monkeypatch):
    """They make the logits that the bank has, and equal those of the specialised stock model."""
    patch_text_tower(monkeypatch)
    model = tiny_model()
    names = ["many", "one", "many", "pets"]
    made = dict(zip(TASKS, adapt_tasks(model, list(TASKS.values()))))
    found = embed_tasks(model, IMAGES[:4], [made[name] for name in names])
    for image, name, ours in zip(IMAGES, names, found):
        with torch.no_grad():
            alone = torch.nn.functional.normalize(model.specialize(TASKS[name])(image[None]), dim=-1)[0]
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)


def test_requests_of_different_tasks_share_a_pass_in_the_models_thread(monkeypatch):
    patch_text_tower(monkeypatch)
    model = tiny_model()
    passes = []
    forward = model.image.forward
    monkeypatch.setattr(model.image, "forward", lambda *args: passes.append(len(args[0])) or forward(*args))

    async def run():
        thread = ModelThread(model, threads=1)
        made = [await thread.make(classes) for classes in TASKS.values()]
        batcher = await started(thread.classify, max_wait=0.05)
        answers = await asyncio.gather(*(batcher.answer(IMAGES[i], made[i % 4], 10) for i in range(8)))
        await batcher.close()
        thread.close()
        return answers

    answers = asyncio.run(run())
    assert passes == [8]
    for i, answer in enumerate(answers):
        assert sorted(name for name, *_ in answer) == sorted(list(TASKS.values())[i % 4])


def test_a_batch_is_full_or_its_oldest_has_waited():
    async def run():
        recorder = Recorder()
        batcher = await started(recorder, max_batch=3, max_wait=0.05)
        loop, task = asyncio.get_running_loop(), fake_task("a")
        begin = loop.time()
        await asyncio.gather(*(batcher.answer(NONE, task, 1) for _ in range(6)))
        full = loop.time() - begin
        begin = loop.time()
        await batcher.answer(NONE, task, 1)
        alone = loop.time() - begin
        await batcher.close()
        return [len(batch) for batch in recorder.batches], full, alone

    sizes, full, alone = asyncio.run(run())
    assert sizes == [3, 3, 1]
    assert full < 0.05 <= alone


def test_what_gathers_while_the_model_is_busy_goes_at_once_and_together():
    async def run():
        recorder = Recorder()
        batcher = await started(recorder, max_batch=8, max_wait=0)
        tasks = [fake_task(str(i)) for i in range(5)]
        recorder.gate.clear()
        answers = [asyncio.create_task(batcher.answer(NONE, task, 1)) for task in tasks]
        await settle()
        first = batcher.waiting
        answers += [asyncio.create_task(batcher.answer(NONE, task, 1)) for task in tasks]
        await settle()
        recorder.gate.set()
        ranked = await asyncio.gather(*answers)
        await batcher.close()
        return recorder.batches, first, ranked

    batches, first, ranked = asyncio.run(run())
    assert [name for [(name, _)] in ranked] == list("0123401234")
    assert sum(map(len, batches)) == 10 and len(batches[-1]) >= 5 and first == 5 - len(batches[0])


@pytest.mark.parametrize("mix", [True, False])
def test_one_task_a_batch_where_mixing_is_off(mix):
    async def run():
        recorder = Recorder()
        batcher = await started(recorder, max_batch=4, max_wait=0.01, mix=mix)
        tasks = [fake_task(str(i)) for i in range(3)]
        await asyncio.gather(*(batcher.answer(NONE, tasks[i % 3], 1) for i in range(12)))
        await batcher.close()
        return recorder.batches

    batches = asyncio.run(run())
    assert [len(set(batch)) for batch in batches] == [3 if mix else 1] * 3
    assert [len(batch) for batch in batches] == [4, 4, 4]


def test_a_failure_belongs_to_its_batch():
    async def run():
        recorder = Recorder()
        recorder.broken = True
        batcher = await started(recorder)
        failed = await asyncio.gather(
            *(batcher.answer(NONE, fake_task("a"), 1) for _ in range(3)), return_exceptions=True
        )
        recorder.broken = False
        answer = await batcher.answer(NONE, fake_task("b"), 1)
        await batcher.close()
        return failed, answer

    failed, answer = asyncio.run(run())
    assert [str(error) for error in failed] == ["broken"] * 3
    assert answer == [("b", 1.0)]


def test_who_has_gone_is_not_computed():
    async def run():
        recorder = Recorder()
        batcher = await started(recorder, max_wait=0.02)
        here, gone = fake_task("here"), fake_task("gone")
        leaving = asyncio.create_task(batcher.answer(NONE, gone, 1))
        staying = asyncio.create_task(batcher.answer(NONE, here, 1))
        await settle()
        leaving.cancel()
        answer = await staying
        await batcher.close()
        return recorder.batches, answer, here

    batches, answer, here = asyncio.run(run())
    assert batches == [[here]] and answer == [("here", 1.0)]


def test_closing_answers_what_was_accepted():
    async def run():
        recorder = Recorder()
        batcher = await started(recorder, max_batch=2, max_wait=10.0)
        recorder.gate.clear()
        answers = [asyncio.create_task(batcher.answer(NONE, fake_task(str(i)), 1)) for i in range(6)]
        await settle()
        closing = asyncio.create_task(batcher.close())
        await settle()
        assert not closing.done()
        recorder.gate.set()
        await closing
        assert all(answer.done() for answer in answers)
        with pytest.raises(RequestError, match="shuts down"):
            await batcher.answer(NONE, fake_task("late"), 1)
        return [answer.result()[0][0] for answer in answers]

    assert asyncio.run(run()) == list("012345")


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "remove", "ask", "pause"]), st.integers(0, 2)), min_size=1, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS, max_batch=st.integers(1, 4), mix=st.booleans(), batches=st.integers(1, 3))
def test_each_is_answered_by_the_task_that_it_asked_for(operations, max_batch, mix, batches):
    """Tasks are replaced and removed while requests wait; the answer is the task as it was when the request came."""

    async def run():
        async def make(classes):
            return fake_task(*classes)

        recorder = Recorder()
        registry = TaskRegistry(make)
        batcher = await started(recorder, max_batch=max_batch, max_wait=0, mix=mix, max_concurrent_batches=batches)
        asked, current = [], {}
        for i, (what, which) in enumerate(operations):
            name = f"task {which}"
            if what == "put":
                current[name] = f"version {i}"
                await registry.put(name, [current[name]])
            elif what == "remove" and name in current:
                await registry.remove(name)
                del current[name]
            elif what == "ask" and name in current:
                asked.append((current[name], asyncio.create_task(batcher.answer(NONE, registry.get(name), 1))))
            elif what == "pause":
                recorder.gate.clear() if i % 2 else recorder.gate.set()
                await settle()
        await settle()
        recorder.gate.set()
        await batcher.close()
        return [(expected, await answer) for expected, answer in asked]

    for expected, answer in asyncio.run(run()):
        assert answer == [(expected, 1.0)]
