"""Measuring piece by piece, saved and continued, is measuring in one go."""

import copy
import io
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from fakes import Bigrams, fake_context, random_source
from ranks import on_ranks
from torch import Tensor

from liveselect import distributed
from liveselect import measurement as measurement_module
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.measurement import Measurement
from liveselect.pool import CandidatePool
from liveselect.protocols import Batch, NotMeasurableError, RoundContext
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun, finish_round, run_round
from liveselect.selectors import RegressionSelector, UCBSelector, UniformSelector

BUDGET = 6


def regression() -> RegressionSelector:
    return RegressionSelector(HashedRidgeRegressor(), probes=13, ratio=0.5, min_spearman=None)


def bandit() -> UCBSelector:
    return UCBSelector(pulls=4, at_once=2, probes=2, controls=3, arms=2)


class Counts:
    """Calls a candidate's id its influence, counts its fits, and keeps no state."""

    fits = 0

    def fit(self, context: RoundContext) -> dict[str, float]:
        self.fits += 1
        return {}

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        return batch["id"].float()


class Lasts(Counts):
    fit_lasts = True


class Keeps(Counts):
    def state_dict(self):
        return {"fits": self.fits}

    def load_state_dict(self, state):
        self.fits = state["fits"]


def a_context():
    codes = torch.arange(60) % 4
    source = random_source(candidates=60, vocab=50, rows=5)
    source.pool = CandidatePool(60, "grouped", codes, ("a", "b", "c", "d"))
    model = Bigrams()
    return fake_context(source, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))


def a_run(selector, estimator, context) -> SelectionRun:
    return SelectionRun(selector, estimator, UniformSelector(), 0, context.source.pool)


@pytest.mark.parametrize("selector", [regression, bandit], ids=["regression", "bandit"])
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_in_pieces_with_a_model_that_stands_still_it_finds_what_it_finds_in_one_go(selector, limit):
    whole, parts = a_context(), a_context()
    expected = a_run(selector(), OneStepInfluence(), whole)
    run_round(expected, whole, BUDGET)
    run = a_run(selector(), OneStepInfluence(), parts)
    measurement = Measurement(run.estimator, run.selector)
    while not measurement.complete:
        measurement.advance(parts, limit)
    finish_round(run, measurement, parts, BUDGET)
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
        run.ahead = Measurement(run.estimator, run.selector)
        run.ahead.remember()
        number = 0
        while not run.ahead.complete:
            if number == stop_after:
                state = saved(run)
                run = a_run(selector(), estimator(), context)
                run.load_state_dict(state)
            with torch.no_grad():  # training goes on
                next(context.model.parameters()).mul_(1.01)
            run.ahead.advance(replace(context, step=number), limit=4)
            number += 1
        finish_round(run, run.ahead, replace(context, step=number), BUDGET)
        return run.ledger.rounds[0], run.plan

    whole, plan = measure(stop_after=None)
    resumed, plan_again = measure(stop_after=pieces)
    assert (resumed.measured, resumed.influence) == (whole.measured, whole.influence)
    assert resumed.metrics == whole.metrics
    assert torch.equal(plan_again.ids, plan.ids)


def test_saving_a_restored_measurement_before_it_goes_on_loses_nothing():
    context = a_context()
    run = a_run(regression(), Keeps(), context)
    run.ahead = Measurement(run.estimator, run.selector)
    run.ahead.remember()
    run.ahead.advance(context, 4)
    states = [saved(run)]
    for _ in range(2):
        run = a_run(regression(), Keeps(), context)
        run.load_state_dict(states[-1])
        states.append(saved(run))
    run.ahead.advance(context)
    assert run.ahead.measured == 13
    assert [int((steps >= 0).sum()) for steps in states[-1]["ahead"]["steps"]] == [4]


@pytest.mark.parametrize(("estimator", "fits"), [(Counts, 4), (Keeps, 1), (Lasts, 1)])
def test_what_holds_at_one_step_only_is_fitted_at_every_step_at_which_it_measures(estimator, fits):
    context, estimator = a_context(), estimator()
    measurement = Measurement(estimator, regression())
    for step in (0, 3, 3, 5, 8):
        measurement.advance(replace(context, step=step), limit=3)
    assert estimator.fits == fits
    assert torch.equal(measurement.influence[0], measurement.ids[0].float())
    assert measurement.steps[0].tolist() == 3 * [0] + 6 * [3] + 3 * [5] + [8]


