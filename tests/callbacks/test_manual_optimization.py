"""A module that steps two optimizers by itself is selected for as one that leaves a single optimizer to the Trainer."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import SIMPLE, SmallLM, small_data, small_trainer, weights_hash

from liveselect.callbacks import DataSelection
from liveselect.influence import FirstOrderInfluence, OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = 6
ESTIMATORS = {
    "one step": lambda: OneStepInfluence(),
    "optimizer step": lambda: FirstOrderInfluence(engine="optimizer_step"),
    "hooks": lambda: FirstOrderInfluence(engine="hooks"),
}


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


class One(SmallLM):
    def __init__(self):
        super().__init__(dropout=0.0)
        self.ids = []

    def training_step(self, batch, batch_index):
        self.ids.append(batch["id"].tolist())
        return super().training_step(batch, batch_index)

    def halves(self):
        every = list(self.parameters())
        return every[::2], every[1::2]

    def configure_optimizers(self):
        return adamw(self.parameters())


class Two(One):
    automatic_optimization = False
    batches_per_step = 1

    def configure_optimizers(self):
        return [adamw(half) for half in self.halves()]

    def training_step(self, batch, batch_index):
        loss = super().training_step(batch, batch_index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()


class Forgetful(Two):
    def training_step(self, batch, batch_index):
        loss = One.training_step(self, batch, batch_index)
        self.manual_backward(loss)
        self.optimizers()[batch_index % 2].step()


def fit(folder, module, estimator, ticks, checkpoint=None, batches=BATCHES):
    selector = RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None)
    selection = DataSelection(selector, estimator, every_n_steps=2, dirpath=folder / "selection")
    saving = ModelCheckpoint(folder, every_n_train_steps=3 * ticks, save_top_k=-1, filename="{step}")
    plain = {**SIMPLE, "precision": "32-true", "gradient_clip_val": None}
    trainer = small_trainer(folder, [selection, saving], max_steps=batches * ticks, **plain)
    trainer.fit(module, datamodule=small_data(), ckpt_path=checkpoint)
    rounds = selection.run.ledger.rounds
    return {
        "ids": module.ids,
        "plans": [record.plan for record in rounds],
        "measured": [record.measured for record in rounds],
        "influence": torch.tensor([value for record in rounds for value in record.influence]),
        "weights": weights_hash(module),
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_halves_of_an_optimizer_are_one(tmp_path, estimator):
    one = fit(tmp_path / "one", One(), ESTIMATORS[estimator](), 1)
    two = fit(tmp_path / "two", Two(), ESTIMATORS[estimator](), 2)
    assert len(one["ids"]) == BATCHES
    torch.testing.assert_close(two.pop("influence"), one.pop("influence"))
    assert two == one


def test_a_manual_run_that_is_resumed_inside_a_round_ends_with_the_same_bits(tmp_path):
    whole = fit(tmp_path / "whole", Two(), OneStepInfluence(), 2)
    part = fit(tmp_path / "cut", Two(), OneStepInfluence(), 2)
    rest = fit(tmp_path / "cut", Two(), OneStepInfluence(), 2, tmp_path / "cut" / "step=6.ckpt")
    assert part["weights"] == whole["weights"]
    assert rest["ids"] == whole["ids"][3:]
    assert rest["plans"] == whole["plans"]
    assert rest["weights"] == whole["weights"]


def test_a_batch_that_does_not_step_every_optimizer_ends_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="count of optimizer steps by 1, where 2 was expected"):
        fit(tmp_path, Forgetful(), OneStepInfluence(), 2)
