"""A batch in parts gives the gradients of the whole batch, for images, rows and texts, with the same dropout in both
passes; texts, padding and labels reach the loss as they should."""

import copy

import pytest
import torch

from hyperclip_fast.data.batch import Batch, Share
from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.training.grad_cache import backward_in_parts
from hyperclip_fast.training.objective import Inputs, Objective
from hyperclip_fast.utils.seeds import hash_seed
from tests.towers import patch_text_tower, tiny_config, tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def batch(sizes, shuffled=False):
    """A picture a class; with `shuffled`, a few more, in no order."""
    generator = torch.Generator().manual_seed(0)
    names = [tuple(f"thing {g} {k}" for k in range(size)) for g, size in enumerate(sizes)]
    labels = [torch.randint(k, (k + 2,), generator=generator) if shuffled else torch.arange(k) for k in sizes]
    images = torch.randn(sum(map(len, labels)), 3, 32, 32, generator=generator)
    return Batch(images, torch.cat(labels), tuple(map(len, labels)), tuple(names))


def inputs_of(model, given):
    places = {text: i for i, text in enumerate(text for task in given.classes for text in task)}
    table = None if model.text is not None else model.text_features(tuple(places))
    return Inputs.make(given, places, CPU, table)


def run(model, given, parts, chunk=0):
    objective = Objective(model.train(), Share(), chunk=chunk)
    model.zero_grad()
    inputs = inputs_of(model, given)
    if parts == 1:
        loss, accuracy = objective(inputs)
        loss.backward()
    else:
        loss, accuracy = backward_in_parts(objective, inputs, parts, 5, lambda loss: loss)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), accuracy, grads


@pytest.mark.parametrize("options", [{}, {"train_text": True}, {"conditioned": False}, {"hyper_pool": "mean"}], ids=str)
@pytest.mark.parametrize("sizes", [[128], [16] * 8, [40, 24, 64]], ids=str)
def test_four_parts_equal_one_batch(options, sizes):
    model, given = tiny_model(**options), batch(sizes)
    whole, parts = run(model, given, 1), run(model, given, 4)
    assert whole[2].keys() == parts[2].keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=0)
    assert parts[1] == whole[1]
    for name, grad in whole[2].items():
        torch.testing.assert_close(parts[2][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_dropout_is_the_same_in_both_passes():
    model, given = tiny_model(drop_path_rate=0.5), batch([8, 8])
    loss, _, grads = run(model, given, 2)
    objective, inputs = Objective(model, Share()), inputs_of(model, given)
    model.zero_grad()
    params, embeddings = model.rows(inputs.table[inputs.index]), []
    for i, (images, ids) in enumerate(zip(inputs.images.chunk(2), inputs.task_ids.chunk(2))):
        torch.manual_seed(hash_seed(5, i))
        embeddings.append(model.encode_image(images, params[ids]))
    expected, _ = objective.loss_and_accuracy(
        torch.cat(embeddings), model.project_text(inputs.table[inputs.index]), inputs
    )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        bound = 1e-5 * float(parameter.grad.abs().max())
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=bound, msg=name)


def test_running_statistics_move_once_a_part():
    sizes = dict.fromkeys(("patch_size", "width", "depth", "num_heads"))
    model, given = tiny_model(image_tower="tinynet_e", **sizes).train(), batch([4, 4])
    twin = copy.deepcopy(model)
    run(model, given, 2)
    inputs = inputs_of(twin, given)
    params = twin.rows(inputs.table[inputs.index])
    for i, (images, ids) in enumerate(zip(inputs.images.chunk(2), inputs.task_ids.chunk(2))):
        torch.manual_seed(hash_seed(5, i))
        twin.encode_image(images, params[ids])
    moved = dict(twin.named_buffers())
    assert int(moved["image.bn1.num_batches_tracked"]) == 2
    for name, statistic in model.named_buffers():
        torch.testing.assert_close(statistic, moved[name], msg=name)
    assert all(norm.track_running_stats for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("shuffled", [False, True])
def test_padding_changes_nothing(shuffled):
    model = tiny_model()
    given = batch([3, 7, 4], shuffled)
    loss, accuracy, _ = run(model, given, 1)
    starts = [sum(given.counts[:g]) for g in range(3)]
    alone = [
        Batch(given.images[s : s + n], given.labels[s : s + n], (n,), (names,))
        for s, n, names in zip(starts, given.counts, given.classes)
    ]
    results = [run(model, task, 1) for task in alone]
    torch.testing.assert_close(loss, torch.stack([result[0] for result in results]).mean())
    assert float(accuracy) == pytest.approx(sum(float(result[1]) for result in results) / 3)


def test_chunks_change_nothing():
    model, given = tiny_model(), batch([5, 5], shuffled=True)
    whole, chunked = run(model, given, 1), run(model, given, 1, chunk=3)
    torch.testing.assert_close(chunked[0], whole[0])
    assert chunked[1] == whole[1]
    for name, grad in whole[2].items():
        torch.testing.assert_close(chunked[2][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_is_near_float32():
    torch.manual_seed(0)
    model, given = HyperCLIP(tiny_config()), batch([8])
    exact = Objective(model, Share())(inputs_of(model, given))[0].detach()
    rough = Objective(model, Share(), precision="bfloat16")(inputs_of(model, given))[0].detach()
    assert rough.dtype == torch.float32
    assert 0 < abs(float(rough - exact)) < 0.05 * float(exact)
