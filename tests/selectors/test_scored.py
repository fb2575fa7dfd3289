"""Drawing by precomputed scores against exact probabilities and limits, and what does not fit."""

import itertools
import math

import numpy as np
import pytest
import torch
from fakes import FakeSource, fake_context, play, random_source

from liveselect.grammar import InfluenceRegressor, SelectionWarning, Selector
from liveselect.rounds import SelectionRun
from liveselect.scores import write_scores
from liveselect.selectors import PriorSelector, RegressionSelector, ScoredSelector, UniformSelector

pytestmark = pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")


def context_of(count, index=0, **kwargs):
    return fake_context(random_source(candidates=count, **kwargs), index=index)


def opened(selector, source, budget):
    """The first round of a run, among the candidates that its selector may choose."""
    return SelectionRun(selector, None, UniformSelector(), 0, source).open_round(0, budget)


def frequencies(selector, context, budget, rounds):
    counts = torch.zeros(context.source.pool.size)
    candidates = opened(selector, context.source, budget).candidates
    for index in range(rounds):
        counts[selector.select(context.but(index=index, candidates=candidates).round, budget).ids] += 1
    return (counts / rounds).tolist()


def plackett_luce(scores, k, temperature):
    weights = [math.exp(score / temperature) for score in scores]
    inclusion = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        for i in order:
            inclusion[i] += probability
    return inclusion


def test_inclusion_follows_plackett_luce_weights():
    scores, rounds = [1.0, 0.8, 0.6, 0.4], 1500
    expected = plackett_luce(scores, 2, 0.1)
    assert expected == pytest.approx([0.99541, 0.86895, 0.11944, 0.01620], abs=1e-5)
    found = frequencies(ScoredSelector(scores, ratio=0.5, temperature=0.1), context_of(4), 2, rounds)
    assert found == pytest.approx(expected, abs=4 * 0.5 / rounds**0.5)


def test_a_budget_below_the_share_is_a_uniform_part_of_it():
    scores, rounds = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0], 1500
    expected = [probability / 3 for probability in plackett_luce(scores, 3, 0.2)]
    found = frequencies(ScoredSelector(scores, ratio=0.5, temperature=0.2), context_of(6), 1, rounds)
    assert found == pytest.approx(expected, abs=4 * 0.5 / rounds**0.5)


def test_without_noise_the_best_share_is_used_up_before_anything_else():
    context = context_of(20)
    scores = torch.arange(20.0)
    selector = ScoredSelector(scores, ratio=0.4, temperature=0.0, repeat=False)
    pool = context.source.pool
    drawn = []
    for index in range(3):
        selection = selector.select(context.but(index=index, candidates=pool.available(4)).round, 4)
        assert not set(selection.ids.tolist()) & set(drawn)
        pool.record_use(selection.ids)
        drawn += selection.ids.tolist()
        assert selection.metrics["beyond_ratio"] == (4 if index == 2 else 0)
        assert any("come from below" in note for note in selection.notes) == (index == 2)
    assert sorted(drawn[:8]) == list(range(12, 20))
    assert sorted(drawn[8:]) == [8, 9, 10, 11]


def test_a_temperature_far_above_the_scores_draws_uniformly():
    found = frequencies(ScoredSelector(torch.arange(5.0), ratio=0.4, temperature=1e6), context_of(5), 2, 1500)
    assert found == pytest.approx([0.4] * 5, abs=0.05)


def test_equal_rounds_draw_equally_and_other_rounds_otherwise():
    context = context_of(200)
    selectors = [ScoredSelector(torch.zeros(200), ratio=0.5) for _ in range(2)]
    first, again = (selector.select(context.round, 20).ids for selector in selectors)
    assert torch.equal(first, again)
    assert not torch.equal(selectors[0].select(context.but(index=1).round, 20).ids, first)


