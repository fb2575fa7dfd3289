"""Measuring piece by piece, saved and continued, is measuring in one go."""

import io
import math
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import Bigrams
from fakes import fake_context, random_source
from ranks import on_ranks
from torch import Tensor

from liveselect import distributed
from liveselect import measurement as measurement_module
from liveselect.grammar import NO_IDS, Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, Selector
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.measurement import Measurement
from liveselect.pool import CandidatePool
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun, finish_round, run_round
from liveselect.selectors import RegressionSelector, UCBSelector, UniformSelector

BUDGET = 6


def regression() -> RegressionSelector:
    return RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)


def bandit() -> UCBSelector:
    return UCBSelector(pulls=4, at_once=2, probes=2, controls=3, arms=2)


class Counts(InfluenceEstimator):
    """Calls a candidate's id its influence, counts its fits, and keeps no state."""

    fits = 0

    def fit(self, model: LiveModel, round: Round) -> dict[str, float]:
        self.fits += 1
        return {"step": float(round.step)}

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        return batch["id"].float()


class Lasts(Counts):
    fit_lasts = True


class Keeps(Counts):
    """Remembers something between rounds, which says nothing about how long a fit lasts."""

    def state_dict(self):
        return {"fits": self.fits}

    def load_state_dict(self, state):
        self.fits = state["fits"]


class KeepsAndLasts(Keeps):
    fit_lasts = True


def a_context():
    codes = torch.arange(60) % 4
    source = random_source(candidates=60, vocab=50, rows=5)
    source.pool = CandidatePool(60, "grouped", codes, ("a", "b", "c", "d"))
    model = Bigrams()
    return fake_context(source, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))


def at(context, step: int) -> Round:
    """The round as it is at another optimizer step."""
    return replace(context.round, step=step)


def a_run(selector, estimator, context) -> SelectionRun:
    return SelectionRun(selector, estimator, UniformSelector(), 0, context.source)


@pytest.mark.parametrize("selector", [regression, bandit], ids=["regression", "bandit"])
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_in_pieces_with_a_model_that_stands_still_it_finds_what_it_finds_in_one_go(selector, limit):
    whole, parts = a_context(), a_context()
    expected = a_run(selector(), OneStepInfluence(), whole)
    run_round(expected, whole.live, whole.round, BUDGET)
    run = a_run(selector(), OneStepInfluence(), parts)
    measurement = Measurement(run.estimator, run.selector)
    while not measurement.complete:
        measurement.advance(parts.live, parts.round, limit)
    finish_round(run, measurement, parts.live, parts.round, BUDGET)
    first, second = expected.ledger.rounds[0], run.ledger.rounds[0]
    assert (first.measured, first.influence, first.plan) == (second.measured, second.influence, second.plan)


def saved(run: SelectionRun) -> dict:
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("selector", [regression, bandit], ids=["regression", "bandit"])
@pytest.mark.parametrize("estimator", [KFACInfluence, FirstOrderInfluence, OneStepInfluence], ids=lambda e: e.__name__)
@pytest.mark.parametrize("pieces", [0, 1, 2, 3, 4])
def test_a_measurement_that_was_saved_continues_where_it_was(selector, estimator, pieces):
    def measure(stop_after):
        context = a_context()
        run = a_run(selector(), estimator(), context)
        run.ahead = run.measurement()
        number = 0
        while not run.ahead.complete:
            if number == stop_after:
                state = saved(run)
                run = a_run(selector(), estimator(), context)
                run.load_state_dict(state)
            with torch.no_grad():  # training goes on
                next(context.model.parameters()).mul_(1.01)
            run.ahead.advance(context.live, at(context, number), limit=4)
            number += 1
        finish_round(run, run.ahead, context.live, at(context, number), BUDGET)
        return run.ledger.rounds[0], run.plan

    whole, plan = measure(stop_after=None)
    resumed, plan_again = measure(stop_after=pieces)
    assert (resumed.measured, resumed.influence) == (whole.measured, whole.influence)
    assert resumed.metrics == whole.metrics
    assert torch.equal(plan_again.ids, plan.ids)


def test_saving_a_restored_measurement_before_it_goes_on_loses_nothing():
    context = a_context()
    run = a_run(regression(), Keeps(), context)
    run.ahead = run.measurement()
    run.ahead.advance(context.live, context.round, 4)
    states = [saved(run)]
    for _ in range(2):
        run = a_run(regression(), Keeps(), context)
        run.load_state_dict(states[-1])
        states.append(saved(run))
    run.ahead.advance(context.live, context.round)
    assert run.ahead.measured == 13
    assert [int((question["steps"] >= 0).sum()) for question in states[-1]["ahead"]["questions"]] == [4]


