"""What a round will cost is said before training starts, by the clock, with the setting that caps it."""

import logging
import re
import time
import warnings

import pytest
import torch
from fakes import fake_context, random_source
from small_run import BATCH, SIMPLE, ProbingUniform, SmallLM, small_data, small_trainer

from liveselect.callbacks import DataSelection, Quad
from liveselect.callbacks.lines import say_price
from liveselect.grammar import InfluenceEstimator, SelectionWarning, SmallFit
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence, PMPInfluence
from liveselect.preserve import checksum
from liveselect.price import Price, price_of_round
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UCBSelector, UniformSelector


class Slow(InfluenceEstimator):
    """Takes a known time: 0.3 s for a fit, 0.1 s for a candidate."""

    def fit(self, model, round):
        time.sleep(0.3)
        return {}

    def score(self, model, batch):
        time.sleep(0.1 * len(batch["input_ids"]))
        return batch["id"].float()


class Costly(Slow):
    rehearsed = False


class Scaled(Costly):
    """Would take ten times as long to fit, five times to score, as its small copy; half of a fit is for 3 rounds."""

    def fit(self, model, round):
        with model.meter.phase("shared"):
            time.sleep(0.15)
        time.sleep(0.15)
        return {}

    def small_fit(self, round):
        return SmallFit(self, fit=10.0, phases={"shared": 1 / 3}, score=5.0)


