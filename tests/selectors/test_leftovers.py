"""Everything that may be chosen is used once before anything is used twice, whatever divides what, by all selectors."""

from dataclasses import replace

import pytest
import torch
from fakes import FakeSource, fake_context

from liveselect.decisions import read_round, rounds_in
from liveselect.decisions.files import DecisionLedger
from liveselect.protocols import Selection
from liveselect.rounds import SelectionRun, run_round
from liveselect.selectors import PriorSelector, RegressionSelector, ScoredSelector, UCBSelector, UniformSelector
from liveselect.selectors.leftovers import LEFT_OVER, fill_up, split_by_use

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::liveselect.protocols.SelectionWarning")

POOL, BUDGET = 50, 12  # two are left over by the first pass, and other numbers by later ones
SCORES = torch.randn(POOL, generator=torch.Generator().manual_seed(3))
SOME = torch.where(torch.arange(POOL) % 5 < 2, SCORES, -torch.inf)  # 20
KNOWN = SOME.isfinite()


class Values:
    """An estimator and a regressor that both know the influence of every candidate."""

    def fit(self, context, *measured):
        return {"spearman": 0.9} if measured else {}

    def score(self, context, batch):
        return SCORES[batch["id"]]

    predict = score


def regression(**settings):
    return RegressionSelector(Values(), **{"probes": 10, "ratio": 0.5, **settings})


def arms():
    return UCBSelector(pulls=2, at_once=1, probes=3, controls=3, arms=1)


SELECTORS = {
    "uniform": (UniformSelector, None),
    "regression": (regression, None),
    "the best by regression": (lambda: regression(temperature=0.0), None),
    "arms": (arms, None),
    "scores": (lambda: ScoredSelector(SCORES, repeat=False), None),
    "scores and a random share": (lambda: ScoredSelector(SCORES, random_share=0.5, repeat=False), None),
    "some have scores": (lambda: ScoredSelector(SOME, random_share=0.25, repeat=False), KNOWN),
    "a group": (lambda: ScoredSelector(SCORES, groups=["a"], repeat=False), torch.arange(POOL) % 3 == 0),
    "a prior": (lambda: PriorSelector(regression(), SCORES, repeat=False), None),
    "a prior of arms": (lambda: PriorSelector(arms(), SCORES, ratio=0.4, repeat=False), None),
    "a prior with a score for some": (lambda: PriorSelector(regression(), SOME, repeat=False), KNOWN),
    "a prior of scores": (
        lambda: PriorSelector(ScoredSelector(SCORES, groups=["a", "b"], repeat=False), SOME, repeat=False),
        KNOWN & (torch.arange(POOL) % 3 < 2),
    ),
}


def a_source():
    groups = (torch.arange(POOL) % 3).int()
    return FakeSource(torch.arange(POOL).view(-1, 1).expand(-1, 3), groups=groups, group_names=("a", "b", "c"))


@pytest.mark.parametrize("name", SELECTORS)
def test_after_every_round_the_eligible_were_used_equally_often_or_once_more_and_others_never(name):
    make, eligible = SELECTORS[name]
    source = a_source()
    run = SelectionRun(make(), Values(), UniformSelector(), 0, source.pool)
    may = torch.ones(POOL, dtype=torch.bool) if eligible is None else eligible
    for index in range(9):
        run_round(run, fake_context(source, round_index=index, candidates=run.candidates(BUDGET)), BUDGET)
        uses = source.pool.uses[may]
        assert int(uses.max() - uses.min()) <= 1
        assert not source.pool.uses[~may].any()
    assert int(source.pool.uses.sum()) == 9 * BUDGET


def test_the_first_round_after_a_warm_up_takes_what_the_warm_up_left_of_the_eligible():
    source = a_source()
    run = SelectionRun(ScoredSelector(SOME, repeat=False), None, UniformSelector(), 3, source.pool)
    for index in range(6):
        run_round(run, fake_context(source, round_index=index, candidates=run.candidates(BUDGET)), BUDGET)
        uses = source.pool.uses[KNOWN]
        assert int(uses.max() - uses.min()) <= 1


@pytest.mark.parametrize("name", ["regression", "arms", "scores"])
def test_the_record_of_decisions_says_whose_turn_it_was(name, tmp_path):
    source = a_source()
    run = SelectionRun(SELECTORS[name][0](), Values(), UniformSelector(), 0, source.pool)
    run.decisions = DecisionLedger(tmp_path)
    for index in range(5):
        unused = set((source.pool.uses == 0).nonzero().flatten().tolist())
        run_round(run, fake_context(source, round_index=index, candidates=run.candidates(BUDGET)), BUDGET)
    rows = read_round(rounds_in(tmp_path)[4])
    assert set(rows["id"][rows["reason"] == LEFT_OVER].tolist()) == unused
    assert len(unused) == run.ledger.rounds[4].metrics["left_over"] == 2
    assert (rows["chosen"][rows["reason"] == LEFT_OVER]).all()


def test_leftovers_are_those_without_which_all_others_were_used_equally_often():
    generator = torch.Generator().manual_seed(0)
    for budget in range(0, 21):
        uses = torch.randint(0, 4, (20,), generator=generator)
        ids = torch.arange(20) + 7
        first, second = (set(part.tolist()) for part in split_by_use(ids, uses, budget))
        level = sorted(uses.tolist())[max(budget, 1) - 1]  # of the last that a round has to take
        assert first == {int(i) for i, used in zip(ids, uses, strict=True) if used < level}
        assert second == {int(i) for i, used in zip(ids, uses, strict=True) if used == level}


def test_leftovers_come_at_random_places_and_what_was_chosen_keeps_its_order():
    source = a_source()
    source.pool.record_use(torch.arange(2, POOL))
    context = fake_context(source, candidates=source.pool.available(6))
    counts = torch.zeros(6)
    for index in range(600):
        selection = fill_up(
            replace(context, round=index), 6, lambda part, left: Selection(part.candidates[:left].flip(0))
        )
        is_left = selection.ids < 2
        assert selection.ids[~is_left].tolist() == [5, 4, 3, 2]
        counts += is_left
    assert counts.sum() == 1200
    assert (counts - 200).abs().max() < 4 * (600 * 2 / 9) ** 0.5  # four standard deviations
