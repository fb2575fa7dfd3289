"""Numbers as a person reads them."""

import math

import pytest

from liveselect.report import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.04, "~0 s"),
        (0.06, "0.1 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (math.nan, "–"),
    ],
)
def test_durations_round_into_the_next_unit(seconds, said):
    assert words.duration(seconds) == said


@pytest.mark.parametrize(
    ("amount", "said"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (1e3, "1 kFLOP"), (2.5e13, "25 TFLOP"), (1e30, "1e+06 YFLOP")],
)
def test_flops_keep_three_digits_and_a_unit(amount, said):
    assert words.flops(amount) == said


@pytest.mark.parametrize(("share", "said"), [(0, "0%"), (4e-4, "~0%"), (6e-4, "0.1%"), (0.0994, "9.9%"), (1, "100%")])
def test_shares_that_are_not_zero_do_not_look_like_it(share, said):
    assert words.percent(share) == said


def test_a_minus_is_as_long_as_a_plus():
    assert words.number(-1234.0) == "\u22121\u202f234"
    assert words.number(-1.5e-7) == "\u22121.5e\u221207"


def test_whole_numbers_stay_whole():
    assert words.number(1234567) == "1\u202f234\u202f567"
    assert words.number(320.0) == "320"
    assert words.number(0.123456) == "0.1235"
    assert words.number(None) == "–"


def test_lone_surrogates_can_be_written_as_utf8():
    assert words.visible("a\ud800b").encode("utf-8") == b"a?b"