def test_the_record_says_how_old_the_measurements_are():
    context = a_context()
    run = a_run(regression(), Counts(), context)
    measurement = Measurement(run.estimator, run.selector)
    measurement.advance(replace(context, step=2), limit=10)
    measurement.advance(replace(context, step=6))
    finish_round(run, measurement, replace(context, step=10), BUDGET)
    metrics = run.ledger.rounds[0].metrics
    assert metrics["staleness/max"] == 8
    assert metrics["staleness/mean"] == pytest.approx((10 * 8 + 3 * 4) / 13)


def test_a_measurement_that_is_cut_tells_what_it_knows():
    context = a_context()
    run = a_run(regression(), Counts(), context)
    measurement = Measurement(run.estimator, run.selector)
    measurement.advance(context, limit=9)
    assert measurement.cut(context) == 4
    finish_round(run, measurement, context, BUDGET)
    record = run.ledger.rounds[0]
    assert record.metrics["measured"] == 9
    assert record.metrics["dropped"] == 4


def test_steps_at_which_nothing_can_be_measured_cost_their_candidates_only():
    class Moody(Counts):
        def fit(self, context: RoundContext) -> dict[str, float]:
            if context.step == 1:
                raise NotMeasurableError("the reference loss is nan")
            return super().fit(context)

    context = a_context()
    run = a_run(regression(), Moody(), context)
    measurement = Measurement(run.estimator, run.selector)
    for step in range(4):
        measurement.advance(replace(context, step=step), limit=4)
    assert measurement.influence[0].isnan().tolist() == 4 * [False] + 4 * [True] + 5 * [False]
    finish_round(run, measurement, context, BUDGET)
    assert run.ledger.rounds[0].notes[0] == "not everything could be measured: the reference loss is nan"


def test_a_selector_that_asks_something_else_after_a_resume_is_told_of():
    class Fickle(RegressionSelector):
        def propose(self, context: RoundContext) -> Tensor:
            return super().propose(copy.copy(replace(context, seed=context.seed + self.probes)))

    context = a_context()
    run = a_run(Fickle(HashedRidgeRegressor(), probes=8), Counts(), context)
    run.ahead = Measurement(run.estimator, run.selector)
    run.ahead.remember()
    run.ahead.advance(context, 4)
    other = a_run(Fickle(HashedRidgeRegressor(), probes=9), Counts(), context)
    other.load_state_dict(saved(run))
    with pytest.raises(RuntimeError, match="does not ask what it asked before the checkpoint"):
        other.ahead.advance(context, 4)


class Slow(Counts):
    """Measures slowly on rank 1: over the whole question it falls further behind than the process group waits."""

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        time.sleep(0.025 * len(batch["id"]) * distributed.rank())
        return super().score(context, batch)


class AtOnce(Counts):
    """Measures many candidates for less than batch by batch, and remembers how many it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        raise AssertionError("score_ids was to be asked")

    def score_ids(self, context: RoundContext, ids: Tensor) -> Tensor:
        self.asked.append(len(ids))
        return ids.double()


def _measured_at_once() -> tuple[list[int], bool]:
    measurement_module.TOGETHER = 3
    estimator = AtOnce()
    measurement = Measurement(estimator, regression())
    measurement.advance(a_context())
    return estimator.asked, torch.equal(measurement.influence[0], measurement.ids[0].float())


def test_an_estimator_that_measures_many_candidates_at_once_is_asked_to_in_parts_that_ranks_wait_for(monkeypatch):
    monkeypatch.setattr(measurement_module, "TOGETHER", measurement_module.TOGETHER)
    assert _measured_at_once() == ([3, 3, 3, 2, 2], True)
    assert on_ranks(_measured_at_once, 2) == [([3, 2, 2], True), ([2, 2, 2], True)]  # seven and six of thirteen


def _measured_on_this_rank() -> list[float]:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)
    source = random_source(candidates=330, rows=7)
    selector = RegressionSelector(HashedRidgeRegressor(), probes=323)
    measurement = Measurement(Slow(), selector)
    measurement.advance(fake_context(source))
    return measurement.influence[0].tolist()


def test_a_round_on_ranks_of_unequal_speed_may_take_longer_than_the_process_group_waits():
    first, second = on_ranks(_measured_on_this_rank, 2)
    assert first == second
    assert len(first) == 323
