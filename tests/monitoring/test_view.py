"""What is shown of a round, whoever shows it."""

import pytest
from report.ledgers import ledger_of

from liveselect.monitoring import round_scalars
from liveselect.monitoring.view import CORE, MAX_KEY_CHARACTERS, evaluation_scalars, key_of, sectioned


@pytest.mark.parametrize(
    ("name", "key"),
    [("web", "web"), ("a/b|c\nd", "a/b|c d"), ("", "(no name)"), ("\u202e\n", "(no name)"), ("<b>日本", "<b>日本")],
)
def test_names_of_groups_become_keys_of_one_line(name, key):
    assert key_of(name) == key


def test_long_names_become_short_keys():
    assert key_of("x" * MAX_KEY_CHARACTERS) == "x" * MAX_KEY_CHARACTERS
    assert key_of("x" * 5000) == "x" * (MAX_KEY_CHARACTERS - 1) + "…"


def test_a_pool_without_groups_has_no_mixture():
    ledger = ledger_of("RegressionSelector", [6.0])
    record = ledger.rounds[0]
    names = list(record.groups)
    assert {f"selection/mixture/{name}" for name in names} <= round_scalars(record, ledger, names).keys()
    del record.groups["code"]
    assert not any("mixture" in key for key in round_scalars(record, ledger, ["prose"]))


def test_w_and_b_has_few_numbers_in_the_section_of_selection_and_the_others_by_name():
    ledger = ledger_of("RegressionSelector", [6.0, 5.0], round_seconds=2.0)
    record = ledger.rounds[1]
    keys = {sectioned(name) for name in round_scalars(record, ledger, list(record.groups))}
    inside = {key for key in keys if key.startswith("selection/")}
    assert inside <= {f"selection/{name}" for name in CORE}
    assert {"selection_regressor/spearman", "selection_mixture/code", "selection_cost/choose"} <= keys
    assert "selection_round/round_seconds" in keys
    assert sectioned("val_loss") == "val_loss"


def test_against_flops_there_are_metrics_of_validations_only():
    ledger = ledger_of("RegressionSelector", [6.0])
    names = ("train/loss", "train_loss_step", "lr-AdamW", "loss_step", "epoch")
    kept = ("val/loss", "perplexity", "mixture_loss", "valid_acc_epoch")
    ledger.evaluate(20, dict.fromkeys((*names, *kept), 1.0))
    shown = evaluation_scalars(ledger.evaluations[-1])
    assert shown.keys() == {"selection/total_flops", *(f"selection_by_flops/{name}" for name in kept)}
