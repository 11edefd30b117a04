"""hyperclip evaluate: data sets read right, figures as defined, corruptions do what they say, patches are found."""

import io
import json
import re
import tarfile

import pytest
import torch
from PIL import Image

from hyperclip_fast.cli.main import main
from hyperclip_fast.data.held_out import EvalTask, held_out_tasks
from hyperclip_fast.data.image_files import load_image
from hyperclip_fast.data.openmoji import TONES, load_skin_tones
from hyperclip_fast.data.preprocessing import Preprocessing
from hyperclip_fast.data.scenes import ATTRIBUTES, scene_tasks
from hyperclip_fast.evaluation import dense, eval_sets, zero_shot
from hyperclip_fast.evaluation.corruptions import CORRUPTIONS, corrupt
from hyperclip_fast.evaluation.eval_sets import EvalSet, load_eval_set
from hyperclip_fast.evaluation.swapping import ROW_SOURCES, class_scores, partition_table, swap_test
from hyperclip_fast.evaluation.zero_shot import evaluate, metrics
from hyperclip_fast.text import create_text_tower
from tests.data.test_scenes import blocks
from tests.towers import patch_text_tower, tiny_model
from tests.training.test_training import pictures

COLOURS = {"dark red": (139, 0, 0), "lime": (0, 255, 0), "navy": (0, 0, 128)}


@pytest.fixture(autouse=True)
def _towers(monkeypatch):
    patch_text_tower(monkeypatch)


def png(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 32), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i, (name, colour) in enumerate(COLOURS.items()):
        place = tmp_path / "colours" / name.replace(" ", "_")
        place.mkdir(parents=True)
        for k in range(i + 1):
            (place / f"{k}.png").write_bytes(png(colour))
    return tmp_path / "colours"


@pytest.fixture
def shards(tmp_path):
    path = tmp_path / "shards"
    path.mkdir()
    samples = [(key, name) for key, name in zip("abcde", ["navy", "lime", "navy", "dark red", "lime"])]
    for shard, part in enumerate((samples[:3], samples[3:])):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for key, name in part:
                for suffix, content in (("png", png(COLOURS[name])), ("cls", str(list(COLOURS).index(name)).encode())):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    (path / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    return path


def check_colours(task: EvalTask, counts):
    assert task.class_names == tuple(COLOURS) and torch.bincount(task.labels).tolist() == counts
    for image, label in zip(task.images, task.labels):
        assert image[:, 5, 5].tolist() == [*COLOURS[task.class_names[label]], 255]


def test_a_folder_and_shards(folder, shards):
    data = load_eval_set(str(folder), Preprocessing(16))
    assert data.name == "colours" and data.groups is None
    check_colours(data.tasks[0], [1, 2, 3])
    (folder / ".cache").mkdir()
    (folder / ".cache" / "0.png").write_bytes(png("red"))
    check_colours(load_eval_set(str(folder), Preprocessing(16)).tasks[0], [1, 2, 3])
    check_colours(load_eval_set(str(shards), Preprocessing(16)).tasks[0], [1, 2, 2])
    check_colours(load_eval_set(str(shards / "0.tar"), Preprocessing(16)).tasks[0], [0, 1, 2])


@pytest.mark.parametrize("what, message", [("nothing here", "data must be"), ("empty", "a folder for each class")])
def test_no_data(tmp_path, what, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_eval_set(str(tmp_path / what), Preprocessing(16))


def test_a_models_own_preprocessing_reaches_what_it_is_scored_on(folder, monkeypatch):
    other = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bicubic", "crop_pct": 0.8}
    Image.effect_noise((40, 32), 50).convert("RGB").save(folder / "lime" / "0.png")
    model, seen = tiny_model(**other), []
    monkeypatch.setattr(model, "encode_image", lambda images, _: seen.append(images) or torch.zeros(len(images), 16))
    class_scores(model, load_eval_set(str(folder), model.preprocessing).tasks)
    files = [file for name in sorted(COLOURS) for file in sorted((folder / name.replace(" ", "_")).iterdir())]
    expected = torch.stack([load_image(file, model.preprocessing) for file in files])
    torch.testing.assert_close(torch.cat(seen), expected, atol=2e-6, rtol=0)  # pixels are whole numbers


def test_skin_tones_are_groups():
    images, labels, names, tones = load_skin_tones(24)
    assert len(images) == len(labels) == len(tones) == 5 * len(names) and {"thumbs up", "waving hand"} <= set(names)
    assert set(tones) == set(TONES) and not any("skin" in name or "light" in name for name in names)
    at = names.index("thumbs up") * 5
    light, dark = images[at].float(), images[at + 4].float()
    assert tones[at] == "light" and tones[at + 4] == "dark"
    inside = light[3] > 200
    assert light[:3, inside].mean() > dark[:3, inside].mean() + 40
    assert (light[3] - dark[3]).abs().mean() < 5  # the same hand


def test_scenes_ask_each_question_once():
    tasks = scene_tasks(blocks(), scenes=16, classes=4)
    one = eval_sets._one_a_question(tasks)
    assert [task.name for task in one] == list(ATTRIBUTES)
    shown = [task.class_names[label] for task in tasks[:2] for label in task.labels]
    assert [one[0].class_names[label] for label in one[0].labels] == shown and torch.equal(one[0].images, one[1].images)


def test_metrics():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3, 2, 1, 0, -1, -2], [0, 1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]])
    task = EvalTask("t", tuple("abcdef"), torch.zeros(4, 4, 2, 2), torch.tensor([0, 4, 1, 5]))
    other = EvalTask("u", ("a", "b"), torch.zeros(1, 4, 2, 2), torch.tensor([1]))
    found = metrics([scores, torch.tensor([[1.0, 0.0]])], [task, other], [("x", "x", "y", "y"), ("x",)])
    assert found["acc1"] == pytest.approx((0.5 + 0) / 2) and found["acc5"] == pytest.approx((0.75 + 1) / 2)
    assert found["mean_per_class_recall"] == pytest.approx((2 / 4 + 0) / 2)
    assert found["group_acc1"] == {"x": pytest.approx(1 / 3), "y": 0.5} and found["worst_group_acc1"] == pytest.approx(
        1 / 3
    )
    frequent = EvalTask("t", ("a", "b"), torch.zeros(4, 4, 2, 2), torch.tensor([0, 0, 0, 1]))
    found = metrics([torch.tensor([[1.0, 0]] * 4)], [frequent], None)
    assert found["acc1"] == 0.75 and found["mean_per_class_recall"] == 0.5 and "worst_group_acc1" not in found