@pytest.fixture
def stopped_clock(monkeypatch):
    """A clock on which only sleeping takes time."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now.pop() + seconds))


def regression(probes=12):
    return RegressionSelector(HashedRidgeRegressor(), probes=probes, ratio=0.5, min_spearman=None)


def said_by_run(folder, caplog, selection, steps=1):
    """What a short run says about the cost of a round: log lines, and warnings."""
    options = {**SIMPLE, "max_steps": steps, "precision": "32-true"}
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.INFO, logger="liveselect"):
        warnings.simplefilter("always")
        small_trainer(folder, [selection], **options).fit(SmallLM(), datamodule=small_data())
    texts = [str(each.message) for each in said if issubclass(each.category, SelectionWarning)]
    return [
        [text for text in lines if "are measured" in text or "is set to measure" in text]
        for lines in (caplog.messages, texts)
    ]


def slow_loss(model, batch):
    time.sleep(0.02 * len(batch["input_ids"]))
    return model.weight.sum() * batch["input_ids"].float().mean(1)


@pytest.mark.usefixtures("stopped_clock")
def test_measuring_and_training_are_priced_by_the_clock():
    context = fake_context(random_source(candidates=40), loss_fn=slow_loss)
    price = price_of_round(regression(), Slow(), context.live, context.round, 100)
    assert price.candidates == 12
    assert price.measuring_seconds == pytest.approx(0.3 + 12 * 0.1)
    assert price.training_seconds == pytest.approx(100 * 0.02)
    assert price.share == pytest.approx(1.5 / 3.5)


@pytest.mark.usefixtures("stopped_clock")
def test_what_is_not_rehearsed_is_priced_by_a_small_fit():
    context = fake_context(random_source(candidates=40), loss_fn=slow_loss)
    price = price_of_round(regression(), Scaled(), context.live, context.round, 100)
    assert price.measuring_seconds == pytest.approx(10 * 0.15 + 0.15 / 3 + 12 * 5 * 0.1)


@pytest.mark.parametrize(
    "estimator",
    [
        KFACInfluence(factor_examples=24, factors_every=2),
        PMPInfluence(steps=6, score_every=2, batch_size=2),
    ],
    ids=["k-fac", "pmp"],
)
def test_the_costliest_estimators_are_priced_before_training(tmp_path, caplog, estimator):
    round = fake_context(random_source(candidates=40)).round
    small = estimator.small_fit(round)
    assert (small.fit, small.score) == ((3.0, 3.0) if isinstance(estimator, PMPInfluence) else (1.0, 1.0))
    lines, texts = said_by_run(
        tmp_path, caplog, DataSelection(regression(), estimator, 2, 1, dirpath=tmp_path), steps=3
    )
    assert re.match(r"every 2 steps 12 candidates are measured: about [\d.]+ (s|min) beside", (lines + texts)[0])


@pytest.mark.parametrize(
    ("selector", "candidates"),
    [(regression(24), 24), (regression(500), 40), (ProbingUniform(), 6), (UniformSelector(), None)],
)
def test_candidates_are_counted_by_asking_and_nothing_changes(selector, candidates):
    source = random_source(candidates=40)
    model = torch.nn.Linear(1, 1)
    context = fake_context(
        source, model=model, loss_fn=lambda model, batch: model.weight.sum() + 0.0 * batch["id"].float()
    )
    before, state = checksum(model, context.live.optimizer), str(selector.state_dict())
    price = price_of_round(selector, Costly(), context.live, context.round, 100)
    assert (None if price is None else price.candidates) == candidates
    assert price is None or price.measuring_seconds is None
    assert (checksum(model, context.live.optimizer), str(selector.state_dict())) == (before, state)


def test_all_pulls_of_a_bandit_are_counted():
    source = random_source(candidates=4000, groups=torch.arange(4000) % 4, group_names=("a", "b", "c", "d"))
    context = fake_context(source)
    selector = UCBSelector(pulls=3, at_once=1, probes=2, controls=4)
    assert price_of_round(selector, Costly(), context.live, context.round, 100).candidates == 3 * 2 + 4


def test_a_run_says_what_a_round_will_cost_before_it_trains(tmp_path, caplog):
    selection = DataSelection(regression(), FirstOrderInfluence(sampled=2), 5000, 0, dirpath=tmp_path)
    lines, texts = said_by_run(tmp_path, caplog, selection)
    assert not texts
    expected = r"every 5,000 steps 12 candidates are measured: about [\d.]+ s beside .* of training \(\d+%\)"
    assert re.fullmatch(expected, lines[0])
    first_round = next(text for text in caplog.messages if text.startswith("round 0"))
    assert caplog.messages.index(lines[0]) < caplog.messages.index(first_round)


def test_more_than_half_of_the_time_is_a_warning_that_names_what_caps_it(tmp_path, caplog):
    lines, texts = said_by_run(tmp_path, caplog, DataSelection(regression(), Slow(), 2, 0, dirpath=tmp_path))
    assert not lines
    assert re.match(
        r"every 2 steps 12 candidates are measured: about 1\.\d s beside [\d.e-]+ s of training \(\d+%\)", texts[0]
    )
    for setting in ("max_overhead", "probes", "every_n_steps"):
        assert setting in texts[0]


def test_a_cap_that_is_set_is_said_and_is_no_reason_to_warn(tmp_path, caplog):
    selection = DataSelection(regression(), Slow(), 2, 0, dirpath=tmp_path, max_overhead=0.05)
    lines, texts = said_by_run(tmp_path, caplog, selection)
    assert not texts
    assert "; max_overhead=0.05 leaves time for about 0 of them" in lines[0]


def test_what_is_not_tried_before_is_not_priced(tmp_path, caplog):
    lines, texts = said_by_run(tmp_path, caplog, DataSelection(regression(), Costly(), 3, 0, dirpath=tmp_path))
    assert not texts
    assert lines == [
        "every 3 steps 12 candidates are measured: what that takes is known after the first round that measures"
    ]


def test_a_selection_that_measures_nothing_says_nothing(tmp_path, caplog):
    assert said_by_run(tmp_path, caplog, DataSelection(UniformSelector(), None, 3, 0, dirpath=tmp_path)) == [[], []]


def test_times_are_written_as_people_say_them(caplog):
    with caplog.at_level(logging.INFO, logger="liveselect"):
        say_price(Price(500, 14 * 60, 22 * 60), 1000, None)
        say_price(Price(500, 3.21, 7260), 1000, 0.1)
    assert caplog.messages == [
        "every 1,000 steps 500 candidates are measured: about 14 min beside 22 min of training (39%)",
        "every 1,000 steps 500 candidates are measured: about 3.2 s beside 2 h 1 min of training (0%)",
    ]


def test_more_probes_than_the_pool_has_are_reported(tmp_path, caplog):
    selection = DataSelection(regression(500), OneStepInfluence(), 2, dirpath=tmp_path, warmup_rounds=0)
    _, texts = said_by_run(tmp_path, caplog, selection)
    assert any("is set to measure 500 candidates (probes=500), and the pool holds 60" in text for text in texts)
    (note,) = selection.run.ledger.rounds[0].notes[:1]
    assert note == "no more than 60 candidates could be measured in this round, fewer than probes=500"
    quad = Quad(every_n_steps=2, pulls=20, dirpath=tmp_path)
    source = random_source(candidates=40, groups=torch.arange(40) % 4, group_names=("a", "b", "c", "d"))
    with pytest.warns(SelectionWarning, match=r"measure 176 candidates \(pulls=20 of probes=8 and controls=16\)"):
        quad.selector.check(fake_context(source).round, BATCH)
