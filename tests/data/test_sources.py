"""Sources give what a step is to see: every pair once an epoch, whole tasks, the same to any workers and processes, the
same after a stop; what is broken is counted and replaced."""

import itertools
import json
from collections import Counter

import pytest
import torch
from PIL import Image

from hyperclip_fast.data.batch import BatchShape, Share
from hyperclip_fast.data.config import DataConfig
from hyperclip_fast.data.file_source import read_folder
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.picture_source import TaskSource, picture_source
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.scenes import VALUES, class_names, evaluation_tasks
from hyperclip_fast.data.task_sampler import TaskBatch
from hyperclip_fast.training.config import RunConfig, TrainConfig
from hyperclip_fast.training.source_factory import create_source
from tests.data.test_scenes import blocks
from tests.image_data import SIDE, which, write_folder, write_shards, write_table
from tests.towers import tiny_config
from tests.training.test_training import pictures

CPU = torch.device("cpu")


def source(data, share=None, **train):
    data = DataConfig(**{"transform": "plain", **data})
    config = TrainConfig(**{"tasks_per_batch": 1, "classes_per_task": 8, **train})
    return create_source(RunConfig(tiny_config(), config, data), SIDE, share or Share(), CPU)[0]


def take(stream, count, start=0, state=None):
    return list(itertools.islice(stream.batches(start, state), count))


