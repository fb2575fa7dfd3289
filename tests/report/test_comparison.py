"""Intervals over pairs of seeds, and what is worth how much at equal total cost."""

import statistics

import pytest
from report.ledgers import ledger_of
from scipy import stats

from liveselect.report.comparison import Interval, Trial, markdown, over_seeds, rows_of, sentences, table
from liveselect.report.runs import Run
from liveselect.report.summary import summary_of

LABELS = {"val_loss": "held-out loss", "mixture_loss": "pool's mixture"}


def trial(method, seed, losses, task="law", round_seconds=0.0, mixture=None):
    selector = "UniformSelector" if method == "random" else "RegressionSelector"
    ledger = ledger_of(selector, losses, round_seconds)
    for entry in ledger.evaluations if mixture is not None else []:
        entry.metrics["mixture_loss"] = mixture
    return Trial(task, method, seed, Run(method, ledger))


def only(rows, method):
    [found] = [row for row in rows if row.method == method]
    return found


def test_an_interval_is_that_of_a_t_test():
    values = [0.3, -0.1, 0.25, 0.2]
    found = Interval.of(values)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.clear == (stats.ttest_1samp(values, 0.0).pvalue < 0.05)


def test_one_seed_has_no_interval_and_is_never_clear():
    assert Interval.of([5.0]) == Interval(5.0, None, 1)
    assert not Interval.of([5.0]).clear
    assert Interval.of([]) is None


def test_what_seeds_have_in_common_cancels_in_their_pairs():
    hard, easy = [7.0, 6.0], [5.0, 4.0]
    trials = [trial("random", 0, hard), trial("random", 1, easy)]
    trials += [trial("live", 0, [7.0, 5.9]), trial("live", 1, [5.0, 3.9])]
    row = only(rows_of(trials, "random", ["val_loss"]), "live")
    assert row.differences["val_loss"].mean == pytest.approx(-0.1)
    assert row.differences["val_loss"].half == pytest.approx(0.0, abs=1e-9)
    assert row.loss.half > 1.0


def test_the_cost_of_selection_is_taken_off_before_runs_are_compared():
    """A round as dear as ten steps: at the baseline's total of 30 steps the run has trained 10."""
    trials = [trial("random", 0, [6.0, 5.0, 4.5]), trial("live", 0, [6.0, 4.0, 2.0], round_seconds=10.0)]
    row = only(rows_of(trials, "random", ["val_loss"]), "live")
    assert (row.loss.mean, row.end.mean) == (6.0, 2.0)
    assert row.differences["val_loss"].mean == 1.5
    assert row.in_time.mean == 1.5
    assert row.cost["seconds"] == 0.5


def test_the_share_at_which_the_baseline_is_reached_is_where_the_curve_crosses_its_end():
    trials = [trial("random", 0, [6.0, 5.0, 4.5]), trial("live", 0, [5.0, 4.0, 3.0]), trial("bad", 0, [6.0, 6.0, 6.0])]
    rows = rows_of(trials, "random", ["val_loss"])
    assert only(rows, "live").share["flops"] == pytest.approx(0.5)  # halfway between 10 and 20 steps of 30
    assert only(rows, "bad").share["flops"] is None


def test_a_share_that_one_seed_never_reached_is_none():
    trials = [trial("random", 0, [6.0, 5.0]), trial("random", 1, [6.0, 5.0])]
    trials += [trial("live", 0, [5.0, 4.0]), trial("live", 1, [6.0, 5.5])]
    assert only(rows_of(trials, "random", ["val_loss"]), "live").share["flops"] is None


def test_a_run_without_its_pair_and_another_task_are_left_out():
    trials = [trial("random", 0, [6.0, 5.0]), trial("live", 0, [6.0, 4.0]), trial("live", 1, [6.0, 1.0])]
    trials += [trial("random", 0, [6.0, 3.0], task="code")]
    rows = rows_of(trials, "random", ["val_loss"])
    assert only(rows, "live").differences["val_loss"] == Interval(-1.0, None, 1)
    assert {(row.task, row.method) for row in rows} == {("law", "random"), ("law", "live"), ("code", "random")}


def test_the_table_has_a_cell_for_every_column_and_says_what_a_metric_lacks():
    trials = [trial("random", 0, [6.0, 5.0], mixture=4.0), trial("live", 0, [6.0, 4.0], mixture=4.5)]
    trials += [trial("old", 0, [6.0, 5.5])]
    cells = table(rows_of(trials, "random", list(LABELS)), "random", LABELS)
    assert len({len(row) for row in cells}) == 1
    place = cells[0].index("pool's mixture")
    assert [row[place] for row in cells[1:]] == ["–", "0.500", "–"]
    assert markdown(cells).count("\n") == len(cells) + 1


def test_defeat_and_chance_are_said_as_plainly_as_a_win():
    spread = [statistics.NormalDist().inv_cdf(share) for share in (0.2, 0.5, 0.8)]
    trials = [trial("random", seed, [6.0, 5.0]) for seed in range(3)]
    trials += [trial("better", seed, [6.0, 4.0 + 0.01 * spread[seed]]) for seed in range(3)]
    trials += [trial("worse", seed, [6.0, 5.5 + 0.01 * spread[seed]]) for seed in range(3)]
    trials += [trial("noise", seed, [6.0, 5.0 + spread[seed]]) for seed in range(3)]
    better, worse, noise = sentences(rows_of(trials, "random", ["val_loss"]), "random", "val_loss")
    assert "better has a lower loss by 1.000" in better
    assert "at 50% of its FLOPs" not in better  # it crosses 5.0 between 10 and 20 steps: at 15 of 20
    assert "at 75% of its FLOPs" in better
    assert "worse has a higher loss by 0.500" in worse
    assert "no more than chance" in noise


def test_a_report_of_several_seeds_says_what_they_say_together():
    def run(name, selector, seed, losses):
        ledger = ledger_of(selector, losses)
        ledger.about["seed"] = seed
        return Run(name, ledger)

    ends = [4.0, 4.2, 4.1]
    runs = [run(f"random {seed}", "UniformSelector", seed, [5.0, end]) for seed, end in enumerate(ends)]
    live = [run(f"live {seed}", "RegressionSelector", seed, [5.0, end - 0.3]) for seed, end in enumerate(ends)]
    [said] = over_seeds([*runs, *live], "val_loss")
    assert "has a lower loss by 0.300 nats per token" in said
    assert "3 seeds" in said
    assert over_seeds([runs[0], live[0]], "val_loss") == []
    assert said in summary_of([*runs, *live], "val_loss", [])["verdicts"]