def random_tasks(count=2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 6, 4, 32, 32), generator=generator, dtype=torch.uint8)
    return [EvalTask(f"t{i}", (f"a{i}", f"b{i}", f"c{i}"), x, torch.arange(6) % 3) for i, x in enumerate(images)]


def test_records_of_rows_and_corruptions():
    model, tasks = tiny_model(), random_tasks()
    records = evaluate(model, EvalSet("noise", tasks), ("right", "base"), ("contrast",), name="m")
    assert [(r["dataset"], r["row"]) for r in records] == [
        ("noise", "right"),
        ("noise-contrast", "right"),
        ("noise", "base"),
        ("noise-contrast", "base"),
    ]
    assert records[0]["metrics"] == metrics(class_scores(model, tasks), tasks, None)
    by_severity = [
        metrics(class_scores(model, tasks, change=lambda x, first, s=s: corrupt(x, "contrast", s, first)), tasks, None)
        for s in (1, 2, 3, 4, 5)
    ]
    assert records[1]["metrics"]["acc1"] == pytest.approx(sum(one["acc1"] for one in by_severity) / 5)
    assert {"dataset", "model", "pretrained", "task", "language", "metrics"} <= set(records[0])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_repeat(name):
    images = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(1)).mul(1.6).sub(0.8)
    images = torch.nn.functional.interpolate(images, (60, 60), mode="bicubic").clamp(-1, 1)
    errors = [float((corrupt(images, name, severity) - images).square().mean()) for severity in (1, 2, 3, 4, 5)]
    assert min(errors) > 0 and errors[-1] == max(errors) > 1.5 * errors[0]
    if name != "pixelate":  # whole blocks fit better than broken ones
        assert errors == sorted(errors)
    once, again = corrupt(images, name, 3), corrupt(images, name, 3)
    assert torch.equal(once, again) and once.abs().max() <= 1 and once.shape == images.shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_no_batch(name):
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5
    parts = [corrupt(images[:2], name, 3), corrupt(images[2:], name, 3, first=2)]
    assert torch.equal(corrupt(images, name, 3), torch.cat(parts))
    assert torch.equal(zero_shot._corruption(name, 3)(images[2:], 2), parts[1])


def test_scores_of_noisy_images_depend_on_no_batch():
    model, tasks, noise = tiny_model(), random_tasks(), zero_shot._corruption("noise", 5)
    small, large = (torch.cat(class_scores(model, tasks, batch_size=size, change=noise)) for size in (3, 12))
    torch.testing.assert_close(small, large, rtol=0, atol=1e-6)
    clean = torch.cat(class_scores(model, tasks))
    assert (clean - large).abs().max() > 1e-3


