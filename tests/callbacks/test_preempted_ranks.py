"""SIGTERM on all ranks, as a scheduler sends it, while they measure: they stop at one batch, and resume to the bit."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning_ranks import Steps, fit, on_lightning_ranks

from liveselect import distributed
from liveselect.callbacks import DataSelection
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector

ROUND = 2


class Preempted(OneStepInfluence):
    """Gets SIGTERM in round 1, each rank at another batch."""

    batches = 0

    def fit(self, model, round):
        self.round = round.index
        return super().fit(model, round)

    def score(self, model, batch):
        self.batches += self.round == 1
        if self.batches == 1 + distributed.rank():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().score(model, batch)


def _run(folder, strategy, estimator, ckpt_path=None, callbacks=()) -> dict:
    selector = RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)
    selection = DataSelection(selector, estimator, every_n_steps=ROUND, dirpath=folder / "selection")
    settings = {"dropout": 0.1, "max_steps": 5, "callbacks": [*callbacks]}
    return fit(folder, selection, strategy, ckpt_path=ckpt_path, **settings)


def _everything(folder) -> dict:
    found = {}
    for strategy in ("ddp", "fsdp2"):
        place, seen = folder / strategy, Steps()
        found[strategy] = {"whole": _run(place / "whole", strategy, OneStepInfluence())}
        try:
            keep = OnExceptionCheckpoint(place, "saved")
            _run(place / "stopped", strategy, Preempted(), callbacks=[seen, keep])
        except BaseException as end:
            found[strategy] |= {"end": type(end).__name__, "until": seen.seen}
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        found[strategy]["resumed"] = _run(place / "resumed", strategy, OneStepInfluence(), place / "saved.ckpt")
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    torch.set_num_threads(1)
    return on_lightning_ranks(_everything, 2, tmp_path_factory.mktemp("preempted"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_that_are_preempted_in_a_round_finish_it_stop_together_and_resume_to_the_bit(ranks, strategy):
    for rank in ranks:
        run = rank[strategy]
        assert run["end"] == "SIGTERMException"
        assert run["until"] == run["whole"]["steps"][:ROUND]
        assert run["resumed"]["steps"] == run["whole"]["steps"][ROUND:]
        assert run["resumed"]["rounds"] == run["whole"]["rounds"]
