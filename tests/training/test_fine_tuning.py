"""Training from a model that is there: where it starts, what holds it there, and at which rates its layers move."""

from dataclasses import replace

import pytest
import torch

from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.training.config import RunConfig, TrainConfig, load_config
from hyperclip_fast.training.objective import Objective
from hyperclip_fast.training.trainer import Trainer
from tests.towers import patch_text_tower, tiny_config, tiny_model
from tests.training.test_training import CONFIG, trainer, trainer_of

SMALL_NET = {"image_tower": "mobilenetv3_small_050", "freeze_statistics": True, "embed_dim": 16, "hyper_width": 32}
SMALL_NET |= {"hyper_heads": 2, "hyper_bottleneck": 8}
SIZES = ("img_size", "patch_size", "width", "depth", "num_heads")


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def net_config():
    return tiny_config(**SMALL_NET, **dict.fromkeys(SIZES))


def test_a_run_starts_from_a_saved_model(tmp_path):
    model = tiny_model(init_logit_bias=-1.0)
    model.save_pretrained(tmp_path / "start")
    text = f"train: {{init: {tmp_path / 'start'}, steps: 1, classes_per_task: 4}}\ndata: {{sets: [digits]}}"
    (tmp_path / "run.yaml").write_text(text)
    run = load_config(tmp_path / "run.yaml")
    assert run.model == model.config
    started = Trainer(run, tmp_path / "run").model.state_dict()
    assert all(torch.equal(started[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"train\.init must hold weights that fit model, got .*size mismatch"):
        Trainer(replace(run, model=tiny_config(width=64)), tmp_path / "other")


def test_the_row_penalty_is_the_squared_distance_and_moves_no_base_row():
    model = tiny_model()
    rows = model.adapt([["a", "b"], ["c", "d"]]).table
    base = model.image.base_params.table.double()
    loss = Objective(model, None, row_penalty=0.5).row_loss(rows)
    expected = 0.5 * (rows.double() - base).square().sum() / 2
    torch.testing.assert_close(loss.double(), expected)
    loss.backward()
    assert model.image.norm.weight.grad.abs().max() < 1e-6
    assert model.hypernetwork.pool.heads[0].weight.grad.abs().max() > 0
    assert Objective(model, None).row_loss(rows) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_row_penalty_keeps_rows_near_the_base_row(tmp_path, accumulate):
    distances = []
    for penalty in (0.0, 100.0):
        run = trainer(tmp_path / str(penalty), row_penalty=penalty, accumulate=accumulate, steps=12, log_every=12)
        for _ in range(11):
            run.train_step()
        measured = run.measures(run.train_step(), 1.0)
        distances.append(measured["row_distance"])
        rows = run.model.eval().adapt([["a", "b"], ["c", "d"]]).table
        assert measured["row_spread"] <= measured["row_distance"] * 2 and not torch.equal(rows[0], rows[1])
    assert distances[1] < 0.2 * distances[0]


def test_the_image_tower_is_pulled_back_to_its_start(tmp_path):
    """With its gradients off, what was moved away comes back by lr x pull in each step."""
    run = trainer(tmp_path, image_pull=100.0, warmup=0, schedule="constant", image_weight_decay=0.0)
    weight = run.model.image.head.weight
    start = weight.detach().clone()
    for parameter in run.model.image.parameters():
        parameter.grad = None
    with torch.no_grad():
        weight.add_(1.0)
    run._pull.step(run.optimizer)
    torch.testing.assert_close(weight.detach(), start + (1 - 3e-3 * 100.0))
    text = run.model.text_projection.weight.detach().clone()
    run._pull.step(run.optimizer)
    assert torch.equal(text, run.model.text_projection.weight)


def test_a_pull_keeps_training_near_the_start(tmp_path):
    moved = []
    for pull in (0.0, 300.0):
        run = trainer(tmp_path / str(pull), image_pull=pull, steps=8)
        start = run.model.image.patch_embed.proj.weight.detach().clone()
        for _ in range(8):
            run.train_step()
        moved.append((run.model.image.patch_embed.proj.weight - start).norm().item())
    assert 0 < moved[1] < 0.7 * moved[0]


def test_layers_have_rates_that_fall_towards_the_stem(tmp_path):
    run = trainer_of(tiny_config(depth=3), replace(CONFIG, image_layer_decay=0.5, image_lr=1e-3), tmp_path)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    image = run.model.image
    expected = {
        image.head.weight: 1e-3,
        image.norm.weight: 1e-3 / 2,
        image.blocks[2].mlp.fc1.weight: 1e-3 / 2,
        image.blocks[1].norm1.bias: 1e-3 / 4,
        image.blocks[0].attn.qkv.weight: 1e-3 / 8,
        image.patch_embed.proj.weight: 1e-3 / 16,
        run.model.text_projection.weight: CONFIG.lr,
    }
    for parameter, rate in expected.items():
        assert rates[id(parameter)] == pytest.approx(rate)


def test_images_of_another_side_and_channels_last(tmp_path):
    train = {"steps": 1, "classes_per_task": 4, "image_size": 40, "channels_last": True}
    run = RunConfig(net_config(), TrainConfig(**train), DataConfig(sets=("digits",)))
    trained = Trainer(run, tmp_path / "net")
    assert trained.next_batch().images.shape[2:] == (40, 40)
    stem = trained.model.image.conv_stem.weight
    assert stem.is_contiguous(memory_format=torch.channels_last) and not stem.is_contiguous()
    with pytest.raises(ValueError, match="image_size must be 32 or None, as a HyperViT takes no other size"):
        Trainer(replace(run, model=tiny_config()), tmp_path / "vit")


def test_sides_of_images_follow_one_another(tmp_path):
    train = {"steps": 5, "classes_per_task": 4, "tasks_per_batch": 2, "save_every": 2, "eval_every": 0}
    run = RunConfig(net_config(), TrainConfig(**train, image_size=(32, 32, 48)), DataConfig(sets=("digits",)))
    sides, labels = [], []
    plain = Trainer(replace(run, train=TrainConfig(**train, image_size=32)), tmp_path / "plain")
    for folder, steps in (("whole", 5), ("parts", 2), ("parts", 3)):
        trained = Trainer(run, tmp_path / folder)
        for _ in range(steps):
            batch = trained.next_batch()
            sides.append(batch.images.shape[-1])
            labels.append(batch.classes)
            trained.step += 1
        trained.save()
        trained.folder.close()
    assert sides == [32, 32, 32, 32, 48] * 2  # the second begins at 5 / 3, and the third at 10 / 3
    assert labels[:5] == labels[5:] == [plain.next_batch().classes for _ in range(5)]
    shards = DataConfig(kind="shards", path="x.tar")
    with pytest.raises(ValueError, match=r"image_size must be one side for data.kind shards, got \(32, 32, 48\)"):
        Trainer(replace(run, data=shards), tmp_path / "shards")


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"image_layer_decay": 0.0}, r"image_layer_decay must lie in \(0, 1\], got 0"),
        ({"image_size": 4}, "image_size must be at least 8, several such sides, or None, got 4"),
        ({"image_size": ()}, "image_size must be at least 8, several such sides, or None, got"),
        ({"row_penalty": -1.0}, "row_penalty must not be negative"),
        ({"image_pull": -1.0}, "image_pull must not be negative"),
    ],
    ids=str,
)
def test_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**wrong)
