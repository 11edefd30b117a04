"""DistributedDataParallel: two processes' gradients are those of one process with the whole batch."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hyperclip_fast import NormParams
from tests.encoders.vit_cases import gradients, hyper_pair, make_images, random_rows
from tests.helpers import run_twice

IDS = [3, 1, 0, 0, 5, 3, 1, 0]  # rows 2 and 4 unused, row 5 by one process only


class Adapted(nn.Module):
    """An encoder and the rows of its norms, all trained; the norms' own weights, which the rows replace, are not."""

    def __init__(self):
        super().__init__()
        _, self.vit = hyper_pair("layer_scale", dtype=torch.float64)
        self.table = nn.Parameter(random_rows(self.vit.norm_spec, 6, dtype=torch.float64).table)
        for name in self.vit.norm_spec.names:
            self.vit.get_submodule(name).requires_grad_(False)

    def forward(self, images, task_ids):
        return self.vit(images, NormParams(self.vit.norm_spec, self.table, task_ids))


def step(model, images, task_ids):
    model(images, task_ids).square().mean().backward()
    return gradients(model)


def worker(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(4 * rank, 4 * rank + 4)
    model = DistributedDataParallel(Adapted())
    grads = step(model, make_images(dtype=torch.float64)[mine], torch.tensor(IDS)[mine])
    torch.save({name.removeprefix("module."): grad for name, grad in grads.items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_gradients_are_those_of_one_process(tmp_path):
    run_twice(worker, tmp_path)
    expected = step(Adapted(), make_images(dtype=torch.float64), torch.tensor(IDS))
    assert expected["table"][[0, 1, 3, 5]].abs().amin(0).max() > 0 and not expected["table"][[2, 4]].any()
    for rank in range(2):
        ours = torch.load(tmp_path / f"{rank}.pt")
        assert ours.keys() == expected.keys()
        for name, grad in expected.items():
            assert (ours[name] - grad).abs().max() <= 1e-12 * expected["table"].abs().max(), name
