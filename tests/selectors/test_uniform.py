import math

import pytest
import torch
from fakes import fake_context, random_source

from liveselect.selectors import UniformSelector


def test_uniform_selection_measures_nothing_and_knows_no_scores():
    selector, context = UniformSelector(), fake_context(random_source())
    assert selector.propose(context).tolist() == []
    selection = selector.select(context, 8)
    assert selection.scores is None
    assert selection.scored is None


def test_every_candidate_is_chosen_equally_often_and_stands_equally_often_first():
    source, rounds = random_source(candidates=6), 3000
    chosen, first = torch.zeros(6), torch.zeros(6)
    for r in range(rounds):
        ids = UniformSelector().select(fake_context(source, round_index=r), 2).ids
        chosen[ids] += 1
        first[ids[0]] += 1
    for counts, p in ((chosen, 2 / 6), (first, 1 / 6)):
        assert ((counts / rounds - p).abs() < 4.5 * math.sqrt(p * (1 - p) / rounds)).all()


def test_only_the_rounds_candidates_are_chosen_and_each_once():
    candidates = torch.arange(40, 60)
    context = fake_context(random_source(), candidates=candidates)
    assert UniformSelector().select(context, 20).ids.sort().values.equal(candidates)


def test_a_round_is_drawn_again_alike_and_another_round_differently():
    source = random_source()
    draws = [UniformSelector().select(fake_context(source, round_index=r), 16).ids for r in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_budget_larger_than_the_candidates_is_refused():
    with pytest.raises(ValueError, match="cannot choose 65 of 64 candidates"):
        UniformSelector().select(fake_context(random_source()), 65)


def test_no_candidate_repeats_before_all_were_used():
    source = random_source(candidates=30)
    for round_index in range(6):
        context = fake_context(source, round_index=round_index, candidates=source.pool.available(25))
        source.pool.record_use(UniformSelector().select(context, 25).ids)
        uses = source.pool.uses
        assert uses.max() - uses.min() <= 1
    assert (uses == 5).all()
