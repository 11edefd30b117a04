"""Mixed batches as CUDA graphs: sizes, padding, slots and eviction without a GPU, by a recording that runs again."""

import random
from dataclasses import replace

import pytest
import torch

from hyperclip_fast import HyperCLIP, HyperViT, graphed
from hyperclip_fast.serving import graphs
from hyperclip_fast.serving.graphs import Slots
from hyperclip_fast.tasks import adapt_tasks, classify_tasks
from tests.towers import patch_text_tower, tiny_model

NAMES = [[f"thing {i} {j}" for j in range(2 + i % 5)] for i in range(12)]


@pytest.fixture
def recorded(monkeypatch):
    """Batch sizes, as they are recorded; a replay computes everything again, from the same tensors."""
    sizes = []

    def capture(run, device, pool):
        result = run()
        sizes.append(len(result))
        return lambda: result.copy_(run()), result

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "_check", lambda model: next(model.parameters()))
    return sizes


@pytest.fixture
def model(monkeypatch) -> HyperCLIP:
    patch_text_tower(monkeypatch)
    return tiny_model()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_any_batch_is_classified_as_eagerly(model, recorded):
    """Of any size, with more tasks in turn than there are slots."""
    runner, made, chance = graphed(model, sizes=(4, 1), slots=4), adapt_tasks(model, NAMES), random.Random(0)
    for step in range(20):
        tasks = chance.choices(chance.sample(made, 4), k=chance.randint(1, 9))
        topk = [chance.randint(1, 7) for _ in tasks]
        batch = images(len(tasks), step)
        ours, expected = runner.classify(batch, tasks, topk), classify_tasks(model, batch, tasks, topk)
        for mine, other in zip(ours, expected, strict=True):
            assert [name for name, *_ in mine] == [name for name, *_ in other]
            numbers = (torch.tensor([numbers for _, *numbers in ranked]) for ranked in (mine, other))
            torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-6)
    assert sorted(recorded) == [1, 4], "each size is recorded once"


def test_a_task_with_more_classes_than_there_was_room_for(model, recorded):
    runner = graphed(model, sizes=(2,), slots=2)
    small, large = adapt_tasks(model, [["a", "b"], [f"class {i}" for i in range(40)]])
    for tasks in ([small, small], [small, large], [large, small]):
        logits = runner.logits(images(2), tasks)
        assert torch.isfinite(logits).sum(1).tolist() == [len(task.classes) for task in tasks]
        expected = classify_tasks(model, images(2), tasks, [40, 40])
        assert [ranked[0][0] for ranked in runner.classify(images(2), tasks, [1, 1])] == [e[0][0] for e in expected]
    assert recorded == [2, 2], "the table grew once"