@pytest.mark.parametrize(("estimator", "fits"), [(Counts, 4), (Keeps, 4), (Lasts, 1), (KeepsAndLasts, 1)])
def test_what_holds_at_one_step_only_is_fitted_at_every_step_at_which_it_measures(estimator, fits):
    context, estimator = a_context(), estimator()
    measurement = Measurement(estimator, regression())
    for step in (0, 3, 3, 5, 8):
        measurement.advance(context.live, at(context, step), limit=3)
    assert estimator.fits == fits
    assert torch.equal(measurement.influence, measurement.ids.float())
    assert measurement.steps.tolist() == 3 * [0] + 6 * [3] + 3 * [5] + [8]


class Saves(Lasts):
    def fitted_state(self):
        return None if not self.fits else {"fitted": True}


@pytest.mark.parametrize(("estimator", "fits"), [(Counts, 2), (Keeps, 2), (Lasts, 2), (Saves, 1)])
def test_a_fit_that_a_checkpoint_does_not_hold_is_made_again(estimator, fits):
    context = a_context()
    run = a_run(regression(), estimator(), context)
    run.ahead = run.measurement()
    run.ahead.advance(context.live, context.round, 4)
    resumed = a_run(regression(), estimator(), context)
    resumed.load_state_dict(saved(run))
    before = resumed.estimator.fits  # some count those of the first process, too
    resumed.ahead.advance(context.live, context.round)
    assert run.estimator.fits + resumed.estimator.fits - before == fits
    assert resumed.ahead.measured == 13


@pytest.mark.parametrize("estimator", [Counts, Lasts])
def test_what_the_last_fit_reported_is_recorded_also_when_nothing_is_left_to_measure_after_a_resume(estimator):
    context = a_context()
    run = a_run(regression(), estimator(), context)
    run.ahead = run.measurement()
    for step in (0, 3):
        run.ahead.advance(context.live, at(context, step), 12)
    assert run.ahead.measured == 13
    resumed = a_run(regression(), estimator(), context)
    resumed.load_state_dict(saved(run))
    for one in (run, resumed):
        one.ahead.advance(context.live, at(context, 4))
        context.source.pool.uses.zero_()  # both runs have this pool
        finish_round(one, one.ahead, context.live, at(context, 4), BUDGET)
    assert resumed.ledger.rounds[0].metrics == run.ledger.rounds[0].metrics
    assert resumed.ledger.rounds[0].metrics["step"] == {Counts: 3.0, Lasts: 0.0}[estimator]


def test_the_record_says_how_old_the_measurements_are():
    context = a_context()
    run = a_run(regression(), Counts(), context)
    measurement = Measurement(run.estimator, run.selector)
    measurement.advance(context.live, at(context, 2), limit=10)
    measurement.advance(context.live, at(context, 6))
    finish_round(run, measurement, context.live, at(context, 10), BUDGET)
    metrics = run.ledger.rounds[0].metrics
    assert metrics["staleness/max"] == 8
    assert metrics["staleness/mean"] == pytest.approx((10 * 8 + 3 * 4) / 13)


def test_a_measurement_that_is_cut_reports_what_it_knows():
    context = a_context()
    run = a_run(regression(), Counts(), context)
    measurement = Measurement(run.estimator, run.selector)
    measurement.advance(context.live, context.round, limit=9)
    assert measurement.cut(context.round) == 4
    finish_round(run, measurement, context.live, context.round, BUDGET)
    record = run.ledger.rounds[0]
    assert record.metrics["measured"] == 9
    assert len(record.measured) == 13
    assert sum(map(math.isfinite, record.influence)) == 9


def test_steps_at_which_nothing_can_be_measured_cost_their_candidates_only():
    class Moody(Counts):
        def fit(self, model: LiveModel, round: Round) -> dict[str, float]:
            if round.step == 1:
                raise NotMeasurableError("the reference loss is nan")
            return super().fit(model, round)

    context = a_context()
    run = a_run(regression(), Moody(), context)
    measurement = Measurement(run.estimator, run.selector)
    for step in range(4):
        measurement.advance(context.live, at(context, step), limit=4)
    assert measurement.influence.isnan().tolist() == 4 * [False] + 4 * [True] + 5 * [False]
    finish_round(run, measurement, context.live, context.round, BUDGET)
    assert run.ledger.rounds[0].notes[0] == "not everything could be measured: the reference loss is nan"