def same(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert (one.classes, one.counts, one.broken) == (other.classes, other.counts, other.broken)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_table_gives_every_caption_once_an_epoch(tmp_path, separator):
    file = write_table(tmp_path, 24, separator)
    batches = take(source({"kind": "table", "path": file, "tasks": "captions"}), 6)
    for epoch in (batches[:3], batches[3:]):
        seen = [i for batch in epoch for i in which(batch.images)]
        assert sorted(seen) == list(range(24)) != seen
        assert [text for batch in epoch for text in batch.classes[0]] == [f"picture {i}" for i in seen]
    assert which(batches[0].images) != which(batches[3].images)


def test_captions_in_groups(tmp_path):
    file = write_table(tmp_path, 24)
    given = {"kind": "table", "path": file, "tasks": "captions"}
    batch = take(source(given, tasks_per_batch=3, classes_per_task=4), 1)[0]
    assert batch.counts == (4, 4, 4) and batch.task_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [text for task in batch.classes for text in task] == [f"picture {i}" for i in which(batch.images)]


def test_captions_in_tasks_of_varying_size_are_refused(tmp_path):
    given = {"kind": "table", "path": write_table(tmp_path, 24), "tasks": "captions"}
    with pytest.raises(ValueError, match="classes_per_task must be one number for captions, got \\(2, 4\\)"):
        source(given, classes_per_task=(2, 4))


@pytest.mark.parametrize("tasks, message", [("labels", "classes_per_task .* got 25"), ("captions", "pairs .* got 75")])
def test_a_batch_larger_than_the_set_is_refused(tmp_path, tasks, message):
    given = {"kind": "table", "path": write_table(tmp_path, 24), "tasks": tasks}
    with pytest.raises(ValueError, match=message):
        source(given, tasks_per_batch=3, classes_per_task=25)


def test_hidden_folders_are_no_classes(tmp_path):
    folder = write_folder(tmp_path / "set", classes=2, each=1)
    write_folder(tmp_path / "set" / ".cache", classes=1, each=1)
    assert set(read_folder(folder).texts) == {"class 0", "class 1"}


def test_a_models_own_preprocessing_reaches_its_training(tmp_path):
    other = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bicubic", "crop_pct": 0.8}
    data = DataConfig(kind="table", path=write_table(tmp_path, 8), tasks="captions", transform="plain")
    for i in range(8):
        Image.effect_noise((30, 24), 50 + i).convert("RGB").save(tmp_path / f"{i}.jpg")
    run = RunConfig(tiny_config(**other), TrainConfig(tasks_per_batch=1, classes_per_task=8), data)
    batch = take(create_source(run, SIDE, Share(), CPU)[0], 1)[0]
    files = [tmp_path / f"{text.removeprefix('picture ')}.jpg" for text in batch.classes[0]]
    assert torch.equal(batch.images, torch.stack([load_image(file, Preprocessing(SIDE, **other)) for file in files]))


@pytest.mark.parametrize("sets", [("openmoji",), ("openmoji", "scenes")])
def test_a_models_own_mean_and_std_reach_rendered_pictures(sets):
    train, data = TrainConfig(tasks_per_batch=2, classes_per_task=3), DataConfig(sets=sets)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    models = (tiny_config(mean=mean, std=std), tiny_config())
    ours, usual = (
        take(create_source(RunConfig(model, train, data), SIDE, Share(), CPU, blocks())[0], 1)[0].images
        for model in models
    )
    expected = ((usual + 1) / 2 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(ours, expected)


def test_labels_make_tasks_of_varying_size(tmp_path):
    folder = write_folder(tmp_path / "set", classes=10, each=3)
    stream = source({"kind": "folder", "path": folder}, tasks_per_batch=4, classes_per_task=[2, 6])
    assert stream.names == tuple(f"class {c}" for c in range(10))
    sizes, files = Counter(), set()
    for batch in take(stream, 30):
        assert batch.counts == tuple(map(len, batch.classes)) and len(batch.counts) == 4
        sizes.update(batch.counts)
        shown = iter(which(batch.images))
        for names in batch.classes:
            numbers = [next(shown) for _ in names]
            assert [f"class {i // 3}" for i in numbers] == list(names) and len(set(names)) == len(names)
            files.update(numbers)
    assert set(sizes) == {2, 3, 4, 5, 6} and files == set(range(30))


def test_class_names_may_come_from_a_file(tmp_path):
    folder = write_folder(tmp_path / "set", classes=3, each=1)
    (tmp_path / "names.json").write_text(json.dumps({"class_1": "tench"}))
    given = {"kind": "folder", "path": folder, "class_names": str(tmp_path / "names.json")}
    assert source(given, classes_per_task=3).names == ("class 0", "tench", "class 2")


@pytest.mark.parametrize("kind", ["pictures", "folder", "table"])
@pytest.mark.parametrize("tasks, classes", [(4, 4), (4, [2, 4]), (1, 8)])
def test_processes_share_the_batch_of_one(tmp_path, kind, tasks, classes):
    captions = kind == "table" and classes != [2, 4]
    data = {"kind": kind, "tasks": "captions" if captions else "labels", "transform": "timm"}
    if kind != "pictures":
        data["path"] = write_folder(tmp_path / "set", 9, 2) if kind == "folder" else write_table(tmp_path / "set", 40)
    train = {"tasks_per_batch": tasks, "classes_per_task": classes}

    def stream(share):
        if kind == "pictures":
            return picture_source(pictures(), TrainConfig(**train), Preprocessing(SIDE), share)
        return source(data, share, **train)

    for whole, *parts in zip(*(take(stream(share), 3) for share in (Share(), Share(0, 2), Share(1, 2)))):
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        classes_of = [[name for task in part.classes for name in task] for part in (whole, *parts)]
        assert classes_of[0] == classes_of[1] + classes_of[2]
        assert tasks == 1 or parts[0].classes + parts[1].classes == whole.classes


def test_a_sampler_of_ones_own_gives_float_images_as_they_are(tmp_path):
    class Own:
        names = ("a", "b", "c")

        def batch(self, step):
            images = torch.full((4, 3, SIDE, SIDE), step / 10)
            return TaskBatch(images, torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1], [2, 0]]), torch.ones(4) > 0)

    batch = take(TaskSource(Own(), Own.names, BatchShape(), Preprocessing(SIDE), Share()), 1, start=3)[0]
    assert torch.equal(batch.images, torch.full((4, 3, SIDE, SIDE), 0.3))
    assert batch.classes == (("a", "b"), ("c", "a")) and batch.labels.tolist() == [0, 1, 0, 1]


def scene_source(share=None, sets=("openmoji", "scenes"), **train):
    config = TrainConfig(**{"tasks_per_batch": 4, "classes_per_task": [2, 8], **train})
    run = RunConfig(tiny_config(), config, DataConfig(sets=sets))
    return create_source(run, SIDE, share or Share(), CPU, blocks())[0]


