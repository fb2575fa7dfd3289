"""The verdict says what the numbers say, in both directions."""

import pytest
from report.ledgers import ledger_of

from liveselect.report import build_page
from liveselect.report.runs import Run
from liveselect.report.summary import summary_of
from liveselect.report.verdict import baseline_of, caveats, compare, headline, in_the_run, savings

RANDOM = Run("random", ledger_of("UniformSelector", [6.0, 5.0, 4.5]))


def chosen(losses, round_seconds=0.0):
    return Run("mates", ledger_of("RegressionSelector", losses, round_seconds))


def test_a_run_compared_with_itself_is_equal_everywhere():
    for axis in ("step", "seconds", "flops"):
        found = compare(RANDOM, RANDOM, "val_loss", axis)
        assert found is not None
        assert found.outcome == "equal"
        assert found.baseline == found.other == 4.5


def test_equal_cost_is_where_the_cheaper_run_ended():
    found = compare(RANDOM, chosen([6.0, 4.0, 2.0], round_seconds=10.0), "val_loss", "seconds")
    assert found is not None
    # 30 s: the other run has had its first 10 steps, its second round, and stands at the loss of step 10
    assert (found.at, found.baseline, found.other, found.outcome) == (30.0, 4.5, 6.0, "higher")


def test_the_headline_tells_that_a_win_in_steps_is_a_loss_in_time():
    said = headline([RANDOM, chosen([6.0, 4.0, 2.0], round_seconds=10.0)], "val_loss")
    assert "After 30 steps, mates has a lower val_loss than random: 2.000 against 4.500" in said
    assert "selection took 50% of its time, but at equal total time (30 s) it is higher: 6.000 against 4.500" in said


def test_the_headline_tells_a_defeat_as_plainly_as_a_win():
    said = headline([RANDOM, chosen([6.0, 5.5, 5.0])], "val_loss")
    assert "mates has a higher val_loss than random: 5.000 against 4.500" in said
    assert "and at equal total time" in said


def test_the_headline_tells_that_the_baseline_had_ended_before_selection_bore_fruit():
    run = chosen([6.0, 4.0, 2.0])
    run.ledger.before_seconds = {"train the proxy": 60.0}
    said = headline([RANDOM, run], "val_loss")
    assert "mates has a lower val_loss than random: 2.000 against 4.500" in said
    assert (
        "selection took 67% of its time, and random had ended (30 s) before it was evaluated first (1 min 10 s)" in said
    )


def test_the_baseline_is_the_random_run_wherever_it_stands():
    other = chosen([6.0, 4.0])
    assert baseline_of([other, RANDOM]) is RANDOM
    assert baseline_of([other]) is None
    assert headline([other, RANDOM], "val_loss") == headline([RANDOM, other], "val_loss")


def test_savings_are_where_the_other_run_crosses_the_last_loss_of_the_baseline():
    found = {axis: (end, there) for axis, end, there in savings(RANDOM, chosen([6.0, 3.0, 2.0]), "val_loss")}
    assert found["step"] == (30.0, pytest.approx(15.0))
    assert savings(RANDOM, chosen([6.0, 5.5, 5.0]), "val_loss") == []


def test_a_single_run_and_single_seeds_are_named_as_limits():
    assert any("Train the same with random data" in text for text in caveats([RANDOM], "val_loss"))
    assert any("one seed" in text for text in caveats([RANDOM, chosen([5.0])], "val_loss"))
    two_seeds = [RANDOM, Run("again", RANDOM.ledger), chosen([5.0])]
    assert not any("one seed" in text for text in caveats(two_seeds, "val_loss"))


def test_a_loss_that_rose_again_is_named():
    assert any("ends above its own best" in text for text in caveats([chosen([5.0, 4.0, 4.5])], "val_loss"))


