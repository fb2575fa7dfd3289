"""What is shown of a round, whoever shows it."""

import pytest
from report.ledgers import ledger_of

from liveselect.monitoring import round_scalars
from liveselect.monitoring.view import MAX_KEY_CHARACTERS, key_of


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