def test_the_temperature_moves_by_equal_steps_and_then_stays():
    selector = ScoredSelector(torch.zeros(4), temperature=1.0, final_temperature=0.2, anneal_rounds=4)
    assert [selector.temperature_in(r) for r in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    selection = selector.select(context_of(4, index=2).round, 2)
    assert selection.metrics["temperature"] == pytest.approx(0.6)
    assert ScoredSelector(torch.zeros(4), temperature=0.3).temperature_in(9) == 0.3


def test_only_the_named_groups_are_chosen():
    groups = torch.arange(30) % 3
    source = random_source(candidates=30, groups=groups, group_names=("code", "prose", "tables"))
    context = fake_context(source)
    selector = ScoredSelector(torch.randn(30), groups=["code", "tables"], ratio=0.3)
    selection = selector.select(opened(selector, source, 8), 8)
    assert not (groups[selection.ids] == 1).any()
    assert sorted(selection.scored.tolist()) == [i for i in range(30) if i % 3 != 1]
    assert len(selection.scores) == 20
    with pytest.raises(ValueError, match=r"no groups \['news'\]"):
        ScoredSelector(torch.zeros(30), groups=["news"]).select(context.round, 8)
    with pytest.raises(ValueError, match="more groups"):
        opened(ScoredSelector(torch.zeros(30), groups=["prose"]), source, 11)


@pytest.mark.long
def test_a_random_share_is_drawn_from_all_that_the_scores_left():
    context, scores, rounds = context_of(10), torch.arange(10.0), 1500
    found = frequencies(ScoredSelector(scores, ratio=0.2, temperature=0.0, random_share=0.5), context, 4, rounds)
    assert found[8:] == [1.0, 1.0]
    assert found[:8] == pytest.approx([0.25] * 8, abs=0.05)
    whole = ScoredSelector(scores, ratio=0.2, temperature=0.0, random_share=1.0)
    assert frequencies(whole, context, 4, rounds) == pytest.approx([0.4] * 10, abs=0.05)


def test_candidates_without_a_score_are_never_drawn():
    scores = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 2.0])
    context = context_of(5)
    for random_share in (0.0, 0.5):
        selector = ScoredSelector(scores, ratio=1.0, temperature=10.0, random_share=random_share)
        assert frequencies(selector, context, 3, 50) == [0.0, 1.0, 0.0, 1.0, 1.0]
        with pytest.raises(ValueError, match="of which 3 may be chosen"):
            opened(selector, context.source, 4)


def test_standardised_scores_do_not_depend_on_their_scale():
    scores, context = torch.randn(60, generator=torch.Generator().manual_seed(0)), context_of(60)
    plain, scaled = (
        ScoredSelector(scores * scale, ratio=0.3, temperature=0.5, standardize=True).select(context.round, 10)
        for scale in (1.0, 64.0)
    )
    assert torch.equal(plain.ids, scaled.ids)
    assert scaled.metrics["scores/std"] == pytest.approx(1.0)


@pytest.mark.parametrize("largest", [5e-324, 1.0, 1e200, 1.7e308])
def test_standardised_scores_have_unit_variance_at_any_scale(largest):
    scores, context = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64) * largest, context_of(4)
    selection = ScoredSelector(scores, ratio=1.0, temperature=0.0, standardize=True).select(context.round, 2)
    assert sorted(zip(selection.scored.tolist(), selection.scores.tolist(), strict=True)) == [
        (0, 1.0),
        (1, -1.0),
        (2, -1.0),
        (3, 1.0),
    ]
    half = ScoredSelector(scores, ratio=0.5, temperature=0.0, standardize=True).select(context.round, 2)
    assert sorted(half.ids.tolist()) == [0, 3]


@pytest.mark.parametrize("settings", [{}, {"standardize": True}])
def test_a_file_that_is_changed_while_a_run_draws_from_its_mapping_ends_the_run_in_the_next_round(
    tmp_path, monkeypatch, settings
):
    monkeypatch.setattr("liveselect.scores._MAX_BYTES_IN_MEMORY", 0)
    np.save(tmp_path / "s.npy", np.arange(6.0))
    context, selector = context_of(6), ScoredSelector(tmp_path / "s.npy", **settings)
    selector.select(context.round, 2)
    selector.select(context.but(index=1).round, 2)
    np.save(tmp_path / "s.npy", np.arange(3.0))
    with pytest.raises(ValueError, match="changed while a run draws from it"):
        selector.select(context.but(index=2).round, 2)


def test_groups_are_a_list_of_names():
    with pytest.raises(ValueError, match="expected a list of names of groups, got the string 'c0'"):
        ScoredSelector(torch.zeros(4), groups="c0")


def test_scores_of_another_pool_are_refused_when_they_are_first_used(tmp_path):
    context = context_of(6)
    write_scores(tmp_path / "right", torch.arange(6.0), context.source.pool.fingerprint, {})
    write_scores(tmp_path / "wrong", torch.arange(6.0), "another pool", {})
    drawn = ScoredSelector(tmp_path / "right", temperature=0.0).select(context.round, 2).ids
    assert sorted(drawn.tolist()) == [4, 5]
    with pytest.raises(ValueError, match="another pool"):
        ScoredSelector(tmp_path / "wrong").select(context.round, 2)
    with pytest.raises(ValueError, match="7 scores, the pool 6 candidates"):
        ScoredSelector(torch.zeros(7)).select(context.round, 2)


@pytest.mark.parametrize("place", ["prior", "selector"])
def test_a_prior_looks_at_its_own_scores_and_at_those_of_its_selector_before_training(place):
    round = context_of(6).round
    right, wrong = torch.zeros(6), torch.zeros(7)
    prior, inner = (wrong, right) if place == "prior" else (right, wrong)
    PriorSelector(ScoredSelector(right), right).check(round, 2)
    with pytest.raises(ValueError, match="7 scores, the pool 6 candidates"):
        PriorSelector(ScoredSelector(inner), prior).check(round, 2)