def test_without_evaluations_nothing_is_claimed():
    empty = Run("empty", ledger_of("UniformSelector", []))
    assert "No evaluation" in headline([empty], None)
    assert "No evaluation" in headline([empty], "val_loss")
    diverged = Run("b", ledger_of("RegressionSelector", [float("nan"), float("inf")]))
    assert headline([diverged], "val_loss").startswith("val_loss was not a number in any evaluation")
    assert "not evaluated over the same steps" in headline([RANDOM, empty], "val_loss")


def test_times_of_a_machine_that_was_busier_in_one_run_are_not_compared_in_silence():
    busy, alike = chosen([6.0, 5.0, 4.0]), chosen([6.0, 5.0, 4.0])
    busy.ledger.training_seconds *= 2
    said = " ".join(caveats([RANDOM, busy], "val_loss"))
    assert "took 2.0 times as long in mates as in random" in said
    assert "Compare at equal FLOPs" in said
    assert "times as long" not in " ".join(caveats([RANDOM, alike], "val_loss"))
    assert "2.0 times as long in random as in mates" in " ".join(caveats([busy_random(), alike], "val_loss"))


def busy_random():
    run = Run("random", ledger_of("UniformSelector", [6.0, 5.0, 4.5]))
    run.ledger.training_seconds *= 2
    return run


def test_what_a_run_found_out_about_itself_stands_at_the_top():
    ledger = ledger_of("RegressionSelector", [3.0, 2.0])
    assert in_the_run(Run("a", ledger)) == ""
    ledger.verdict = {"said": "paying", "sentence": "paying: by 0.1 nats"}
    assert in_the_run(Run("a", ledger)) == "Verdict inside a: paying: by 0.1 nats."
    assert summary_of([Run("a", ledger)], "val_loss", [])["verdicts"] == ["Verdict inside a: paying: by 0.1 nats."]


def busy(losses=(6.0, 5.0, 4.0)):
    """A run of a busier machine that wins at equal time only because its steps are charged twice."""
    run = chosen(list(losses), round_seconds=10.0)
    run.ledger.training_seconds *= 2
    return run


def test_where_times_cannot_be_compared_nothing_on_the_page_compares_them():
    runs = [RANDOM, busy()]
    said = headline(runs, "val_loss")
    assert "at equal total FLOPs" in said
    assert "of its FLOPs" in said
    assert compare(*runs, "val_loss", "seconds") is None
    assert {axis for axis, _, _ in savings(*runs, "val_loss")} <= {"step", "flops"}
    page = build_page(runs)
    summary = page[page.index("<h1>") : page.index("<section")]
    for words in ("equal time", "total time", ">time<", "time for selection", "(30 s", "40 s"):
        assert words not in summary, words
    assert "times cannot be compared" in summary
    assert "val_loss against total time" not in page
    fair = build_page([RANDOM, chosen([6.0, 5.0, 4.0], round_seconds=10.0)])
    for words in ("equal time", ">time<", "time for selection", "val_loss against total time"):
        assert words in fair, words


def test_of_several_runs_one_on_a_busier_machine_takes_times_out_of_the_table():
    runs = [RANDOM, chosen([6.0, 5.0, 4.0]), Run("busy", busy().ledger)]
    page = build_page(runs)
    summary = page[page.index("<h1>") : page.index("<section")]
    assert "mates at equal FLOPs" in summary
    assert "busy at equal FLOPs" in summary
    assert "at equal time" not in summary


def test_a_single_seed_stands_in_the_headline_itself():
    assert "4.000 against 4.500, with one seed each;" in headline([RANDOM, chosen([6.0, 5.0, 4.0])], "val_loss")
    again = Run("again", ledger_of("UniformSelector", [6.0, 5.0, 4.4]))
    said = headline([RANDOM, again, chosen([6.0, 5.0, 4.0])], "val_loss")
    assert "4.000 against 4.500, with one seed of mates;" in said
    both = [RANDOM, again, chosen([6.0, 5.0, 4.0]), Run("mates 2", chosen([6.0, 5.0, 4.1]).ledger)]
    assert "seed" not in headline(both, "val_loss")