def test_images_have_noise_of_their_own():
    noisy = corrupt(torch.zeros(2, 3, 16, 16), "noise", 1)
    assert not torch.equal(noisy[0], noisy[1])


def test_what_corruptions_leave_alone():
    flat = torch.full((1, 3, 16, 16), 0.25)
    for name in ("blur", "contrast", "pixelate"):
        assert (corrupt(flat, name, 5) - flat).abs().max() < 1e-6
    assert float(corrupt(flat.expand(1, 3, 16, 16), "noise", 1).std()) == pytest.approx(0.16, rel=0.15)
    point = torch.zeros(1, 3, 31, 31)
    point[..., 15, 15] = 1
    spread = corrupt(point, "blur", 5)
    assert float(spread.sum()) == pytest.approx(3, rel=1e-4) and torch.equal(spread, spread.flip(2))


@pytest.mark.parametrize(
    "arguments, message",
    [(("fog", 1), "name must be one of"), (("blur", 6), "severity must be"), (("blur", True), None)],
)
def test_refused_corruptions(arguments, message):
    images = torch.zeros(1, 3, 8, 8)
    if message is None:
        images, arguments, message = torch.zeros(3, 8, 8), ("blur", 1), "images must be"
    with pytest.raises(ValueError, match=message):
        corrupt(images, *arguments)


