"""Scenes show what they say, batches repeat, evaluation scenes ask every question of the same images."""

from dataclasses import replace

import pytest
import torch

from hyperclip_fast.data.augmentation import to_rgba
from hyperclip_fast.data.pictures import Pictures
from hyperclip_fast.data.scenes import (
    ATTRIBUTES,
    COLOURS,
    COMBINATIONS,
    COPIES,
    SIZES,
    TEMPLATES,
    VALUES,
    Composer,
    Scenes,
    SceneSampler,
    class_names,
    scene_tasks,
)

SIDE = 48


def blocks(count: int = 24) -> Pictures:
    """A black square with a white upper right quarter, filling 7/8 of its frame; every third name is held out."""
    image = torch.zeros(4, 32, 32, dtype=torch.uint8)
    image[3, 2:30, 2:30] = 255
    image[:3, 2:16, 16:30] = 255
    names = tuple(f"thing {i}" for i in range(count))
    labels = torch.arange(count)
    return Pictures(image.expand(count, -1, -1, -1).clone(), labels, names, ("food",) * count, labels % 3 == 2)


def still(monkeypatch):
    """Nothing varies around its value."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(*size, 0.5))


def one(composer, count, size, place, orientation=0, colour="white"):
    values = {"count": count, "size": size, "place": place, "orientation": orientation}
    values = {name: torch.tensor([value]) for name, value in values.items()}
    values["colour"] = torch.tensor([list(COLOURS).index(colour)])
    scenes = Scenes(torch.tensor([0]), torch.tensor([0]), values)
    return composer.render(scenes, torch.Generator())[0]


def components(mask: torch.Tensor) -> int:
    """Connected parts of a boolean image."""
    left, parts = {tuple(at) for at in mask.nonzero().tolist()}, 0
    while left:
        parts, stack = parts + 1, [left.pop()]
        while stack:
            y, x = stack.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            stack += near
    return parts


@pytest.mark.parametrize("row", COMBINATIONS[::5].tolist(), ids=str)
def test_a_scene_has_its_count_size_and_place(monkeypatch, row):
    still(monkeypatch)
    count, size, place = row
    composer = Composer(blocks(), SIDE)
    image = one(composer, count, size, place, colour="red")
    ground = torch.tensor(COLOURS["red"]) * 2 - 1
    shown = (image - ground[:, None, None]).abs().sum(0) > 0.35
    first, second = COPIES[count]
    side = list(SIZES.values())[size] * SIDE
    if side > 16:  # smaller copies lie closer than their blur
        assert components(shown) == count + 1
    height, width = (int(shown.any(dim).sum()) for dim in (1, 0))
    assert width == pytest.approx(first * side - side / 8, abs=3)
    assert height == pytest.approx((2 if second else 1) * side - side / 8, abs=3)
    centre = [float(shown.any(dim).nonzero().float().mean() + 0.5) / SIDE - 0.5 for dim in (0, 1)]
    for at, third in zip(centre, (place % 3, place // 3)):
        assert abs(at) < 0.03 if third == 1 else at * (third - 1) > 0.09


def test_quarter_turns_are_exact(monkeypatch):
    still(monkeypatch)
    composer = Composer(blocks(), SIDE)
    upright = one(composer, 0, 4, 4)
    for turn in range(1, 4):
        turned = one(composer, 0, 4, 4, orientation=2 * turn)
        assert (turned - torch.rot90(upright, -turn, (1, 2))).abs().max() < 1e-4
    assert (one(composer, 0, 4, 4, orientation=2) - upright).abs().max() > 1


def test_wanted_values_are_kept_and_all_else_varies():
    composer, generator = Composer(blocks(), SIDE), torch.Generator().manual_seed(0)
    for attribute in ATTRIBUTES:
        total = 24 if attribute == "object" else len(VALUES[attribute])
        wanted = torch.arange(300) % total
        scenes = composer.draw(300, generator, {attribute: wanted})
        assert torch.equal(scenes[attribute], wanted)
        others = {name: set(scenes[name].tolist()) for name in ATTRIBUTES if name != attribute}
        assert all(len(seen) == (24 if name == "object" else len(VALUES[name])) for name, seen in others.items())
        assert torch.equal(composer.pictures.labels[scenes.pictures], scenes.objects)
    free = composer.draw(3000, generator)
    assert (torch.bincount(free["count"]) / 3000 - 1 / 6).abs().max() < 0.03
    drawn = {tuple(row) for row in torch.stack([free[name] for name in ("count", "size", "place")], 1).tolist()}
    assert drawn <= {tuple(row) for row in COMBINATIONS.tolist()}


def test_batches_repeat_and_name_what_they_show():
    data = blocks()
    sampler, again = (SceneSampler(data, 6, 4, seed=3) for _ in range(2))
    batch = sampler.batch(5)
    assert torch.equal(batch.images, again.batch(5).images) and torch.equal(batch.class_ids, again.batch(5).class_ids)
    assert not torch.equal(batch.images, sampler.batch(6).images)
    assert not torch.equal(batch.images, SceneSampler(data, 6, 4, seed=4).batch(5).images)
    assert batch.images.shape == (24, 3, 48, 48) and batch.images.dtype == torch.float32
    assert float(batch.images.abs().max()) <= 1 and torch.equal(batch.task_ids, torch.arange(6).repeat_interleave(4))
    for g, ids in enumerate(batch.class_ids.tolist()):
        names = {sampler.names[i] for i in ids}
        attribute = ATTRIBUTES[(5 * 6 + g) % 6]
        objects = [name for name, held in zip(data.names, data.held_out) if not held]
        wordings = [set(class_names(attribute, objects, w)) for w in range(len(TEMPLATES[attribute]))]
        assert len(names) == 4 and any(names <= wording for wording in wordings[:-1])
    held = {name for name, hidden in zip(data.names, data.held_out) if hidden}
    assert not any(name.split()[-1] in {h.split()[-1] for h in held} for name in sampler.names if "thing" in name)


def test_colours_of_a_batch_are_those_named():
    sampler = SceneSampler(blocks(), 1, 6, attributes=("colour",))
    batch = sampler.batch(0)
    grounds = batch.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(-1).values / 2 + 0.5
    known = torch.tensor(list(COLOURS.values()))
    nearest = torch.cdist(grounds, known).argmin(1)
    for index, i in zip(nearest.tolist(), batch.class_ids[0].tolist()):
        assert list(COLOURS)[index] in sampler.names[i].split()


def test_evaluation_asks_six_questions_of_the_same_scenes_of_held_out_objects():
    data = blocks()
    tasks = scene_tasks(data, scenes=40, classes=4)
    assert [task.name for task in tasks] == ["object 1", "object 2", *VALUES]
    scenes = torch.cat([task.images for task in tasks[:2]])
    for task in tasks[2:]:
        assert torch.equal(task.images, scenes) and task.class_names == class_names(task.name, ())
    held = {name for name, hidden in zip(data.names, data.held_out) if hidden}
    asked = [name for task in tasks[:2] for name in task.class_names]
    assert len(set(asked)) == 8 and set(asked) <= held
    assert (scenes[:, 3] == 255).all()
    reworded = scene_tasks(data, scenes=40, classes=4, wording=-1)
    assert torch.equal(reworded[-1].images, scenes)
    assert not {name for task in reworded for name in task.class_names} & set(SceneSampler(data, 6, 4).names)


def draw(**wanted):
    return Composer(blocks()).draw(1, torch.Generator(), {name: torch.tensor(value) for name, value in wanted.items()})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SceneSampler(blocks(), 6, 7), r"classes_per_task must lie in \[2, 6\]"),
        (lambda: SceneSampler(blocks(), 0, 6), "tasks_per_batch must be positive"),
        (lambda: SceneSampler(blocks(), attributes=("mood",)), "attributes must be some of"),
        (lambda: class_names("mood", ()), "attribute must be one of"),
        (lambda: scene_tasks(blocks(), classes=9), "classes must be at most 8"),
        (lambda: draw(size=[0, 0]), "wanted must map"),
        (lambda: draw(size=[5], count=[5]), "fit into the frame"),
        (lambda: Composer(replace(blocks(), groups=("flags",) * 24)), "pictures must have some of the groups"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_to_rgba_takes_one_image_or_many():
    images = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    found = to_rgba(images)
    assert found.dtype == torch.uint8 and found[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert (found[:, 3] == 255).all() and torch.equal(to_rgba(images[2]), found[2])