def test_an_encoder_takes_rows_by_key_and_asks_for_each_once(recorded):
    vit = HyperViT.from_timm("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    table = vit.base_params.table.detach() + 0.1 * torch.randn(5, vit.norm_spec.num_params)
    asked = []

    class Rows(dict):
        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    rows, runner = Rows(zip("abcde", table)), graphed(vit, sizes=(3,), slots=3)
    for keys in ("aab", "ba", "cb", "d", "a"):
        expected = vit(images(len(keys)), graphs.NormParams(vit.norm_spec, torch.stack([rows.get(k) for k in keys])))
        torch.testing.assert_close(runner(images(len(keys)), list(keys), rows), expected, rtol=1e-4, atol=1e-4)
    assert "".join(asked) == "abcda", "d took the slot of a, the least recently used"
    rows["d"] = table[0]
    runner.forget("d")
    runner(images(1), ["d"], rows)
    assert asked[-1] == "d"


def test_a_task_that_could_not_be_loaded_is_loaded_again(model, recorded):
    vit = model.image
    runner, table = graphed(vit, sizes=(2,), slots=4), vit.base_params.table.detach() + torch.randn(2, 1)
    for bad in (table[0, :-1], table[0, :1]):
        with pytest.raises(ValueError, match="rows must be"):
            runner(images(2), ["bad", "good"], {"bad": bad, "good": table[1]})
    rows = dict(zip(("bad", "good"), table))
    expected = vit(images(2), graphs.NormParams(vit.norm_spec, table))
    torch.testing.assert_close(runner(images(2), ["bad", "good"], rows), expected, rtol=1e-4, atol=1e-4)
    classifier = graphed(model, sizes=(2,), slots=4)
    good, bad = adapt_tasks(model, NAMES[:2])
    bad = replace(bad, row=bad.row[:-1])
    with pytest.raises(RuntimeError):
        classifier.logits(images(2), [bad, good])
    ranked = classifier.classify(images(2), [good, good], [1, 1])
    assert ranked[0][0][0] == classify_tasks(model, images(2), [good, good], [1, 1])[0][0][0]


def test_inference_mode_and_empty_batches(model, recorded):
    task = adapt_tasks(model, NAMES[:1])[0]
    with torch.inference_mode():
        runner = graphed(model, sizes=(2,), slots=2)
        first = runner.logits(images(2), [task, task])
    with torch.no_grad():
        assert torch.equal(runner.logits(images(2), [task, task]), first)
        assert runner.classify(images(0), [], []) == []
    with pytest.raises(ValueError, match="images must be"):
        runner.logits(images(0), [])


def test_what_is_refused_changes_nothing(model, recorded):
    runner, made = graphed(model, sizes=(2,), slots=2), adapt_tasks(model, NAMES[:3])
    before = runner.logits(images(2), made[:2])
    with pytest.raises(ValueError, match="as many tasks as there are slots, 2, got 3"):
        runner.logits(images(3), made)
    with pytest.raises(ValueError, match=r"images must be \(2, 3, 32, 32\) for 2 tasks, got \(2, 3, 16, 16\)"):
        runner.logits(torch.zeros(2, 3, 16, 16), made[:2])
    assert torch.equal(runner.logits(images(2), made[:2]), before)


def test_arguments_and_models_that_cannot_be_recorded(model, monkeypatch):
    with pytest.raises(ValueError, match="model must be on a GPU"):
        graphed(model)
    monkeypatch.setattr(graphs, "_check", lambda model: next(model.parameters()))
    with pytest.raises(ValueError, match="sizes must be batch sizes of at least 1"):
        graphed(model, sizes=(0, 4))
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        graphed(model, slots=0)


def test_slots_evict_the_least_recently_used():
    slots = Slots(2)
    assert slots.assign("aba") == ([0, 1, 0], [(0, "a"), (1, "b")])
    assert slots.assign("a") == ([0], [])
    assert slots.assign("ca") == ([1, 0], [(1, "c")])
    slots.forget("a")
    assert "a" not in slots and slots.assign("d") == ([0], [(0, "d")])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_equal_eager_bit_for_bit_and_wait_for_nothing(dtype, monkeypatch):
    """At a recorded size; rows change between replays."""
    torch.manual_seed(0)
    vit = HyperViT.from_timm("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    vit = vit.cuda().to(dtype).eval()
    table = (vit.base_params.table.detach().float() + 0.1 * torch.randn(6, vit.norm_spec.num_params).cuda()).cuda()
    rows, runner = dict(enumerate(table)), graphed(vit, sizes=(2, 4), slots=4)
    runner(images(2).cuda().to(dtype), [0, 1], rows)
    runner(images(4).cuda().to(dtype), [0, 1, 1, 1], rows)
    for step, keys in enumerate([[0, 1, 2, 3], [4, 4, 5, 0], [3, 2]]):
        batch = images(len(keys), step).cuda().to(dtype)
        with torch.no_grad():
            expected = vit(batch, graphs.NormParams(vit.norm_spec, table, torch.tensor(keys).cuda()))
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = runner(batch, keys, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(ours, expected)
