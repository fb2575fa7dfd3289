"""Everything that may be chosen is used once before anything is used twice, whatever divides what, by all selectors."""

import pytest
import torch
from fakes import FakeSource, play

from liveselect.decisions import read_round, rounds_in
from liveselect.decisions.files import DecisionLedger
from liveselect.grammar import InfluenceEstimator, InfluenceRegressor, Selector
from liveselect.pool import split_by_use
from liveselect.rounds import LEFT_OVER, SelectionRun
from liveselect.selectors import (
    MixtureSelector,
    PriorSelector,
    RegressionSelector,
    ScoredSelector,
    UCBSelector,
    UniformSelector,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")

POOL, BUDGET = 50, 12  # two are left over by the first pass, and other numbers by later ones
SCORES = torch.randn(POOL, generator=torch.Generator().manual_seed(3))
SOME = torch.where(torch.arange(POOL) % 5 < 2, SCORES, -torch.inf)  # 20
KNOWN = SOME.isfinite()


class Values(InfluenceEstimator):
    """Knows the influence of every candidate."""

    def score(self, model, batch):
        return SCORES[batch["id"]]


class Predictions(InfluenceRegressor):
    """Predicts it, too."""

    def fit(self, round, ids, influence):
        return {"spearman": 0.9}

    def predict(self, round, batch):
        return SCORES[batch["id"]]


def regression(**settings):
    return RegressionSelector(Predictions(), **{"probes": 10, "ratio": 0.5, **settings})


def arms():
    return UCBSelector(pulls=2, at_once=1, probes=3, controls=3, arms=1)


SELECTORS = {
    "uniform": (UniformSelector, None),
    "regression": (regression, None),
    "the best by regression": (lambda: regression(temperature=0.0), None),
    "arms": (arms, None),
    "arms of a prior's parts": (lambda: UCBSelector(pulls=2, probes=3, controls=3, arms=1, prior=SOME, parts=2), KNOWN),
    "a mixture": (lambda: MixtureSelector(probes=10), None),
    "a mixture of a prior's parts": (lambda: MixtureSelector(prior=SOME, parts=2, probes=10), KNOWN),
    "a mixture of two groups": (
        lambda: MixtureSelector({"a": 1.0, "b": 3.0}, floor=0.0, cap=9.0, probes=10),
        torch.arange(POOL) % 3 < 2,
    ),
    "a prior of a mixture": (lambda: PriorSelector(MixtureSelector(probes=10), SCORES, repeat=False), None),
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
    run = SelectionRun(make(), Values(), UniformSelector(), 0, source)
    may = torch.ones(POOL, dtype=torch.bool) if eligible is None else eligible
    for _ in range(9):
        play(run, BUDGET)
        uses = source.pool.uses[may]
        assert int(uses.max() - uses.min()) <= 1
        assert not source.pool.uses[~may].any()
    assert int(source.pool.uses.sum()) == 9 * BUDGET


def test_the_first_round_after_a_warm_up_takes_what_the_warm_up_left_of_the_eligible():
    source = a_source()
    run = SelectionRun(ScoredSelector(SOME, repeat=False), None, UniformSelector(), 3, source)
    for _ in range(6):
        play(run, BUDGET)
        uses = source.pool.uses[KNOWN]
        assert int(uses.max() - uses.min()) <= 1


@pytest.mark.parametrize("name", ["regression", "arms", "scores"])
def test_the_record_of_decisions_says_whose_turn_it_was(name, tmp_path):
    source = a_source()
    run = SelectionRun(SELECTORS[name][0](), Values(), UniformSelector(), 0, source)
    run.decisions = DecisionLedger(tmp_path)
    for _ in range(5):
        unused = set((source.pool.uses == 0).nonzero().flatten().tolist())
        play(run, BUDGET)
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


class Descending(Selector):
    """Chooses the largest ids, in descending order."""

    def select(self, round, budget):
        return round.candidates.flip(0)[:budget]


def test_leftovers_and_what_was_chosen_come_at_random_places():
    counts = torch.zeros(3, 6)
    for seed in range(600):
        source = a_source()
        source.pool.record_use(torch.arange(2, POOL))
        plan = play(SelectionRun(Descending(), None, UniformSelector(), 0, source, seed=seed), 6)
        assert plan.ids.sort().values.tolist() == [0, 1, 46, 47, 48, 49]
        for row, candidate in enumerate((0, 46, 49)):
            counts[row] += plan.ids == candidate
    assert (counts - 100).abs().max() < 4.5 * (600 * 5 / 36) ** 0.5  # four and a half standard deviations
