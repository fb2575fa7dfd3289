"""Two processes decide as one and train on the same global batches."""

import json
import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_run import ACCUMULATE
from two_ranks import STEPS, batches, trained

from liveselect import distributed
from liveselect.influence import OneStepInfluence
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector


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
        # influences are about 1, from differences of float32 losses
        assert torch.allclose(torch.tensor(influence), torch.tensor(influence2), rtol=1e-3, atol=5e-4)


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


class Dying(OneStepInfluence):
    """Its rank 1 is killed while it measures for the second round."""

    def fit(self, model, round):
        self.round = round.index
        return super().fit(model, round)

    def score(self, model, batch):
        if self.round == 2 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(model, batch)


def test_a_rank_that_dies_in_a_round_ends_the_run_and_its_last_checkpoint_continues_it(runs, tmp_path):
    folder, *_ = runs
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="saved")
    with pytest.raises(Exception, match=r"SIGKILL|terminated|Connection closed"):
        trained(tmp_path / "broken", 2, estimator=Dying(), callbacks=[keep])
    rounds = trained(tmp_path / "resumed", 2, tmp_path / "saved.ckpt")
    assert rounds == runs[2]
    assert batches(tmp_path / "resumed", 2) == batches(folder / "two", 2)[3 * ACCUMULATE :]


def test_ranks_that_propose_different_candidates_are_named_before_anything_is_measured(tmp_path):
    class Torn(RegressionSelector):
        def propose(self, round):
            return super().propose(round) + distributed.rank()

    with pytest.raises(Exception, match=r"ranks disagree about what to measure in round 1: .*ranks \[1\] hold"):
        trained(tmp_path, 2, selector=Torn(HashedRidgeRegressor(), probes=13))
