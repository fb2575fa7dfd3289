"""The verdict inside a run: look-aheads leave training as it was, and say what is planted."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from small_run import BATCH, POOL, Place, ProbingUniform, SmallLM, Trace, rows, small_data, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence
from liveselect.ledger import Ledger
from liveselect.selectors import UniformSelector
from liveselect.verdict import Verdict

OFTEN = Verdict(share=0.9, steps=3, cost="flops", rows=4)
STEPS = 22


class Busy(SmallLM):
    """Counts its training steps, draws from numpy and logs, as modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []
        self.register_buffer("count", torch.zeros(1))

    def training_step(self, batch, batch_index):
        self.seen.append(len(self.seen))
        self.count += 1
        loss = super().training_step(batch, batch_index)
        self.log("train_loss", loss)
        return loss


def trained(folder, verdict, selector=None, ckpt_path=None, callbacks=(), module=None, **settings):
    """Train the small run; returns its trace, its ledger and the selection."""
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    estimator = settings.pop("estimator", None)
    selection = DataSelection(
        selector or UniformSelector(), estimator, every_n_steps=4, dirpath=folder, verdict=verdict
    )
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    stack = [Place(selection), selection, Trace(folder / "trace"), *callbacks, keep]
    trainer = small_trainer(folder, stack, **{"max_steps": STEPS, **settings})
    trainer.fit(module or Busy(), datamodule=small_data(), ckpt_path=ckpt_path)
    return (folder / "trace").read_text().splitlines(), Ledger.read(folder / "ledger.jsonl"), selection


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *trained(folder, OFTEN)


def test_look_aheads_leave_training_as_it_was_to_the_bit(whole, tmp_path):
    _, trace, ledger, selection = whole
    assert trace == trained(tmp_path, None)[0]
    assert len(selection._judging._look.looks) >= 3
    assert ledger.verdict["looks"] == len(selection._judging._look.looks)
    assert ledger.verdict["said"] == "cannot tell yet"


def test_the_cost_stands_in_the_ledger_in_its_own_phase_and_within_its_share(whole):
    _, _, ledger, selection = whole
    spent = [record.flops.get("look-ahead", 0.0) for record in ledger.rounds]
    assert spent[0] == 0  # nothing is compared in the warm-up
    assert 0 < sum(spent) <= 0.9 * ledger.training_flops
    assert sum(record.seconds.get("look-ahead", 0.0) for record in ledger.rounds) > 0


@pytest.mark.parametrize("step", [*range(1, 13), 17, 20])
def test_a_run_that_is_resumed_anywhere_finds_the_same(whole, tmp_path, step):
    folder, trace, _, selection = whole
    resumed, _, again = trained(tmp_path, OFTEN, ckpt_path=folder / f"step={step}.ckpt")
    assert resumed == trace[3 * step :]
    assert again._judging._look.looks == selection._judging._look.looks
