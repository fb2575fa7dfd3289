import math

import pytest
import torch
from fakes import fake_context, play, random_source

from liveselect.rounds import SelectionRun
from liveselect.selectors import UniformSelector


def test_uniform_selection_measures_nothing_and_knows_no_scores():
    selector, context = UniformSelector(), fake_context(random_source())
    assert selector.propose(context.round).tolist() == []
    selection = selector.select(context.round, 8)
    assert selection.scores is None
    assert selection.scored is None


def uniform_run(source, seed=0):
    return SelectionRun(UniformSelector(), None, UniformSelector(), 0, source, seed=seed)


@pytest.mark.long
def test_every_candidate_is_chosen_equally_often_and_stands_equally_often_first():
    rounds = 1200
    chosen, first = torch.zeros(6), torch.zeros(6)
    for seed in range(rounds):
        ids = play(uniform_run(random_source(candidates=6), seed), 2).ids
        chosen[ids] += 1
        first[ids[0]] += 1
    for counts, p in ((chosen, 2 / 6), (first, 1 / 6)):
        assert ((counts / rounds - p).abs() < 4.5 * math.sqrt(p * (1 - p) / rounds)).all()


def test_only_the_rounds_candidates_are_chosen_and_each_once():
    candidates = torch.arange(40, 60)
    context = fake_context(random_source(), candidates=candidates)
    assert UniformSelector().select(context.round, 20).ids.sort().values.equal(candidates)


def test_a_round_is_drawn_again_alike_and_another_round_differently():
    source = random_source()
    draws = [UniformSelector().select(fake_context(source, index=r).round, 16).ids for r in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_budget_larger_than_the_candidates_is_refused():
    with pytest.raises(ValueError, match="needs 65 distinct candidates but the pool holds 64"):
        play(uniform_run(random_source()), 65)


def test_no_candidate_repeats_before_all_were_used():
    source = random_source(candidates=30)
    run = uniform_run(source)
    for _ in range(6):
        play(run, 25)
        uses = source.pool.uses
        assert uses.max() - uses.min() <= 1
    assert (uses == 5).all()