def test_scenes_and_names_meet_in_a_batch():
    values = {name for attribute in VALUES for w in range(3) for name in class_names(attribute, (), w)}
    whole = take(scene_source(), 6)
    same(take(scene_source(), 4, start=2), whole[2:])
    for batch in whole:
        assert len(batch.counts) == 4 and max(batch.counts[2:]) <= 6 and len(batch.images) == sum(batch.counts)
        assert all(name.startswith("thing") for task in batch.classes[:2] for name in task)
        assert {name for task in batch.classes for name in task} <= {*scene_source().names}
    assert {name for batch in whole for task in batch.classes[2:] for name in task} & values
    assert {size for batch in whole for size in batch.counts[:2]} > {7} and min(min(b.counts) for b in whole) >= 2
    for batch, *parts in zip(whole, *(take(scene_source(Share(rank, 2)), 6) for rank in range(2))):
        assert [part.counts for part in parts] == [batch.counts[rank::2] for rank in range(2)]
        assert sum(float(part.images.sum()) for part in parts) == pytest.approx(float(batch.images.sum()), rel=1e-4)
    alone = take(scene_source(sets=("scenes",), classes_per_task=8), 3)
    assert all(batch.counts == (6,) * 4 for batch in alone)
    with pytest.raises(ValueError, match="tasks_per_batch must be at least 2 for scenes beside"):
        scene_source(tasks_per_batch=1)
    for tasks in (2, 3, 6):  # a half of them would be cut, or not be divided
        with pytest.raises(ValueError, match=f"twice the number of processes, 2, for scenes .* got {tasks}"):
            scene_source(Share(0, 2), tasks_per_batch=tasks)


def test_every_task_draws_a_wording():
    shape = BatchShape(tasks_per_batch=8, classes_per_task=(2, 5))
    plain = take(picture_source(blocks(), shape, Preprocessing(SIDE), Share()), 6)
    wordings = ("{}", "a drawing of {}")
    worded = picture_source(blocks(), shape, Preprocessing(SIDE), Share(), wordings)
    seen = set()
    for batch, other in zip(plain, take(worded, 6)):
        assert torch.equal(batch.images, other.images) and batch.counts == other.counts
        for names, texts in zip(batch.classes, other.classes):
            (wording,) = {text.replace(name, "{}") for name, text in zip(names, texts)}
            assert set(texts) <= set(worded.names)
            seen.add(wording)
    assert seen == set(wordings)


def test_what_is_held_out_of_each_set():
    names = [task.name for task in evaluation_tasks(blocks(), ("openmoji",))]
    scenes = [task.name for task in evaluation_tasks(blocks(), ("scenes",))]
    assert names == ["food"] and scenes == ["object 1", *VALUES]
    assert [task.name for task in evaluation_tasks(blocks(), ("scenes", "openmoji"))] == names + scenes


def test_processes_that_do_not_divide_the_batch_are_refused(tmp_path):
    stream = source({"kind": "table", "path": write_table(tmp_path, 40), "tasks": "captions"}, Share(0, 3))
    with pytest.raises(ValueError, match="multiple of the number of processes, 3, got 8"):
        take(stream, 1)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_workers_change_no_batch_and_any_step_can_be_the_first(tmp_path, kind):
    path = write_folder(tmp_path / "set", 9, 2) if kind == "folder" else write_shards(tmp_path / "set", 3, 20)
    data = {"kind": kind, "path": path, "transform": "timm", "shuffle": 7}
    state = torch.get_rng_state()
    alone = take(source(data), 7)
    assert torch.equal(torch.get_rng_state(), state)
    workers = take(source({**data, "workers": 2}), 7)
    if kind == "folder":
        same(workers, alone)
    for stream, batches in ((source(data), alone), (source({**data, "workers": 2}), workers)):
        for start in (1, 4):
            same(take(stream, 7 - start, start, batches[start - 1].state), batches[start:])


@pytest.mark.parametrize("shuffle", [1, 7, 1000])
def test_shards_give_every_pair_once_an_epoch(tmp_path, shuffle):
    data = {"kind": "shards", "path": write_shards(tmp_path, 3, 16), "shuffle": shuffle}
    batches = take(source(data), 12)
    for epoch in (batches[:6], batches[6:]):
        seen = [i for batch in epoch for i in which(batch.images)]
        assert sorted(seen) == list(range(48))
        assert [text for batch in epoch for text in batch.classes[0]] == [f"picture {i}" for i in seen]
        assert shuffle == 1 or seen[:16] != sorted(seen[:16])


