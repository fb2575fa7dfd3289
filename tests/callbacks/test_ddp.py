"""Two processes decide as one and train on the same global batches."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from small_run import BATCH, POOL, SmallLM, rows, small_trainer

from liveselect.callbacks import DataSelection
from liveselect.datamodules import SelectionDataModule
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

STEPS, ROUND = 6, 2


class Seen(Callback):
    """Writes down what each rank trained on, and at the end what selection did."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.folder / f"seen-{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(batch["id"].tolist()) + "\n")

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / "end.ckpt")  # here: the forked ranks do not come back to the caller
        run = trainer.callbacks[0].run
        rounds = [(record.plan, record.measured, record.influence) for record in run.ledger.rounds]
        (self.folder / f"rounds-{trainer.global_rank}").write_text(json.dumps([rounds, run.plan.ids.tolist()]))


def trained(folder, ranks, ckpt_path=None, steps=STEPS):
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(
        RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None),
        OneStepInfluence(),
        every_n_steps=ROUND,
        dirpath=folder,
    )
    data = SelectionDataModule(pool=rows(POOL, 1), reference=rows(6, 2), batch_size=BATCH // ranks, probe_batch_size=4)
    settings = {"precision": "32-true", "max_steps": steps, "devices": ranks, "limit_val_batches": 0}
    if ranks > 1:
        settings["strategy"] = DDPStrategy(process_group_backend="gloo", start_method="fork")
    trainer = small_trainer(folder, [selection, Seen(folder)], val_check_interval=3, **settings)
    trainer.fit(SmallLM(dropout=0.0), datamodule=data, ckpt_path=ckpt_path)
    return [json.loads((folder / f"rounds-{rank}").read_text()) for rank in range(ranks)]


def batches(folder, ranks):
    """Return the global batches in order."""
    per_rank = [
        [json.loads(line) for line in (folder / f"seen-{rank}").read_text().splitlines()] for rank in range(ranks)
    ]
    return [[i for part in parts for i in part] for parts in zip(*per_rank, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torch.set_num_threads(1)
    return folder, trained(folder / "one", 1), trained(folder / "two", 2)


def test_both_ranks_hold_the_same_plans_and_measurements(runs):
    _, _, (first, second) = runs
    assert first == second


def test_two_ranks_choose_what_one_chooses_from_the_same_influence(runs):
    _, (alone,), (together, _) = runs
    for (plan, measured, influence), (plan2, measured2, influence2) in zip(alone[0], together[0], strict=True):
        assert plan == plan2
        assert measured == measured2
        assert torch.allclose(torch.tensor(influence), torch.tensor(influence2), rtol=1e-3, atol=1e-5)


def test_two_ranks_see_the_global_batches_of_one(runs):
    folder, *_ = runs
    assert batches(folder / "one", 1) == batches(folder / "two", 2)


def test_a_run_continues_on_another_number_of_ranks(runs, tmp_path):
    folder, *_ = runs
    longer = trained(tmp_path / "whole", 1, steps=STEPS + 2)[0][1]
    for ranks, source in ((1, "two"), (2, "one")):
        place = tmp_path / source
        (rounds,) = {json.dumps(r) for r in trained(place, ranks, folder / source / "end.ckpt", steps=STEPS + 2)}
        assert json.loads(rounds)[1] == longer
        assert sorted(i for batch in batches(place, ranks) for i in batch) == sorted(longer)
