"""Curves, names and files of the runs in a report."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from report.ledgers import ledger_of

from liveselect.ledger import Ledger
from liveselect.report import build_page
from liveselect.report.runs import Run, choose_metric, load_runs, reaches, value_at


def test_a_value_between_two_points_lies_on_the_straight_line():
    curve = [(0.0, 4.0), (2.0, 2.0), (6.0, 0.0)]
    assert [value_at(curve, x) for x in (0, 1, 2, 4, 6)] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert value_at(curve, 7) is None
    assert value_at([(3.0, 1.0)], 3.0) == 1.0
    assert value_at([], 3.0) is None


def test_reaching_a_level_inverts_the_value_at_a_place():
    curve = [(0.0, 4.0), (2.0, 2.5), (6.0, 1.0)]
    for level in (3.9, 2.5, 1.7, 1.0):
        assert value_at(curve, reaches(curve, level)) == pytest.approx(level)
    assert reaches(curve, 0.5) is None
    assert reaches(curve, 5.0) == 0.0


def test_a_round_is_paid_by_the_steps_after_it_and_the_loss_is_level_while_it_runs():
    ledger = ledger_of("RegressionSelector", [5.0], round_seconds=4.0)
    ledger.rounds.append(ledger_of("RegressionSelector", [5.0, 5.0], round_seconds=7.0).rounds[1])  # ran at step 10
    ledger.evaluations.clear()
    ledger.evaluate(10, {"val_loss": 5.0})
    ledger.training_seconds += 10.0
    ledger.evaluate(20, {"val_loss": 4.0})
    assert Run("run", ledger).curve("val_loss", "seconds") == [(14.0, 5.0), (21.0, 5.0), (31.0, 4.0)]
    assert Run("run", ledger).curve("val_loss", "step") == [(10.0, 5.0), (20.0, 4.0)]


def test_total_cost_of_the_last_evaluation_is_that_of_the_run():
    run = Run("run", ledger_of("RegressionSelector", [5.0, 4.0, 3.0], round_seconds=2.0))
    assert run.curve("val_loss", "seconds")[-1][0] == pytest.approx(run.total_seconds) == 36.0
    assert run.curve("val_loss", "flops")[-1][0] == pytest.approx(run.total_flops) == 3600.0


def test_what_was_spent_before_training_comes_before_every_loss_and_has_its_lines_in_the_page():
    run = Run("pds", ledger_of("ScoredSelector", [5.0, 4.0]))
    without = run.curve("val_loss", "seconds")
    run.ledger.before_seconds, run.ledger.before_flops = (
        {"train the proxy": 30.0, "pull back": 12.0},
        {"pull back": 7.0},
    )
    assert run.curve("val_loss", "seconds") == [(x + 42.0, y) for x, y in without]
    assert run.curve("val_loss", "flops")[-1][0] == pytest.approx(run.total_flops) == 2007.0
    page = build_page([run])
    assert "<td>before training: train the proxy</td><td>30 s</td>" in page
    assert "<td>before training: pull back</td><td>12 s</td>" in page


def test_a_baseline_is_what_compared_no_scores_and_measured_nothing_whoever_made_it():
    own, mates = ledger_of("MyOwnDraw", [5.0, 4.0]), ledger_of("RegressionSelector", [5.0, 4.0])
    for record in mates.rounds:
        assert record.histogram is not None
        assert record.measured
    own.rounds[:] = [
        replace(record, selector="MyOwnDraw") for record in ledger_of("UniformSelector", [5.0, 4.0]).rounds
    ]
    assert Run("own", own).is_random
    assert Run("own", own).method == "MyOwnDraw"
    assert Run("plain", ledger_of("UniformSelector", [5.0])).method == "random"
    assert not Run("mates", mates).is_random
    for changes in ({"measured": [1]}, {"overheard": [1]}, {"histogram": mates.rounds[0].histogram}):
        assert not Run("own", replace(own, rounds=[*own.rounds, replace(own.rounds[0], **changes)])).is_random
    armed = replace(own.rounds[0], groups={"arm": {"available": 1, "measured": 0, "chosen": 1, "reward": 0.5}})
    assert not Run("own", replace(own, rounds=[armed])).is_random


def test_a_run_in_its_warm_up_and_a_replay_are_no_baseline():
    drawn = ledger_of("UniformSelector", [5.0, 4.0])
    for about in ({"preset": "MATES", "selector": "RegressionSelector"}, {"preset": "Replay"}):
        assert not Run("run", replace(drawn, about=about)).is_random
    assert Run("old", replace(drawn, about={})).is_random
    assert not Run("not begun", Ledger(about=drawn.about)).is_random


def test_losses_that_are_not_finite_are_left_out_of_curves():
    run = Run("run", ledger_of("UniformSelector", [5.0, math.nan, math.inf, 3.0]))
    assert [y for _, y in run.curve("val_loss", "step")] == [5.0, 3.0]


def test_the_validation_loss_is_preferred_and_the_training_loss_is_never_taken_for_one():
    run = Run("run", Ledger())
    assert choose_metric([run]) is None
    run.ledger.evaluate(1, {"train_loss": 1.0, "reference_loss": 2.0})
    assert choose_metric([run]) == "reference_loss"
    run.ledger.evaluations.clear()
    run.ledger.evaluate(1, {"reference_loss": 2.0, "val_loss": 1.0})
    assert choose_metric([run]) == "val_loss"


def test_runs_are_found_at_any_depth_and_named_by_what_tells_them_apart(tmp_path):
    for folder in ("a/selection", "b/selection"):  # where DataSelection puts it
        ledger_of("UniformSelector", [1.0]).write(tmp_path / folder / "ledger.jsonl")
    assert [run.name for run in load_runs([tmp_path])] == ["a", "b"]
    assert [run.name for run in load_runs([tmp_path / "a" / "selection" / "ledger.jsonl"])] == ["a"]
    assert len(load_runs([tmp_path, tmp_path / "a"])) == 2  # the same file twice is one run
    ledger_of("UniformSelector", [1.0]).write(tmp_path / "c" / "b" / "ledger.jsonl")
    assert [run.name for run in load_runs([tmp_path])][1:] == [f"{tmp_path.name}/b", "c/b"]


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_place_without_a_ledger_is_refused_with_what_was_expected(tmp_path: Path, kind):
    path = tmp_path / "missing" if kind == "missing" else tmp_path
    with pytest.raises(FileNotFoundError, match=r"expected .*folder"):
        load_runs([path])


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"kind": "run", "odd": 1}', "[1]"])
def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path: Path, content):
    path = tmp_path / "ledger.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"ledger\.jsonl is not a ledger"):
        load_runs([path])


def test_texts_with_exotic_line_ends_survive_the_file(tmp_path: Path):
    text = "one\u2028two\x85three\x0cfour\r\nfive"
    ledger_of("UniformSelector", [1.0], text=text).write(tmp_path / "ledger.jsonl")
    assert load_runs([tmp_path])[0].ledger.rounds[0].examples[0].text == text
