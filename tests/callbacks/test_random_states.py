"""Whatever draws random numbers around the batches, a resumed run goes on as the run that was not stopped."""

import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from small_run import SIMPLE, Place, SmallLM, Trace, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.callbacks.random_state import RandomStates, random_state
from liveselect.grammar import SelectionWarning
from liveselect.selectors import UniformSelector


def draw(*arguments, **keywords) -> None:
    """Move every random state, as a hook that samples texts or shuffles would."""
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    random.random()


class Masking(SmallLM):
    """Draws which tokens of a batch are left out while the batch is moved to the device."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        hidden = torch.rand(batch["labels"].shape) < 0.3
        return {**batch, "labels": batch["labels"].masked_fill(hidden, -100)}


class Sampling(SmallLM):
    """Draws after its batches and epochs; its hooks run after those of all callbacks."""

    on_train_start = on_train_batch_end = on_train_epoch_start = on_train_epoch_end = on_validation_epoch_end = draw


class Drawing(Callback):
    def __init__(self, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, draw)


AROUND = ("on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_end")
# step of the checkpoint: 2 in a round, 4 at its end, 6 before a validation, 10 at the end of an epoch
STEPS = {
    "nothing draws": (4, 10),
    "the module draws what a batch trains on": (2, 10),
    "the module draws after its batches": (4, 6, 10),
    "a callback before selection draws": (2, 6),
    "a callback after selection draws": (4, 6),
    "epoch hooks draw": (10,),
    "the start draws": (2,),
}
RUNS = {
    "nothing draws": (SmallLM, (), ()),
    "the module draws what a batch trains on": (Masking, (), ()),
    "the module draws after its batches": (Sampling, (), ()),
    "a callback before selection draws": (SmallLM, AROUND, ()),
    "a callback after selection draws": (SmallLM, (), AROUND),
    "epoch hooks draw": (SmallLM, ("on_train_epoch_end",), ("on_train_epoch_start", "on_train_epoch_end")),
    "the start draws": (SmallLM, ("on_fit_start",), ("on_train_start", "on_fit_start")),
}


def trained(folder, name, ckpt_path=None, more=(), **settings) -> list[str]:
    """Train the small run and return what every batch trained on and the weights after it."""
    module, before, after = RUNS[name]
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1 if ckpt_path is None else 2, verbose=False)
    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder)
    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callbacks = [Place(selection), Drawing(*before), selection, Drawing(*after), Trace(folder / "trace"), *more, keep]
    trainer = small_trainer(folder, callbacks, **settings)
    trainer.fit(module(), datamodule=small_data(), ckpt_path=ckpt_path)
    return (folder / "trace").read_text().splitlines()


@pytest.mark.parametrize("name", STEPS)
def test_a_run_whose_hooks_draw_resumes_to_the_bit(tmp_path, name):
    whole = trained(tmp_path / "whole", name)
    for step in STEPS[name]:
        resumed = trained(tmp_path / f"from {step}", name, tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed == whole[3 * step :]


def test_draws_that_a_checkpoint_cannot_hold_are_put_back_with_a_warning(tmp_path):
    with pytest.warns(SelectionWarning, match="a hook drew random numbers between a checkpoint and the next batch"):
        drawn = trained(tmp_path / "drawn", "the module draws after its batches", max_steps=4)
    assert len(drawn) == 12


def test_draws_without_a_checkpoint_are_left_alone(recwarn):
    states = RandomStates()
    for _ in range(2):
        states.begin_batch()
        states.end_batch()
        draw()
    drawn = random_state()["torch"]
    states.begin_batch()
    assert torch.equal(random_state()["torch"], drawn)
    assert not [each for each in recwarn if each.category is SelectionWarning]


def test_a_second_fit_does_not_begin_with_the_random_states_of_the_first(tmp_path):
    def fit(callbacks, folder):
        pl.seed_everything(1, verbose=False)
        trainer = small_trainer(folder, [*callbacks, Trace(folder / "trace")], max_steps=4)
        trainer.fit(SmallLM(), datamodule=small_data())
        return (folder / "trace").read_text().splitlines()[-12:]

    selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=tmp_path)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    first = fit([selection, keep], tmp_path)
    assert fit([selection, keep], tmp_path) == first


class Stops(Callback):
    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._stop)

    def _stop(self, trainer, *rest):
        if trainer.global_step == self.step:
            raise ConnectionError("the storage is gone")


class LosesItsData(Masking):
    """Fails while it moves a batch, having drawn for it."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if self.trainer.training and self.trainer.global_step == self.fails_at:
            raise ConnectionError("the storage is gone")
        return batch

    fails_at = 5


@pytest.mark.parametrize("again", [False, True], ids=["once", "and at once again"])
def test_a_checkpoint_on_an_exception_while_a_batch_is_moved_resumes_to_the_bit(tmp_path, monkeypatch, again):
    monkeypatch.setitem(RUNS, "fails", (LosesItsData, (), ()))
    whole = trained(tmp_path / "whole", "the module draws what a batch trains on", **SIMPLE)
    saver = OnExceptionCheckpoint(tmp_path, "saved")
    path = None
    for _ in range(1 + again):
        with pytest.raises(ConnectionError):
            trained(tmp_path / "broken", "fails", path, [saver], **SIMPLE)
        path = tmp_path / "saved.ckpt"
    monkeypatch.setattr(LosesItsData, "fails_at", -1)
    assert trained(tmp_path / "broken", "fails", path, **SIMPLE) == whole


@pytest.mark.parametrize("first", [True, False], ids=["before selection", "after selection"])
def test_a_run_with_averaged_weights_resumes_to_the_bit(tmp_path, first):
    def fit(folder, ckpt_path=None):
        pl.seed_everything(1, verbose=False)
        folder.mkdir()
        selection = DataSelection(UniformSelector(), every_n_steps=4, dirpath=folder)
        average = EMAWeightAveraging(decay=0.5)
        pair = [average, selection] if first else [selection, average]
        keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        callbacks = [Place(selection), *pair, Trace(folder / "trace"), keep]
        module = SmallLM()
        small_trainer(folder, callbacks, limit_val_batches=0, val_check_interval=1.0, check_val_every_n_epoch=1).fit(
            module, datamodule=small_data(), ckpt_path=ckpt_path
        )
        return (folder / "trace").read_text().splitlines(), torch.cat([p.flatten() for p in module.parameters()])

    whole, average = fit(tmp_path / "whole")
    resumed, again = fit(tmp_path / "resumed", tmp_path / "whole" / "step=6.ckpt")
    assert resumed == whole[18:]
    assert torch.equal(average, again)