def test_processes_and_workers_share_the_shards(tmp_path):
    data = {"kind": "shards", "path": write_shards(tmp_path, 4, 16), "workers": 2}
    batches = [batch for rank in range(2) for batch in take(source(data, Share(rank, 2)), 8)]
    assert sorted(i for batch in batches for i in which(batch.images)) == list(range(64))  # 4 pairs each, 32 a process
    with pytest.raises(ValueError, match="a shard for each of 6 workers"):
        source({**data, "workers": 3}, Share(0, 2))


@pytest.mark.filterwarnings("ignore:skipped")
def test_broken_shards_are_counted_and_skipped(tmp_path):
    path = write_shards(tmp_path, 2, 16, broken={3, 20})
    file = tmp_path / "1.tar"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # cut short
    stream = source({"kind": "shards", "path": path, "shuffle": 5}, classes_per_task=4)
    with pytest.warns(UserWarning) as warned:
        batches = take(stream, 8)
    seen = [i for batch in batches for i in which(batch.images)]
    assert not {3, 20} & set(seen) and set(range(16)) - {3} <= set(seen)
    assert sum(batch.broken for batch in batches) >= 3
    text = " ".join(str(warning.message) for warning in warned)
    assert "skipped 000003" in text and "skipped the rest of" in text
    for start in range(1, 8):
        same(take(stream, 8 - start, start, batches[start - 1].state), batches[start:])


@pytest.mark.parametrize("tasks", ["labels", "captions"])
def test_broken_files_are_counted_and_replaced(tmp_path, tasks):
    folder = write_folder(tmp_path / "set", classes=6, each=2)
    for file in ("class_0/0.jpg", "class_0/1.jpg", "class_3/1.jpg"):
        (tmp_path / "set" / file).write_bytes(b"no image")
    stream = source({"kind": "folder", "path": folder, "tasks": tasks}, classes_per_task=4)
    with pytest.warns(UserWarning, match="skipped: .* must be a whole image file"):
        batches = take(stream, 10)
    assert sum(batch.broken for batch in batches) >= 10
    for batch in batches:
        assert batch.images.shape == (4, 3, SIDE, SIDE)
        assert [f"class {i // 2}" for i in which(batch.images)] == list(batch.classes[0])
        assert tasks == "captions" or len(set(batch.classes[0])) == 4
        assert not {0, 1, 7} & set(which(batch.images))


@pytest.mark.parametrize("transform", ["timm", "open_clip"])
def test_transforms_crop_at_random_to_the_models_range(tmp_path, transform):
    folder = write_folder(tmp_path / "set", classes=4, each=1)
    stream = source({"kind": "folder", "path": folder, "transform": transform, "crop": 0.2}, classes_per_task=4)
    ramp = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    ramp.save(tmp_path / "set" / "class_0" / "0.jpg")
    batches = take(stream, 8)
    ramps = [batch.images[batch.classes[0].index("class 0")] for batch in batches]
    assert all(image.shape == (3, SIDE, SIDE) and image.dtype == torch.float32 for image in ramps)
    assert min(image.min() for image in ramps) < -0.9 and max(image.max() for image in ramps) > 0.9
    assert len({float(image.mean()) for image in ramps}) > 4


@pytest.mark.parametrize(
    "data, message",
    [
        ({"kind": "folder", "path": ""}, "data.path must say where the folder is"),
        ({"kind": "folder", "path": "{tmp}"}, "a folder for each class"),
        ({"kind": "table", "path": "{tmp}/none.csv"}, "columns filepath and title"),
        ({"kind": "table", "path": "{tmp}/empty.csv"}, "lines that have an image and a text"),
        ({"kind": "shards", "path": "{tmp}/{0..1}.tar", "workers": 3}, "a shard for each of 3 workers"),
    ],
)
def test_data_that_is_not_there_is_refused(tmp_path, data, message):
    (tmp_path / "none.csv").write_text("file,label\n")
    (tmp_path / "empty.csv").write_text("filepath,title\n,\n")
    data = {**data, "path": data["path"].replace("{tmp}", str(tmp_path))}
    with pytest.raises(ValueError, match=message):
        source(data)
