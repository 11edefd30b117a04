"""TaskBank: any mix of named tasks in one pass equals each task alone; nothing bad changes its state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hyperclip_fast.task_bank import TaskBank
from hyperclip_fast.tasks import rank
from hyperclip_fast.utils.files import load_safetensors, save_safetensors
from tests.towers import patch_text_tower, tiny_model

TASKS = {"pets": ["cat", "dog", "parrot"], "food": ["pizza", "sushi"], "one": ["thing"], "many": list("abcdefg")}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def bank(monkeypatch):
    patch_text_tower(monkeypatch)
    bank = TaskBank(tiny_model(), chunk=3)
    bank.add_many(TASKS)
    return bank


def expected(bank, image, task):
    """Probabilities of one image by the specialised stock model and plain softmax."""
    model = bank.model
    with torch.no_grad():
        feature = torch.nn.functional.normalize(model.specialize(TASKS[task])(image[None]), dim=-1)
        logits = model.logit_scale.exp() * feature @ model.encode_text(TASKS[task]).T + model.logit_bias
    return logits.softmax(-1)[0]


@settings(max_examples=10, deadline=None)
@given(names=st.lists(st.sampled_from(sorted(TASKS)), min_size=1, max_size=8))
def test_a_mixed_batch_equals_each_image_in_its_own_task(names):
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch_text_tower(monkeypatch)
        bank = TaskBank(tiny_model())
        bank.add_many(TASKS)
        predictions = bank.classify(IMAGES[: len(names)], names, topk=10)
        for image, task, prediction in zip(IMAGES, names, predictions):
            probabilities = expected(bank, image, task)
            assert prediction.task == task
            assert sorted(prediction.names) == sorted(TASKS[task])
            shares = torch.tensor([prediction.probabilities[prediction.names.index(name)] for name in TASKS[task]])
            torch.testing.assert_close(shares, probabilities, atol=1e-5, rtol=1e-4)
            assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
            ratios = torch.tensor(prediction.scores).logit() - torch.tensor(prediction.probabilities).log()
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), atol=1e-3, rtol=1e-3)  # one logit, twice


def test_one_forward_pass_for_any_mix(bank, monkeypatch):
    calls = []
    monkeypatch.setattr(bank.model.image, "forward", lambda *args: calls.append(1) or torch.randn(8, 16))
    bank.classify(IMAGES, ["pets", "food", "one", "many"] * 2)
    assert len(calls) == 1


def test_topk_is_bounded_by_each_task(bank):
    sizes = [len(p.names) for p in bank.classify(IMAGES[:4], ["pets", "food", "one", "many"], topk=3)]
    assert sizes == [3, 2, 1, 3]
    assert bank.classify(IMAGES[:0], []) == []


def test_remove_and_update(bank):
    before = {task: bank.params.table[bank.task_ids([task])].clone() for task in bank.tasks}
    bank.remove("food")
    assert set(bank.tasks) == {"pets", "one", "many"} and len(bank) == 3 and "food" not in bank
    for task in bank.tasks:
        assert torch.equal(bank.params.table[bank.task_ids([task])], before[task])
        assert bank.classes(task) == tuple(TASKS[task])
        assert len(bank.class_embeddings(task)) == len(TASKS[task])
    bank.add("pets", ["wolf", "fox"])
    assert len(bank) == 3 and bank.classes("pets") == ("wolf", "fox")
    assert not torch.equal(bank.params.table[bank.task_ids(["pets"])], before["pets"])
    for task in list(bank.tasks):
        bank.remove(task)
    assert len(bank) == 0


def test_a_task_outlives_its_removal_and_serves_in_another_bank(bank, tmp_path):
    expected = bank.classify(IMAGES[:3], ["food", "many", "food"], 9)
    bank.save(tmp_path / "tasks.safetensors")
    for source in (TaskBank.load(tmp_path / "tasks.safetensors", bank.model), bank):
        kept = {name: source[name] for name in ("many", "food")}
        source.remove("food")
        source.add("many", ["x"])
        for task in kept.values():  # alone in its memory, so that sending it to another process sends no other task
            assert task.row.untyped_storage().nbytes() == task.row.nbytes
            assert task.embeddings.untyped_storage().nbytes() == task.embeddings.nbytes
        again = TaskBank.of(bank.model, kept)
        assert again.tasks == ("many", "food") and again.classes("food") == tuple(TASKS["food"])
        for ours, theirs in zip(again.classify(IMAGES[:3], ["food", "many", "food"], 9), expected):
            assert ours.names == theirs.names and ours.probabilities == pytest.approx(theirs.probabilities, rel=1e-5)
    with pytest.raises(KeyError, match="got 'birds'"):
        bank["birds"]


def test_thousands_of_tasks(bank):
    bank.chunk = 64
    bank.add_many({f"task {i}": [f"name {i}", f"other {i}"] for i in range(2000)})
    assert len(bank) == 2004
    alone = bank.model.adapt([["name 1234", "other 1234"]]).table
    torch.testing.assert_close(bank.params.table[bank.task_ids(["task 1234"])], alone, atol=1e-5, rtol=1e-5)


def test_save_and_load(bank, tmp_path):
    bank.remove("pets")  # so that the table's order is not the order of adding
    path = tmp_path / "tasks.safetensors"
    bank.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["tasks.safetensors"]
    loaded = TaskBank.load(path, bank.model)
    assert loaded.tasks == bank.tasks
    names = ["many", "one", "food", "many"]
    assert loaded.classify(IMAGES[:4], names, 5) == bank.classify(IMAGES[:4], names, 5)
    loaded.add("new", ["x", "y"])
    assert len(loaded) == 4


def test_an_empty_bank_is_saved_and_read(bank, tmp_path):
    path = tmp_path / "tasks.safetensors"
    TaskBank(bank.model).save(path)
    loaded = TaskBank.load(path, bank.model)
    assert len(loaded) == len(TaskBank.of(bank.model, {})) == 0
    fresh = TaskBank(bank.model)
    for each in (loaded, fresh):
        each.add("pets", TASKS["pets"])
    assert loaded.classify(IMAGES[:2], ["pets"] * 2, 3) == fresh.classify(IMAGES[:2], ["pets"] * 2, 3)


def test_a_bank_fits_its_model_whatever_else_the_config_says(bank, tmp_path):
    bank.save(tmp_path / "tasks.safetensors")
    bank.model.config.drop_path_rate = 0.3  # makes no row
    assert TaskBank.load(tmp_path / "tasks.safetensors", bank.model).tasks == bank.tasks


def test_a_model_that_computes_otherwise_with_the_same_weights_is_another(bank, tmp_path):
    path = tmp_path / "tasks.safetensors"
    bank.save(path)
    for options in ({"num_heads": 4}, {"hyper_heads": 4}, {"global_pool": "avg"}):
        other = tiny_model(**options)
        with pytest.raises(ValueError, match="made by another one"):
            TaskBank.load(path, other)
    tensors, metadata = load_safetensors(path)
    save_safetensors(tensors, path, {key: text for key, text in metadata.items() if key != "config"})
    assert TaskBank.load(path, bank.model).tasks == bank.tasks  # files from before it was kept


def test_rows_of_other_layers_of_the_same_size_are_refused(bank, tmp_path):
    image = bank.model.image
    image.set_modulate(["blocks.0.norm1"])
    narrow = TaskBank(bank.model)
    narrow.add_row("pets", TASKS["pets"], image.base_params)
    narrow.save(tmp_path / "tasks.safetensors")
    assert TaskBank.load(tmp_path / "tasks.safetensors", bank.model).tasks == ("pets",)
    image.set_modulate(["blocks.1.norm1"])
    with pytest.raises(ValueError, match="has other layers"):
        TaskBank.load(tmp_path / "tasks.safetensors", bank.model)


def test_a_bank_that_grew_beyond_one_calls_names_is_read(bank, tmp_path, monkeypatch):
    bank.save(tmp_path / "tasks.safetensors")
    monkeypatch.setattr("hyperclip_fast.utils.class_names.MAX_NAMES", 12)
    assert TaskBank.load(tmp_path / "tasks.safetensors", bank.model).tasks == bank.tasks


def test_files_that_are_refused(bank, tmp_path):
    path = tmp_path / "tasks.safetensors"
    bank.save(path)
    whole = path.read_bytes()
    with torch.no_grad():
        bank.model.logit_bias.add_(1)
    with pytest.raises(ValueError, match="made by another one"):
        TaskBank.load(path, bank.model)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="whole safetensors file"):
        TaskBank.load(path, bank.model)
    bank.model.image.base_params.save(path)
    with pytest.raises(ValueError, match="must be a saved TaskBank"):
        TaskBank.load(path, bank.model)


def test_bad_input_changes_nothing(bank):
    table, tasks = bank.params.table.clone(), bank.tasks
    for wrong in ({"new": ["a"], "": ["b"]}, {"new": ["a"], "bad": []}, {"new": "cat"}, {"new": ["a", 3]}):
        with pytest.raises(ValueError, match="task"):
            bank.add_many(wrong)
    with pytest.raises(ValueError, match="got 'birds'"):
        bank.remove("birds")
    with pytest.raises(ValueError, match="got 'birds'"):
        bank.classify(IMAGES[:2], ["pets", "birds"])
    with pytest.raises(ValueError, match="a task for each of 2 images"):
        bank.classify(IMAGES[:2], ["pets"])
    with pytest.raises(ValueError, match="topk must be"):
        bank.classify(IMAGES[:1], ["pets"], topk=0)
    assert bank.tasks == tasks and torch.equal(bank.params.table, table)


def test_inference_mode_leaves_a_bank_that_can_change(bank, tmp_path):
    bank.save(tmp_path / "tasks.safetensors")
    with torch.inference_mode():
        loaded = TaskBank.load(tmp_path / "tasks.safetensors", bank.model)
        bank.add("seen", ["sun", "moon"])
    for each in (bank, loaded):
        each.add("pets", ["wolf", "fox"])
        each.remove("food")
        assert each.classify(IMAGES[:1], ["pets"], 2)[0].names in {("wolf", "fox"), ("fox", "wolf")}


def test_a_bank_follows_its_model_to_another_device(bank):
    bank.model.to("meta")
    assert bank.params.table.device.type == bank.class_embeddings("pets").device.type == "meta"


def test_rows_keep_the_precision_of_a_float64_model(monkeypatch):
    patch_text_tower(monkeypatch)
    model = tiny_model().double()
    bank = TaskBank(model)
    bank.add("pets", TASKS["pets"])
    assert torch.equal(bank.params.table[:1], model.adapt([TASKS["pets"]]).table)


def test_a_bank_reads_like_a_mapping(bank):
    assert list(bank) == list(bank.tasks) and "pets" in bank and len(bank) == len(TASKS)
    task = bank["pets"]
    assert task.classes == tuple(TASKS["pets"]) and torch.equal(task.embeddings, bank.class_embeddings("pets"))
    assert torch.equal(task.row, bank.params.table[bank.tasks.index("pets")])
    bank.remove("pets")
    assert task.classes == tuple(TASKS["pets"]) and repr(bank).startswith("TaskBank(vit")
    with pytest.raises(KeyError, match="pets"):
        bank["pets"]


def test_classes_twice_are_refused(bank):
    names = ["cat", "dog", "cat"]
    for change in (
        lambda: bank.add("twice", names),
        lambda: bank.add_many({"fine": ["a"], "twice": names}),
        lambda: bank.add_row("twice", names, bank.model.image.base_params),
    ):
        with pytest.raises(ValueError, match="distinct class names, got 'cat' twice"):
            change()
    assert bank.tasks == tuple(TASKS)


def pictures(folder, count=5):
    """Files of single colours."""
    files = [folder / f"{i}.png" for i in range(count)]
    for i, file in enumerate(files):
        Image.new("RGB", (40, 30 + i), (40 * i, 255 - 40 * i, 90)).save(file)
    return files


def test_files_are_classified_as_they_come(bank, tmp_path):
    files = pictures(tmp_path)
    tasks = ["pets", "food", "many", "one", "pets"]
    expected = bank.classify(bank.model.preprocess(files), tasks, topk=2)
    sources = [files[0], str(files[1]), files[2].read_bytes(), Image.open(files[3]), files[4]]
    for size in (1, 2, 64):
        found = list(bank.classify_files(iter(sources), tasks, topk=2, batch_size=size))
        assert [image for image, _ in found] == sources
        for (_, ours), theirs in zip(found, expected):
            assert (ours.task, ours.names) == (theirs.task, theirs.names)
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
    assert [found.task for _, found in bank.classify_files(files[:2], "food")] == ["food", "food"]


def test_files_that_are_broken_are_left_out_or_end_it(bank, tmp_path):
    files = pictures(tmp_path, 3)
    files[1].write_bytes(b"none")
    broken = []
    found = list(bank.classify_files(files, "pets", batch_size=1, on_error=lambda *error: broken.append(error)))
    assert [image for image, _ in found] == [files[0], files[2]]
    assert [image for image, _ in broken] == [files[1]] and "whole image file" in str(broken[0][1])
    with pytest.raises(ValueError, match=r"1\.png"):
        list(bank.classify_files(files, "pets"))
    with pytest.raises(ValueError):
        list(bank.classify_files(files, ["pets"]))


@pytest.mark.parametrize(
    "images, got",
    [
        (Image.new("RGB", (32, 32)), "PIL.Image.Image"),
        ([IMAGES[0]], "builtins.list"),
        (IMAGES[:1].numpy(), "numpy.ndarray"),
        (IMAGES[0], r"shape \(3, 32, 32\)"),
        ((255 * IMAGES[:1]).byte(), "torch.uint8"),
        (IMAGES[:1, :1], r"shape \(1, 1, 32, 32\)"),
        (IMAGES[:1, :, :16], r"shape \(1, 3, 16, 32\)"),
        (IMAGES[:1].clamp(0, 1) * 255, "values up to 255"),
    ],
    ids=["PIL", "list", "array", "one", "bytes", "grey", "size", "range"],
)
def test_other_images_are_refused_with_what_was_expected(images, got, bank):
    wanted = r"images must be a floating point tensor \(B, 3, 32, 32\), as `model.preprocess` makes it"
    with pytest.raises(ValueError, match=f"{wanted}.* got .*{got}"):
        bank.classify(images, ["pets"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_probabilities_that_are_zero_are_not_taken_for_a_smaller_tasks_padding(dtype):
    logits = torch.full((2, 50), -torch.inf, dtype=dtype)
    logits[0, :2], logits[1] = torch.tensor([0.0, -200.0]), torch.arange(50)
    names = [("a", "b"), tuple(map(str, range(50)))]
    ranked = rank(logits, names, [2, 2])
    assert [[each[0] for each in best] for best in ranked] == [["a", "b"], ["49", "48"]]
    assert ranked[0][0][1] == 1 and ranked[0][1][1] == 0


def test_a_picture_in_many_tasks_is_read_once(bank, tmp_path, monkeypatch):
    files, read = pictures(tmp_path, 2), []
    whole = bank.model.preprocess
    monkeypatch.setattr(bank.model, "preprocess", lambda image: read.append(image) or whole(image))
    images = [file for file in files for _ in range(5)]
    found = list(bank.classify_files(images, ["pets", "food", "one", "many", "pets"] * 2, batch_size=3))
    assert [image for image, _ in found] == images and read == files
