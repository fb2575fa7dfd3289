"""A share that was trained on is trained on again, and nothing below it."""

import pytest
import torch
from fakes import play, random_source

from liveselect.rounds import SelectionRun
from liveselect.selectors import PriorSelector, ScoredSelector, UniformSelector

POOL, BUDGET = 60, 6
SCORES = torch.arange(float(POOL)).roll(17)

pytestmark = pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")


def uses_after(selector, rounds, warmup_rounds=0, budget=BUDGET):
    source = random_source(candidates=POOL)
    run = SelectionRun(selector, None, UniformSelector(), warmup_rounds, source)
    for _ in range(rounds):
        play(run, budget)
    return source.pool.uses, run.ledger.rounds


MAKERS = {
    "scores": lambda **settings: ScoredSelector(SCORES, **settings),
    "prior": lambda **settings: PriorSelector(UniformSelector(), SCORES, **settings),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("budget", [6, 7])
def test_the_share_is_trained_on_equally_often_and_nothing_below_it(make, budget):
    uses, records = uses_after(make(ratio=0.4, temperature=0.0), rounds=12, budget=budget)
    best = SCORES >= POOL - 24
    # a round that ends the first pass takes what it is short of from below
    assert int((uses[~best] > 0).sum()) <= (-24) % budget
    assert int(uses[best].max() - uses[best].min()) <= 1
    said = [note for record in records for note in record.notes if "trained on again" in note]
    assert len(said) == 1


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_the_whole_pool_is_used_up_where_that_is_asked_for(make):
    uses, _ = uses_after(make(ratio=0.4, temperature=0.0, repeat=False), rounds=10)
    assert uses.tolist() == [1] * POOL


def test_with_noise_the_candidates_of_the_first_pass_come_again():
    selector = ScoredSelector(SCORES / SCORES.std(), ratio=0.4, temperature=0.1)
    first, _ = uses_after(selector, rounds=4)
    later, _ = uses_after(selector, rounds=40)
    assert set(first.nonzero().flatten().tolist()) <= set(later.nonzero().flatten().tolist())
    assert int((later > 0).sum()) <= 24 + BUDGET


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_what_warm_up_rounds_trained_on_is_not_taken_for_the_share(make):
    warm, _ = uses_after(make(ratio=0.1, temperature=0.0), rounds=4, warmup_rounds=4)
    uses, _ = uses_after(make(ratio=0.1, temperature=0.0), rounds=14, warmup_rounds=4)
    best = SCORES >= POOL - 6
    assert bool((uses[best] > warm[best]).all())
    assert int((uses - warm)[~best].sum()) <= BUDGET
    assert int(uses.sum()) == 14 * BUDGET


def test_a_random_share_is_kept_in_later_passes():
    uses, _ = uses_after(ScoredSelector(SCORES, ratio=0.4, temperature=0.0, random_share=0.5), rounds=30)
    best = SCORES >= POOL - 24
    assert int((uses[~best] > 0).sum()) > 6
    assert int(uses[uses > 0].max() - uses[uses > 0].min()) <= 1
    assert int((uses > 0).sum()) < POOL


def test_a_round_larger_than_the_share_goes_on_below_it():
    uses, _ = uses_after(ScoredSelector(SCORES, ratio=0.05, temperature=0.0), rounds=5)
    assert set((uses > 0).nonzero().flatten().tolist()) == set(SCORES.topk(BUDGET).indices.tolist())
    assert uses.max() == 5