def test_a_selector_that_asks_something_else_after_a_resume_is_refused():
    class Fickle(RegressionSelector):
        def propose(self, round: Round) -> Tensor:
            return super().propose(replace(round, seed=round.seed + self.probes))

    context = a_context()
    run = a_run(Fickle(HashedRidgeRegressor(), probes=8), Counts(), context)
    run.ahead = run.measurement()
    run.ahead.advance(context.live, context.round, 4)
    other = a_run(Fickle(HashedRidgeRegressor(), probes=9), Counts(), context)
    other.load_state_dict(saved(run))
    with pytest.raises(RuntimeError, match="does not propose what it proposed before the checkpoint"):
        other.ahead.advance(context.live, context.round, 4)


class Slow(Counts):
    """Measures slowly on rank 1: over the whole question it falls further behind than the process group waits."""

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        time.sleep(0.025 * len(batch["id"]) * distributed.rank())
        return super().score(model, batch)


class AtOnce(Counts):
    """Measures many candidates for less than batch by batch, and remembers how many it was asked for."""

    at_once = True

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        raise AssertionError("score_ids was to be asked")

    def score_ids(self, model: LiveModel, round: Round, ids: Tensor) -> Tensor:
        self.asked.append(len(ids))
        return ids.double()


def _measured_at_once() -> tuple[list[int], bool]:
    measurement_module.CANDIDATES_PER_BARRIER = 3
    estimator = AtOnce()
    measurement = Measurement(estimator, regression())
    context = a_context()
    measurement.advance(context.live, context.round)
    return estimator.asked, torch.equal(measurement.influence, measurement.ids.float())


def test_an_estimator_that_measures_many_candidates_at_once_is_asked_to_in_parts_that_ranks_wait_for(monkeypatch):
    monkeypatch.setattr(measurement_module, "CANDIDATES_PER_BARRIER", measurement_module.CANDIDATES_PER_BARRIER)
    assert _measured_at_once() == ([3, 3, 3, 2, 2], True)
    assert on_ranks(_measured_at_once, 2) == [([3, 2, 2], True), ([2, 2, 2], True)]  # seven and six of thirteen


def _measured_on_this_rank() -> list[float]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    source = random_source(candidates=330, rows=7)
    selector = RegressionSelector(HashedRidgeRegressor(), probes=323)
    measurement = Measurement(Slow(), selector)
    context = fake_context(source)
    measurement.advance(context.live, context.round)
    return measurement.influence.tolist()


def test_a_round_on_ranks_of_unequal_speed_may_take_longer_than_the_process_group_waits():
    first, second = on_ranks(_measured_on_this_rank, 2)
    assert first == second
    assert len(first) == 323


class Wrong(InfluenceEstimator):
    """Returns what is no influence of each candidate."""

    def __init__(self, fit=None, score=None, at_once=False):
        self.returned, self.scored, self.at_once = fit, score, at_once

    def fit(self, model, round):
        return self.returned

    def score(self, model, batch):
        return self.scored

    def score_ids(self, model, round, ids):
        return self.scored


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    "scored", [[1.0, 2.0], torch.zeros(1), torch.zeros(9, 1), None], ids=["list", "one", "column", "nothing"]
)
def test_what_is_not_one_influence_for_each_candidate_is_refused(scored, at_once):
    with pytest.raises(ValueError, match=r"Wrong.score(_ids)? to return one influence for each of \d+ candidates"):
        measured(Wrong({}, scored, at_once))


def test_a_fit_that_returns_nothing_is_refused():
    with pytest.raises(TypeError, match=r"a mapping of metrics, \{\} for none, got NoneType"):
        measured(Wrong(None, torch.zeros(9)))


def measured(estimator, proposed=range(9)):
    class Asks(Selector):
        asked = False

        def propose(self, round):
            if self.asked:
                return NO_IDS
            self.asked = True
            return torch.tensor(proposed)

        def observe(self, ids, influence):
            self.seen = ids.tolist(), influence.tolist()

        def select(self, round, budget):
            return round.candidates[:budget]

    context, selector = fake_context(random_source()), Asks()
    Measurement(estimator, selector).advance(context.live, context.round)
    return selector.seen


def test_what_is_proposed_twice_is_measured_and_reported_once_where_it_was_first_named():
    class Ids(InfluenceEstimator):
        def score(self, model, batch):
            return batch["id"].float()

    assert measured(Ids(), [7, 3, 7, 7, 1, 3]) == ([7, 3, 1], [7.0, 3.0, 1.0])
