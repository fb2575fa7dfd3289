"""A checkpoint is whole or not there, wherever it is written; a damaged newest one is not the end of a run."""

import io
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import SIMPLE, SmallLM, Trace, die, forked, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.callbacks.checkpoint_files import WholeFileIO, is_whole
from liveselect.grammar import SelectionWarning
from liveselect.selectors import UniformSelector

STEPS = 10


@pytest.fixture(params=["here", "elsewhere"])
def folder(request, tmp_path):
    """A folder on the file system of temporary files, and one on another."""
    if request.param == "here":
        yield tmp_path
        return
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


class TraceLast(Trace):
    trace_key = None


def fit(folder: Path, ckpt_path="last", steps=STEPS, plugins=None, **settings):
    """Train with README's ModelCheckpoint; returns the trainer and what was warned of."""
    keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=2, save_last=True, **settings)
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder / "selection")
    trainer = small_trainer(
        folder, [TraceLast(folder / "trace"), selection, keep], **{**SIMPLE, "max_steps": steps}, plugins=plugins
    )
    pl.seed_everything(0, verbose=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(SmallLM(), datamodule=small_data(), ckpt_path=ckpt_path)
    texts = [str(each.message) for each in said if issubclass(each.category, SelectionWarning)]
    return trainer, " ".join(texts)


def lines(folder: Path) -> list[str]:
    return (folder / "trace").read_text().splitlines()


def killed_in_the_middle_of_last(folder: Path, at: int) -> None:
    """Die when half of ``last.ckpt`` of step ``at`` has left the process, by whichever way it is written."""
    save, copy, saved = torch.save, shutil.copyfile, []

    def half(data: bytes, place) -> None:
        place.write(data[: len(data) // 2])
        place.flush()
        os.fsync(place.fileno())
        die()

    def half_a_save(state, file, *arguments, **keywords):
        if isinstance(state, dict) and state.get("global_step") == at:
            saved.append(at)
            if "last.ckpt" in str(getattr(file, "name", "")):
                whole = io.BytesIO()
                save(state, whole)
                half(whole.getvalue(), file)
        return save(state, file, *arguments, **keywords)

    def half_a_copy(source, target, **keywords):
        if str(target).endswith("last.ckpt") and saved:
            with open(target, "wb") as place:
                half(Path(source).read_bytes(), place)
        return copy(source, target, **keywords)

    torch.save, shutil.copyfile = half_a_save, half_a_copy
    fit(folder)


def test_a_kill_in_the_middle_of_the_newest_checkpoint_leaves_the_one_before(folder, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    assert forked(fit, whole) == 0
    assert forked(killed_in_the_middle_of_last, folder, 6) == -signal.SIGKILL
    assert is_whole(folder / "checkpoints" / "last.ckpt")
    assert forked(fit, folder) == 0
    assert set(lines(folder)) == set(lines(whole))
    left = [path.name for path in (folder / "checkpoints").iterdir()]
    assert not [name for name in left if not name.endswith(".ckpt")]  # what the killed process left is removed


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoints, old = tmp_path / "checkpoints", WholeFileIO()
    old.save_checkpoint({"step": torch.tensor(1)}, checkpoints / "last.ckpt")

    def full(state, file, *arguments, **settings):
        file.write(b"some bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        old.save_checkpoint({"step": torch.tensor(2)}, checkpoints / "last.ckpt")
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]
    assert int(old.load_checkpoint(checkpoints / "last.ckpt")["step"]) == 1


def cut(path: Path, damage: str) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    hole = data[:middle] + bytes(4096) + data[middle + 4096 :]  # as a machine that lost power leaves it
    path.write_bytes({"half": data[:middle], "empty": b"", "zeros": bytes(len(data)), "hole": hole}[damage])


@pytest.mark.parametrize("damage", ["half", "empty", "zeros", "hole"])
def test_a_broken_last_checkpoint_falls_back_to_the_newest_whole_one_and_says_so(tmp_path, damage):
    fit(tmp_path, steps=6, save_top_k=-1)
    before = lines(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    cut(checkpoints / "last.ckpt", damage)
    cut(checkpoints / "epoch=0-step=6.ckpt", damage)
    trainer, said = fit(tmp_path, save_top_k=-1)
    assert "last.ckpt is not a whole checkpoint" in said
    assert "epoch=0-step=4.ckpt" in said
    assert trainer.global_step == STEPS
    assert lines(tmp_path)[len(before) :][:2] == before[4:6]  # it goes on from step 4


def test_a_damaged_checkpoint_that_was_named_is_refused_with_the_newest_whole_one(tmp_path):
    fit(tmp_path, steps=6, save_top_k=-1)
    named = tmp_path / "checkpoints" / "epoch=0-step=6.ckpt"
    cut(named, "half")
    with pytest.raises(ValueError, match=r"step=6.ckpt is not a whole checkpoint.*the newest whole one is .*last.ckpt"):
        fit(tmp_path, ckpt_path=named)


def test_with_no_whole_checkpoint_the_run_is_refused(tmp_path):
    fit(tmp_path, steps=2)
    for path in (tmp_path / "checkpoints").iterdir():
        cut(path, "half")
    with pytest.raises(ValueError, match="no other one beside it is whole"):
        fit(tmp_path)


def test_what_is_refused_for_another_reason_is_refused_as_before(tmp_path):
    fit(tmp_path, steps=4, save_top_k=-1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=False)
    state["object"] = TraceLast  # nothing that weights_only loads
    torch.save(state, path)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        WholeFileIO([path]).load_checkpoint(path, weights_only=True)


def test_a_checkpoint_io_of_the_users_own_is_kept(tmp_path):
    class Own(TorchCheckpointIO):
        saved = 0

        def save_checkpoint(self, *arguments, **settings):
            self.saved += 1
            super().save_checkpoint(*arguments, **settings)

    own = Own()
    trainer, _ = fit(tmp_path, steps=4, plugins=[own])
    assert trainer.strategy.checkpoint_io is own
    assert own.saved > 0


def test_other_file_systems_are_written_to_as_lightning_does():
    import fsspec

    place = "memory://checkpoints/last.ckpt"
    WholeFileIO().save_checkpoint({"step": torch.tensor(3)}, place)
    assert fsspec.filesystem("memory").exists("/checkpoints/last.ckpt")
    assert int(WholeFileIO().load_checkpoint(place)["step"]) == 3


def test_a_save_inside_a_save_leaves_both_whole(tmp_path, monkeypatch):
    """As a signal handler does it, which Lightning's for SLURM is."""
    io_, save, inside = WholeFileIO(), torch.save, []

    def nested(state, file, *arguments, **settings):
        if not inside:
            inside.append(True)
            io_.save_checkpoint({"step": torch.tensor(2)}, tmp_path / "last.ckpt")
        return save(state, file, *arguments, **settings)

    monkeypatch.setattr(torch, "save", nested)
    io_.save_checkpoint({"step": torch.tensor(1)}, tmp_path / "last.ckpt")
    assert is_whole(tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
