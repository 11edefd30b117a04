"""BatchNorm's statistics: of the whole mixed batch in training, shared, frozen, re-estimated, and across processes."""

import copy
import itertools

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hyperclip_fast import HyperEncoder, NormParams
from tests.encoders.encoder_cases import rows_of, small_pair, with_row
from tests.helpers import assert_close, run_twice

IDS = [2, 0, 0, 1, 2, 3, 3, 0]
TASKS = (4, 1)


def images(batch=8, seed=1):
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_training_uses_the_whole_batch_and_moves_one_average(momentum):
    """With one row for all, a mixed batch is the stock model in training, running statistics included."""
    stock, encoder = small_pair()
    for model in (stock, encoder):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
    row = rows_of(encoder, 1)
    stock = with_row(stock, row, 0)
    same, mixed = copy.deepcopy(encoder), NormParams(row.spec, row.table.expand(4, -1))
    for seed in range(3):
        ref = stock(images(seed=seed))
        assert torch.equal(same(images(seed=seed), row[[0] * 8]), ref)
        assert_close(encoder(images(seed=seed), mixed[IDS]), ref, slack=10)
    for name, buffer in stock.named_buffers():
        assert torch.equal(same.get_buffer(name), buffer), name
        assert torch.allclose(encoder.get_buffer(name), buffer, rtol=1e-12), name
    assert_close(encoder.eval()(images(), mixed[IDS]), stock.eval()(images()), slack=10)


def test_rows_do_not_reach_the_first_statistics():
    """Statistics are of what comes in; whose row follows does not matter to the first norm."""
    _, encoder = small_pair()
    rows, other = rows_of(encoder), copy.deepcopy(encoder)
    encoder.train()(images(), rows[IDS])
    other.train()(images(), rows[IDS[::-1]])
    assert torch.equal(encoder.norm.running_mean, other.norm.running_mean)
    assert not torch.equal(encoder.blocks[1][1].running_mean, other.blocks[1][1].running_mean)


def test_frozen_statistics():
    stock, encoder = small_pair()
    rows, before = rows_of(encoder), buffers(encoder)
    expected = encoder(images(), rows[IDS])
    encoder.freeze_statistics()
    for each in (encoder, nn.Sequential(encoder)):
        each.train()
        assert encoder.training and torch.equal(encoder(images(), rows[IDS]), expected)
        assert torch.equal(encoder(images()), stock(images()))
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    encoder.freeze_statistics(False)
    assert not torch.equal(encoder(images(), rows[IDS]), expected)
    assert not torch.equal(encoder.norm.running_mean, before["norm.running_mean"])


def test_reestimated_row_is_the_model_with_the_tasks_statistics():
    """The row alone does what new running statistics do, in a stock model and in a mixed batch."""
    stock, encoder = small_pair()
    rows, batches = rows_of(encoder), [2 * images(6, seed) + 1 for seed in (5, 6)]
    row = NormParams(rows.spec, rows.table[1:2])
    before = copy.deepcopy(encoder.state_dict())
    new = encoder.reestimate(batches, row)
    expected = with_row(stock, rows, 1)
    torch.optim.swa_utils.update_bn(batches, expected)
    expected.eval()
    x = 2 * images(seed=7) + 1
    assert_close(with_row(stock, new, 0)(x), expected(x), slack=100)
    table = torch.cat([rows.table, new.table])
    assert_close(
        encoder(x, NormParams(rows.spec, table, [4, 0, 4, 1, 2, 3, 4, 4]))[[0, 2]], expected(x)[[0, 2]], slack=100
    )
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    one = encoder.reestimate(batches[0], row).table
    assert torch.equal(one, encoder.reestimate(batches[:1], row).table) and not torch.equal(one, new.table)


def test_reestimate_refuses():
    _, encoder = small_pair()
    rows = rows_of(encoder)
    row = NormParams(rows.spec, rows.table[:1])
    with pytest.raises(ValueError, match="at least one batch"):
        encoder.reestimate([], row)
    with pytest.raises(ValueError, match="batch of 1 images, got rows for 4"):
        encoder.reestimate(images(), rows)
    plain = HyperEncoder.from_timm("convnext_atto", num_classes=0)
    with pytest.raises(ValueError, match="with BatchNorm, got one of ConvNeXt"):
        plain.reestimate(images().float(), plain.base_params)


@pytest.fixture
def group():
    """One process with gloo, in which PyTorch's SyncBatchNorm refuses a CPU's tensors."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def of_vectors(width):
    return nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(width), nn.Unflatten(2, (5, 5)))


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("norm", [BatchNormAct2d, nn.BatchNorm2d, of_vectors])
def test_reestimate_uses_this_processs_images_alone(norm, group):
    _, encoder = small_pair(norm)
    row = rows_of(encoder, 1)
    expected = encoder.reestimate(images(), row).table
    synchronized = convert_sync_batchnorm(encoder)
    assert torch.equal(synchronized.reestimate(images(), row).table, expected)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronized.modules())


class Adapted(nn.Module):
    """An encoder and the rows of its norms, which are trained in place of the norms' own."""

    def __init__(self, tasks):
        super().__init__()
        _, self.encoder = small_pair()
        self.table = nn.Parameter(rows_of(self.encoder, tasks).table)
        for key in self.encoder.norm_spec.keys:
            self.encoder.get_parameter(key).requires_grad_(False)

    def forward(self, x, ids):
        return self.encoder(x, NormParams(self.encoder.norm_spec, self.table, ids % len(self.table)))


def step(model, x, ids):
    out = model.train()(x, ids)
    (out * torch.arange(6.0)).square().mean().backward()
    state = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | buffers(model)
    return {"out": out.detach()} | {name.removeprefix("module."): value for name, value in state.items()}


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(4 * rank, 4 * rank + 4)
    for tasks in TASKS:
        model = DistributedDataParallel(Adapted(tasks))  # which takes no SyncBatchNorm of a CPU, so it comes after
        model.module.encoder = convert_sync_batchnorm(model.module.encoder)
        torch.save(step(model, images()[mine], torch.tensor(IDS)[mine]), f"{folder}/{tasks}-{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_synchronized_statistics_are_those_of_one_process_with_the_whole_batch(tmp_path):
    run_twice(worker, tmp_path)
    for tasks, rank in itertools.product(TASKS, range(2)):
        expected, ours = step(Adapted(tasks), images(), torch.tensor(IDS)), torch.load(tmp_path / f"{tasks}-{rank}.pt")
        assert_close(ours.pop("out"), expected["out"][4 * rank : 4 * rank + 4], "out", slack=10)
        assert ours.keys() == expected.keys() - {"out"}
        for name, value in ours.items():
            assert torch.allclose(value, expected[name], rtol=1e-9, atol=1e-12), name