def test_a_prior_costs_what_its_own_scores_and_those_of_its_selector_cost(tmp_path):
    def scores(name, **cost):
        write_scores(tmp_path / name, torch.zeros(6), "pool", {"cost": cost})
        return tmp_path / name

    first = scores("first", seconds={"solve": 1.0, "fit scorer": 2.0}, flops={"solve": 8.0})
    second = scores("second", seconds={"solve": 4.0})
    assert PriorSelector(ScoredSelector(first), second).cost_before_training() == {
        "seconds": {"solve": 5.0, "fit scorer": 2.0},
        "flops": {"solve": 8.0},
    }
    assert PriorSelector(UniformSelector(), second).cost_before_training() == {"seconds": {"solve": 4.0}}


@pytest.mark.filterwarnings("error")
def test_scores_that_name_no_pool_are_used_with_a_warning(tmp_path):
    context = context_of(6)
    with pytest.warns(SelectionWarning, match="only their number was checked"):
        ScoredSelector(torch.zeros(6)).select(context.round, 2)
    write_scores(tmp_path / "s", torch.zeros(6), context.source.pool.fingerprint, {})
    ScoredSelector(tmp_path / "s").select(context.round, 2)


def test_a_run_is_resumed_with_the_scores_that_it_began_with():
    first, same, other = (ScoredSelector(values) for values in ([1.0, 2.0], [1.0, 2.0], [2.0, 1.0]))
    same.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="other scores"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.0},
        {"ratio": 1.5},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"final_temperature": 0.1},
        {"anneal_rounds": 3},
        {"final_temperature": -0.1, "anneal_rounds": 3},
        {"final_temperature": 0.1, "anneal_rounds": 0},
        {"random_share": 1.1},
    ],
)
def test_impossible_settings_are_refused_at_construction(settings):
    with pytest.raises(ValueError, match="expected"):
        ScoredSelector(torch.zeros(3), **settings)


# ---- as a prior -------------------------------------------------------------------------------------------------


def test_a_prior_lets_the_other_selector_see_the_better_part_only():
    context = context_of(40)
    selector = PriorSelector(UniformSelector(), torch.arange(40.0), ratio=0.25)
    found = frequencies(selector, context, 5, 400)
    assert found[:30] == [0.0] * 30
    assert found[30:] == pytest.approx([0.5] * 10, abs=0.12)
    assert selector.select(context.round, 5).metrics["prior/candidates"] == 10


def test_a_prior_that_keeps_too_few_goes_on_with_the_next_best():
    selection = PriorSelector(UniformSelector(), torch.arange(40.0), ratio=0.05).select(context_of(40).round, 6)
    assert sorted(selection.ids.tolist()) == [34, 35, 36, 37, 38, 39]
    assert "come from below" in selection.notes[-1]


class FirstTokenRegressor(InfluenceRegressor):
    """Predicts the first token."""

    def fit(self, round, ids, influence):
        return {"spearman": 1.0}

    def predict(self, round, batch):
        return batch["input_ids"][:, 0].float()


def test_a_prior_narrows_what_is_measured_and_what_is_predicted():
    tokens = torch.arange(60).repeat_interleave(2).view(60, 2)
    context = fake_context(FakeSource(tokens))
    scores = (torch.arange(60) % 2).float()  # odd candidates are good
    inner = RegressionSelector(FirstTokenRegressor(), probes=10, ratio=0.3, temperature=0.0)
    selector = PriorSelector(inner, scores, ratio=0.5)
    probes = selector.propose(context.round)
    assert len(probes) == 10
    assert (probes % 2 == 1).all()
    selector.observe(probes, torch.arange(10.0))
    assert len(selector.propose(context.round)) == 0
    state = selector.state_dict()
    selection = selector.select(context.round, 9)
    assert (selection.ids % 2 == 1).all()
    assert sorted(selection.ids.tolist()) == list(range(43, 60, 2))  # ratio 0.3 of 30: the best 9 predictions

    resumed = PriorSelector(
        RegressionSelector(FirstTokenRegressor(), probes=10, ratio=0.3, temperature=0.0), scores, 0.5
    )
    resumed.load_state_dict(state)
    assert torch.equal(resumed.select(context.round, 9).ids, selection.ids)
    with pytest.raises(ValueError, match="state of the selector inside the prior RegressionSelector"):
        PriorSelector(UniformSelector(), scores, ratio=0.5).load_state_dict(state)


class TakesTheWorst(Selector):
    """Takes the last of what it is shown, which are the worst where scores fall."""

    def select(self, round, budget):
        return round.candidates[-budget:]


def test_what_a_selector_takes_from_anywhere_inside_of_a_gate_uses_up_its_share():
    """A gate of 40 lets 20 be chosen: when 20 were, whichever they are, these come again."""
    source = random_source(candidates=100)
    selector = PriorSelector(TakesTheWorst(), -torch.arange(100.0).numpy(), ratio=0.4, temperature=0.0, gate=2.0)
    run = SelectionRun(selector, None, UniformSelector(), 0, source)
    plans = [set(play(run, 10).ids.tolist()) for _ in range(4)]
    assert plans[0] | plans[1] == plans[2] | plans[3] == set(range(20, 40))