def quarters():
    """Four classes: opaque discs of one colour each."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    images = torch.zeros(4, 4, 32, 32, dtype=torch.uint8)
    for k in range(4):
        images[k, k % 3] = 255
        images[k, 3][(x**2 + y**2).sqrt() < 15] = 255
    return EvalTask("discs", ("a", "b", "c", "d"), images, torch.arange(4))


def test_a_scene_of_four_and_its_patch_labels():
    images, classes, cover = dense.compose(quarters(), 3, 32, torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 32, 32) and all(sorted(row) == [0, 1, 2, 3] for row in classes.tolist())
    labels = dense.patch_labels(classes, cover, (8, 8))
    for scene, which, picture in zip(labels, classes, images):
        for q, k in enumerate(which.tolist()):
            rows, columns = slice(q // 2 * 4, q // 2 * 4 + 4), slice(q % 2 * 4, q % 2 * 4 + 4)
            assert set(scene[rows, columns].unique().tolist()) == {-1, k} and scene[rows, columns][1:3, 1:3].eq(k).all()
            centre = picture[:, q // 2 * 16 + 8, q % 2 * 16 + 8]
            assert centre.tolist() == [1.0 if channel == k % 3 else -1.0 for channel in range(3)]


def test_a_scene_of_nine():
    images = torch.zeros(9, 4, 6, 6, dtype=torch.uint8)
    images[:, 3], images[:, 0] = 255, 28 * torch.arange(9, dtype=torch.uint8)[:, None, None]
    task = EvalTask("squares", tuple("abcdefghi"), images, torch.arange(9))
    scene, classes, cover = dense.compose(task, 2, 18, torch.Generator().manual_seed(0), side=3)
    assert scene.shape == (2, 3, 18, 18) and all(sorted(row) == list(range(9)) for row in classes.tolist())
    assert torch.equal(((scene[:, 0] + 1) * 127.5 / 28).round().long()[:, 3::6, 3::6].flatten(1), classes)
    labels = dense.patch_labels(classes, cover, (6, 6))
    assert torch.equal(labels[:, ::2, ::2].flatten(1), classes) and torch.equal(
        labels[:, 1::2, 1::2].flatten(1), classes
    )


def test_dense_figures():
    labels = torch.tensor([[[0, 1], [-1, 1]]])
    perfect = torch.nn.functional.one_hot(labels.clamp(0), 3).float()
    assert dense.figures(perfect, labels) == (1.0, 1.0)
    all_one = torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 2, 3)
    miou, _ = dense.figures(all_one, labels)
    assert miou == pytest.approx((0 + 2 / 3) / 2)
    astray = perfect.clone()
    astray[0, 1, 0, 1] = 2.0  # class 1 is most like a patch where nothing is
    assert dense.figures(astray, labels) == (1.0, 0.5)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_patch_embedding_is_its_token_through_norm_and_head(pool):
    model = tiny_model(global_pool=pool)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    params = model.adapt([["a", "b"], ["c", "d"]])[torch.tensor([1, 0])]
    with torch.no_grad():
        patches = dense.patch_embeddings(model, images, params)
        for b, names in enumerate((["c", "d"], ["a", "b"])):
            stock = model.specialize(names)
            tokens = stock.forward_features(images[b : b + 1])[:, stock.num_prefix_tokens :]
            wanted = torch.nn.functional.normalize(stock.head(stock.fc_norm(tokens)), dim=-1)
            assert (patches[b].flatten(0, 1) - wanted[0]).abs().max() < 1e-5


def test_dense_scores():
    result = dense.dense_scores(tiny_model(), [quarters()], scenes=4)
    assert set(result) == {"tasks", "scenes", "objects", "guessing", "right", "base", "wrong"}
    assert (result["scenes"], result["objects"]) == (4, 4)
    assert "guessing" in dense.dense_table(result)
    with pytest.raises(ValueError, match="at least 9 names, got none"):
        dense.dense_scores(tiny_model(img_size=24), [quarters()])
    with pytest.raises(ValueError, match="multiple of 2 or 3 patches a side"):
        dense.dense_scores(tiny_model(img_size=40), [quarters()])


def test_command_line(folder, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    run = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(folder)]
    rows = ["--rows", "right", "wrong", "shuffled", "generic", "base"]
    assert main([*run, *rows, "--out", str(tmp_path / "out.json")]) == 0
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["row"] for record in records] == rows[1:] and records[0]["dataset"] == "colours"
    assert len(capsys.readouterr().out.strip().splitlines()) == 6
    assert main([*run, "--rows", "left"]) == 2 and "row must be one of" in capsys.readouterr().err


def test_command_line_averages_over_partitions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hyperclip_fast.data.pictures.load_pictures", lambda: pictures(names_per_group=24))
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    run = ["evaluate", "--model", str(tmp_path / "model"), "--classes", "3", "--partitions", "2"]
    assert main([*run, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    tasks = [held_out_tasks(pictures(names_per_group=24), 3, seed=seed) for seed in (0, 1)]
    assert [task.class_names for task in tasks[0]] != [task.class_names for task in tasks[1]]
    assert results == [swap_test(model, some) for some in tasks]
    assert main(run) == 0
    head, _, *table = capsys.readouterr().out.splitlines()
    count = sum(len(task.images) for task in tasks[0])
    assert head == f"{count} held-out pictures in {len(tasks[0])} tasks, partitions: 2, guessing: 33.3%"
    assert table == partition_table(results).splitlines()
    assert tuple(line.split()[0] for line in table[1:]) == ROW_SOURCES


def test_partitions_as_a_table():
    results = [
        {"right": {"a": 0.5, "b": 0.3}, "wrong": {"a": 0.3, "b": 0.3}},
        {"right": {"a": 0.6, "b": 0.6}, "wrong": {"a": 0.7, "b": 0.7}},
    ]
    assert [line.split() for line in partition_table(results).splitlines()[1:]] == [
        ["right", "50.0%", "40.0%", "60.0%"],
        ["wrong", "50.0%", "30.0%", "70.0%", "+0.0", "-10.0", "+10.0"],
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rows right", "--rows must be left out without --data, got \\['right'\\]"),
        ("--corruptions noise", "--corruptions must be left out without --data"),
        ("--data digits --partitions 3", "--partitions must be left out with --data digits, got 3"),
        ("--data digits --classes 3", "--classes must be left out with --data digits, got 3"),
        ("--dense --data digits", "--data must be left out with --dense, got digits"),
        ("--dense --rows right", "--rows must be left out with --dense"),
        ("--dense --corruptions noise", "--corruptions must be left out with --dense"),
        ("--dense --batch-size 8", "--batch-size must be left out with --dense, got 8"),
        ("--dense --partitions 2", "--partitions must be left out with --dense"),
        ("--partitions 0", "--partitions must be at least 1, got 0"),
        ("--batch-size 0", "--batch-size must be at least 1, got 0"),
    ],
)
def test_options_that_do_not_apply_are_refused(options, message, capsys):
    assert main(["evaluate", *options.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_templates_can_be_changed():
    tower = create_text_tower("transformer:width=32,depth=1,heads=2,dim=16")
    bare = tower.encode(["cat"])
    tower.set_templates(["a photo of a {}."])
    photo = tower.encode(["cat"])
    assert (photo - bare).abs().max() > 1e-3
    tower.set_templates([])
    assert torch.equal(tower.encode(["cat"]), bare)
    for wrong in ("a {}", ["a"], ["{} {}"]):
        with pytest.raises(ValueError, match="templates must be"):
            tower.set_templates(wrong)
