"""Influence of a model that is sharded over ranks is that of the whole model on one process."""

import pytest
import torch
from sharded import local_sizes, measured, warm
from ranks import on_ranks

from liveselect.influence import OneStepInfluence

RANKS = 3
ESTIMATORS = {
    "one step": OneStepInfluence,
    "one step in a batch": lambda: OneStepInfluence(step="in_batch"),
}


def _all_measured(sharded: bool) -> dict:
    context = warm(sharded)
    found = {name: measured(make(), context) for name, make in ESTIMATORS.items()}
    return {**found, "sizes": local_sizes(context)}


@pytest.fixture(scope="module")
def results():
    torch.set_num_threads(1)
    together = on_ranks(_all_measured, RANKS, True)
    for result in together:
        if isinstance(result, Exception):
            raise result
    return _all_measured(False), together


def test_some_rank_holds_less_than_another(results):
    sizes = [result["sizes"] for result in results[1]]
    assert sizes[0] != sizes[-1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sharded_influence_is_that_of_one_process(results, name):
    alone, together = results
    influence, metrics, _ = alone[name]
    for rank in together:
        torch.testing.assert_close(rank[name][0], influence, rtol=1e-5, atol=1e-7)
        assert rank[name][1] == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_measuring_leaves_every_shard_and_moment_bitwise_unchanged(results, name):
    assert all(rank[name][2] for rank in results[1])
