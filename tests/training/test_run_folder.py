"""What a run's folder survives: damaged and lost checkpoints, a full disk, a second run, a loss that is not finite."""

import errno
import json
import multiprocessing
import random
import warnings

import pytest
import torch

from hyperclip_fast.hyperclip import HyperCLIP
from hyperclip_fast.training import trainer as trainer_module
from hyperclip_fast.training.run_folder import BEFORE, LAST, RunFolder
from tests.training.test_training import _towers, trainer  # noqa: F401  # a fixture


@pytest.fixture
def interrupted(tmp_path):
    """A run of 6 steps that stopped after 4, with checkpoints of 2 and 4."""

    def stop(run, metrics):
        if run.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", stop, save_every=2).train()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of the run that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        from tests.towers import patch_text_tower

        patch_text_tower(patch)
        return trainer(tmp_path_factory.mktemp("whole") / "run", save_every=2).train().state_dict()


def test_the_last_two_checkpoints_are_kept(interrupted):
    steps = [torch.load(interrupted / name, weights_only=True)["step"] for name in (LAST, BEFORE)]
    assert steps == [4, 2]


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone"])
def test_a_run_goes_on_from_the_checkpoint_before(damage, interrupted, whole):
    last = interrupted / LAST
    if damage == "gone":  # killed between the two renames
        last.unlink()
    elif damage == "other":
        torch.save({"step": 4}, last)
    else:
        last.write_bytes(last.read_bytes()[: 1000 if damage == "cut" else 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = trainer(interrupted, save_every=2)
    told = [str(warning.message) for warning in caught if BEFORE in str(warning.message)]
    assert len(told) == (damage != "gone") and again.step == 2
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.train().state_dict().items())


def test_no_whole_checkpoint_is_an_error(interrupted):
    for name in (LAST, BEFORE):
        (interrupted / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"out must hold a whole checkpoint of a run, got .*{BEFORE}"):
        trainer(interrupted, save_every=2)


def test_damaged_checkpoints_are_one_error(interrupted):
    """At any byte; what is loaded all the same is what was saved."""
    last, chance = interrupted / LAST, random.Random(0)
    content = last.read_bytes()
    (interrupted / BEFORE).unlink()
    expected = torch.load(last, weights_only=True)["model"]
    loaded, reader = 0, reader_of(interrupted)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        last.write_bytes(damaged)
        try:
            state = reader.resume()
        except ValueError as error:
            assert str(last) in str(error)
            continue
        loaded += 1
        assert all(torch.equal(tensor, state["model"][name]) for name, tensor in expected.items())
    assert loaded < 100


def reader_of(path) -> RunFolder:
    """The folder, as a process that does not write sees it."""
    return RunFolder(path, json.loads((path / "config.json").read_text()), writes=False)


def test_a_full_disk_leaves_the_last_whole_checkpoint(interrupted, whole, monkeypatch):
    def full(state, file):
        file.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*checkpoint.pt"):
        patch.setattr(torch, "save", full)
        trainer(interrupted, save_every=2).train()
    steps = [torch.load(interrupted / name, weights_only=True)["step"] for name in (LAST, BEFORE)]
    assert steps == [4, 2] and not [file for file in interrupted.iterdir() if "tmp" in file.name]
    model = trainer(interrupted, save_every=2).train()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def _hold(path, is_held, may_end):
    folder = RunFolder(path, {})
    is_held.set()
    may_end.wait(60)
    folder.close()


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    """The second is refused before it touches anything."""
    context = multiprocessing.get_context("fork")
    is_held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, is_held, may_end))
    other.start()
    assert is_held.wait(60)
    (tmp_path / ".tmp-being-written").write_text("")
    with pytest.raises(ValueError, match=f"in which nobody trains, .*process {other.pid} does"):
        RunFolder(tmp_path, {})
    assert (tmp_path / ".tmp-being-written").exists()
    RunFolder(tmp_path, {}, writes=False)
    other.kill()  # a lock ends with its process
    other.join()
    RunFolder(tmp_path, {}).close()
    assert not (tmp_path / ".tmp-being-written").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.warns(UserWarning, match="cannot be locked"):
        RunFolder(tmp_path, {})


def failing(_):
    raise OSError(errno.EIO, "Input/output error")


def test_the_whole_checkpoint_stays_until_the_next_is_on_the_disk(interrupted, monkeypatch):
    """After the last one was damaged, and where the disk fails while the next is brought to it."""
    (interrupted / LAST).write_bytes(b"PK")
    with pytest.warns(UserWarning, match="goes on from"):
        run = trainer(interrupted, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", failing)
        with pytest.raises(OSError, match="Input/output"):
            run.save()
    assert torch.load(interrupted / BEFORE, weights_only=True)["step"] == 2
    run.train_step()
    run.save()
    assert [torch.load(interrupted / name, weights_only=True)["step"] for name in (LAST, BEFORE)] == [3, 2]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    clip = trainer_module.clip_gradients

    def spoiled(model, largest):
        if run.step == 3:
            model.logit_scale.grad.fill_(float("inf"))
        return clip(model, largest)

    run = trainer(tmp_path, save_every=2)
    monkeypatch.setattr(trainer_module, "clip_gradients", spoiled)
    with pytest.raises(ValueError, match="loss and gradients must be finite, got others at step 4"):
        run.train()
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == 2


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(log_every, tmp_path):
    def spoil(run, metrics):
        if run.step == 3:
            with torch.no_grad():
                run.model.logit_scale.fill_(float("nan"))

    with pytest.raises(ValueError, match="loss and gradients must be finite, got others at step 4"):
        trainer(tmp_path, spoil, save_every=2, log_every=log_every).train()
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert not (tmp_path / "model").exists()
    assert isinstance(trainer(tmp_path, save_every=2, log_every=log_every).train(), HyperCLIP)
