"""Two processes decide as one and train on the same global batches."""

import json

import pytest
import torch
from two_ranks import STEPS, batches, trained


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
