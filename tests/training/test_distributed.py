"""Two processes train as one does with the whole batch: the same losses, gradients and weights, by DDP and by FSDP2."""

import json

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import distributed

from hyperclip_fast.training.config import TrainConfig
from hyperclip_fast.training.distributed import gather_texts, share, whole
from hyperclip_fast.training.losses import siglip_loss
from tests.helpers import run_twice
from tests.towers import patch_text_tower, tiny_config
from tests.training.test_training import trainer_of

ONE_TASK = {"tasks_per_batch": 1, "classes_per_task": 8}
TWO_TASKS = {"tasks_per_batch": 2, "classes_per_task": 4}
TOWER = {"train_text": True, "text_tower": "transformer:width=32,depth=2,heads=2,dim=24"}
CASES = {
    "captions": ({"train_text": True}, ONE_TASK),
    "captions, frozen text": ({}, {**ONE_TASK, "loss_chunk": 3}),
    "captions, baseline": ({"train_text": True, "conditioned": False}, ONE_TASK),
    "captions in parts": ({"train_text": True}, {**ONE_TASK, "accumulate": 2}),
    "tasks of several sizes": ({"train_text": True}, {**TWO_TASKS, "classes_per_task": (2, 6)}),
    "tasks, image tower frozen": ({}, {**TWO_TASKS, "freeze": ("image",)}),
    "captions, fsdp": (TOWER, {**ONE_TASK, "parallel": "fsdp"}),
}
TO_THE_END = ("captions", "captions, fsdp")  # stopped after two steps, and trained on by another Trainer


def steps(folder, name, count=2):
    """Losses and gradients of `count` steps; of some what the model at the end gives.

    Weights are not compared: where a gradient is 0, as of a key's bias, AdamW steps along its rounding.
    """
    model, train = CASES[name]
    config = TrainConfig(steps=3, log_every=1, eval_every=0, save_every=2, lr=1e-3, warmup=1, **train)
    with pytest.MonkeyPatch.context() as patch:
        if "text_tower" not in model:
            patch_text_tower(patch)
        trainer = trainer_of(tiny_config(**model), config, folder / name)
        losses, grads, trained = [], [], None
        for _ in range(count):
            losses.append(trainer.measures(trainer.train_step(), 1.0))
            parameters = trainer.model.named_parameters()
            grads.append({n: whole(p.grad).clone() for n, p in parameters if p.grad is not None})
        if name in TO_THE_END:
            trainer.save()
            again = trainer_of(tiny_config(**model), config, folder / name)
            assert again.step == count
            model = again.train()
            if model is None:  # FSDP's other processes
                return {"losses": losses, "grads": grads, "trained": None}
            model.eval()
            images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                trained = model.encode_image(images, model.adapt([["cat", "dog"]]))
        return {"losses": losses, "grads": grads, "trained": trained}


def exchange():
    """open_clip's loss across processes, and ours of gathered texts: loss and gradients."""
    place = share()
    generator = torch.Generator().manual_seed(place.rank)
    found = []
    for ours in (True, False):
        images, texts = (torch.randn(4, 6, generator=generator.manual_seed(i), requires_grad=True) for i in (1, 2))
        images, texts = images.detach() * (place.rank + 1), texts.detach() - place.rank
        images.requires_grad_(), texts.requires_grad_()
        scale, bias = torch.tensor(3.0), torch.tensor(-2.0)
        if ours:
            labels = torch.arange(4) + 4 * place.rank
            loss = siglip_loss([images], [gather_texts(texts[None])[0]], scale, bias, [labels])
        else:
            loss = SigLipLoss(rank=place.rank, world_size=place.world)(images, texts, scale, bias)
        loss.backward()
        found.append([loss.detach(), images.grad, texts.grad])
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {name: steps(folder / "two", name) for name in CASES}
    torch.save({"cases": results, "exchange": exchange()}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_twice(worker, folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        bound = 2e-5 * max(float(value.abs().max()), 0.1)
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=bound, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, tmp_path, name):
    folder, both = two
    one = steps(tmp_path, name)
    for rank in range(2):
        result = both[rank]["cases"][name]
        for ours, expected in zip(result["losses"], one["losses"]):
            for key in ("loss", "accuracy", "grad_norm", "logit_bias"):
                assert ours[key] == pytest.approx(expected[key], rel=1e-3, abs=2e-4), key
        close(result["grads"][0], one["grads"][0])
        for n, grad in one["grads"][1].items():
            assert (result["grads"][1][n] - grad).norm() <= 1e-3 * max(float(grad.norm()), 0.1), n
    if name in TO_THE_END:
        assert (both[1]["cases"][name]["trained"] is None) == (name == "captions, fsdp")
        torch.testing.assert_close(both[0]["cases"][name]["trained"], one["trained"], rtol=0, atol=1e-3)
        assert (folder / "two" / name / "model" / "model.safetensors").exists()
        lines = (folder / "two" / name / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [
            3,
            3,
        ]  # one process writes: the step, and held-out names


@pytest.mark.slow
def test_gathered_texts_give_what_open_clips_exchange_gives(two):
    for rank in range(2):
        ours, expected = two[1][rank]["exchange"]
        for left, right in zip(ours, expected):
            torch.testing.assert_close(left, right)
