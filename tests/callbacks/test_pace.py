"""Rounds that are spread over the training steps before them."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sampling import mostly_slow
from small_run import Place, ProbingUniform, SmallLM, Trace, rows, small_data, small_trainer
from two_ranks import trained as trained_on

from liveselect.callbacks import MATES, DataSelection
from liveselect.callbacks.ahead import PAUSE_SHARE, Governor, Pace
from liveselect.datamodules import SelectionDataModule
from liveselect.grammar import SelectionWarning
from liveselect.influence import OneStepInfluence, PMPInfluence
from liveselect.ledger import Ledger
from liveselect.measurement import Measurement, Question
from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import RegressionSelector, UniformSelector


def trained(folder, selector, estimator=None, ckpt_path=None, steps=14, data=None, **pace):
    """Train the small run; returns its trace and its ledger."""
    folder.mkdir(exist_ok=True)
    pl.seed_everything(1, verbose=False)
    selection = DataSelection(selector, estimator, every_n_steps=4, warmup_rounds=0, dirpath=folder, **pace)
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = small_trainer(folder, [Place(selection), selection, Trace(folder / "trace"), keep], max_steps=steps)
    trainer.fit(SmallLM(), datamodule=data or small_data(), ckpt_path=ckpt_path)
    return (folder / "trace").read_text().splitlines(), Ledger.read(folder / "ledger.jsonl")


def live() -> tuple[RegressionSelector, OneStepInfluence]:
    return (
        RegressionSelector(HashedRidgeRegressor(), probes=12, ratio=0.5, min_spearman=None),
        OneStepInfluence(step="in_batch"),
    )


@pytest.mark.parametrize(
    "pace", [{"probes_between_steps": 2}, {"max_overhead": 10.0}], ids=lambda pace: next(iter(pace))
)
def test_measuring_between_steps_leaves_training_as_it_was(tmp_path, pace):
    probing = ProbingUniform()
    spread, ledger = trained(tmp_path / "on", probing, OneStepInfluence(), **pace)
    assert spread == trained(tmp_path / "off", UniformSelector())[0]
    assert len(probing.influence) == 4
    ages = [record.metrics.get("staleness/max", 0.0) for record in ledger.rounds]
    assert ages[0] == 0  # nothing was trained on before the first round
    assert all(0 < age < 4 for age in ages[1:3])


def test_the_measurements_are_those_of_the_steps_at_which_they_were_made(tmp_path):
    blocking, spread = ProbingUniform(), ProbingUniform()
    trained(tmp_path / "blocking", blocking, OneStepInfluence())
    trained(tmp_path / "spread", spread, OneStepInfluence(), probes_between_steps=3)
    assert torch.equal(blocking.influence[0], spread.influence[0])
    assert not torch.equal(blocking.influence[1], spread.influence[1])  # of the model two and three steps earlier


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *trained(folder, *live(), probes_between_steps=4)


@pytest.mark.parametrize("step", mostly_slow([1, 4, 5, 7, 8, 11], [4, 7, 11]))
def test_a_run_that_is_resumed_anywhere_measures_and_trains_as_if_it_had_not_stopped(whole, tmp_path, step):
    folder, trace, ledger = whole
    resumed, again = trained(tmp_path, *live(), ckpt_path=folder / f"step={step}.ckpt", probes_between_steps=4)
    assert resumed == trace[3 * step :]
    assert [record.influence for record in again.rounds] == [record.influence for record in ledger.rounds]
    assert [record.measured for record in again.rounds] == [record.measured for record in ledger.rounds]


def test_a_spread_round_measures_all_that_was_asked(whole):
    _, _, ledger = whole
    assert [len(record.measured) for record in ledger.rounds] == [12, 12, 12, 12]
    assert all(record.total_seconds > 0 for record in ledger.rounds)
    assert ledger.ahead_seconds == 0


@pytest.mark.parametrize(
    "pace", [{"probes_between_steps": 5}, {"max_overhead": 0.5}], ids=lambda pace: next(iter(pace))
)
def test_two_ranks_measure_ahead_as_one(tmp_path, pace):
    (rounds, ids), (other_rounds, other_ids) = trained_on(tmp_path, 2, **pace)
    assert rounds == other_rounds
    assert ids == other_ids


def simulated(share, rounds, steps=100, step_seconds=1.0, cost=0.3, fixed=2.0, once=30.0):
    """Play rounds against the clock: what opening the data took, an end of each round, probes at the governor's pace.

    Returns the seconds of training and of selection, and the longest pause.
    """
    pace, governor = Pace(max_overhead=share), Governor(share)
    trained_seconds, spent, longest = 0.0, once, 0.0
    governor.begin_round(0.0, spent, 0.0)
    for _ in range(rounds):
        ahead = Measurement(None, UniformSelector())
        for step in range(1, steps):
            trained_seconds += step_seconds
            left = governor.left(trained_seconds, spent, step / steps)
            number = pace.affordable(ahead, left, PAUSE_SHARE * steps * step_seconds)
            question = Question.about(torch.zeros(number, dtype=torch.int64))
            question.steps += 1
            ahead.questions.append(question)
            ahead.meter.seconds["measure"] += number * cost
            spent += number * cost
            longest = max(longest, number * cost)
        trained_seconds, spent = trained_seconds + step_seconds, spent + fixed
        governor.begin_round(trained_seconds, spent, fixed)
    return trained_seconds, spent, longest


@pytest.mark.parametrize("cost", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_long_run_keeps_its_share_within_a_tenth(share, cost):
    # the first blocking pauses included, as well as the ends of rounds
    trained_seconds, spent, longest = simulated(share, 60, cost=cost)
    assert 0.9 * share < spent / trained_seconds < 1.1 * share
    assert longest <= max(1.0, cost)


def test_rounds_become_longer_where_choosing_alone_takes_most_of_the_share():
    governor = Governor(0.05)
    governor.begin_round(0.0, 0.0, 0.0)
    assert governor.begin_round(100.0, 1.0, 1.0) == pytest.approx(1 / 2.5)  # half of 5 s would be enough
    assert governor.begin_round(200.0, 11.0, 10.0) == pytest.approx(4.0)


def test_rounds_become_longer_for_a_fit_as_long_as_that_makes_it_cheaper():
    governor = Governor(0.05)
    governor.begin_round(0.0, 0.0, 0.0)
    assert governor.begin_round(100.0, 5.0, 1.0, fitting=4.0) == pytest.approx(2.0)
    # a round twice as long whose fit is, too: the part of it that does not grow is no more than the shortest
    assert governor.begin_round(300.0, 15.0, 1.0, fitting=8.0) == pytest.approx(1.0)


def test_longer_rounds_are_recorded_and_trained_on_and_resumed(tmp_path):
    def data():
        return SelectionDataModule(pool=rows(600, 1), reference=rows(6, 2), batch_size=2, probe_batch_size=4)

    _, ledger = trained(tmp_path, *live(), max_overhead=1e-4, steps=26, data=data())
    lengths = [record.chosen // 6 for record in ledger.rounds]
    assert lengths[0] == 4 < max(lengths)
    assert [record.step for record in ledger.rounds] == [sum(lengths[:i]) for i in range(len(lengths))]
    (note, *_) = (note for record in ledger.rounds for note in record.notes if "pays for choosing it" in note)
    assert "max_overhead=0.0001; rounds to come are that long" in note
    step = ledger.rounds[-1].step
    checkpoint = tmp_path / f"step={step}.ckpt"
    _, again = trained(tmp_path / "on", *live(), checkpoint, max_overhead=1e-4, steps=26, data=data())
    assert [record.step for record in again.rounds] == [record.step for record in ledger.rounds]


def test_what_was_not_measured_in_time_is_said(tmp_path):
    _, ledger = trained(tmp_path, *live(), max_overhead=1e-9)
    assert "12 of 12 candidates were not measured" not in " ".join(ledger.rounds[0].notes)  # the first is blocking
    for record in ledger.rounds[1:]:
        assert any("measured within max_overhead=1e-09" in note for note in record.notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes_between_steps": 0}, "probes_between_steps of at least 1"),
        ({"probes_between_steps": 1.5}, "probes_between_steps of DataSelection to be a whole number"),
        ({"max_overhead": 0.0}, "max_overhead, a share of the training time, above 0"),
        ({"max_overhead": 0.1, "probes_between_steps": 2}, "got both"),
        ({"max_overhead": 0.1, "estimator": PMPInfluence()}, "PMPInfluence measures from one state of the model"),
    ],
    ids=["no probe", "half a probe", "no share", "both", "from one state"],
)
def test_a_pace_that_means_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataSelection(UniformSelector(), **arguments)


def test_a_share_above_one_is_warned_of():
    with pytest.warns(SelectionWarning, match="max_overhead=10 lets selection take 10 times as long as training"):
        DataSelection(UniformSelector(), max_overhead=10)


def test_presets_take_a_pace():
    assert MATES(regressor=HashedRidgeRegressor(), max_overhead=0.05).ahead.pace == Pace(max_overhead=0.05)
