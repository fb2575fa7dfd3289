"""The section about arms: its numbers are the ledger's, and nobody without arms has it."""

import math
import re
from dataclasses import replace

import pytest
from report.ledgers import ledger_of

from liveselect.ledger import Example
from liveselect.report import Run, build_page, words
from liveselect.report.arms import ARMS_LISTED, arms_of, arms_section

TITLE = "What the arms of"


def a_bandit(arms: int = 3, rounds: int = 4) -> Run:
    """A run whose arm i has the reward i - 1, an eighth more in each round; arm 0 is told in the first only."""
    ledger = ledger_of("UCBSelector", [6.0 - index for index in range(rounds)])
    for index, record in enumerate(ledger.rounds):
        told = range(arms) if index == 0 else range(1, arms)
        groups = {
            f"arm {arm}": {
                "available": 100 - arm,
                "measured": 2,
                "chosen": 10 * arm,
                "reward": arm - 1.0 + index / 8,
                "bonus": 0.5 + arm,
                "pulls": 1.0 + index,
            }
            for arm in told
        }
        examples = [
            Example(arm, f"arm {arm}", arm - 1.0, arm > 0, f"text of arm {arm}") for arm in reversed(range(arms))
        ]
        chosen = 10 * sum(range(arms))
        ledger.rounds[index] = replace(record, groups=groups, examples=examples, chosen=chosen)
    return Run("quad", ledger)


def section_of(run: Run) -> str:
    """What the page shows of the arms."""
    return re.search(r'<section id="arms">.*?</section>', build_page([run]), flags=re.DOTALL).group()


def test_a_run_without_arms_has_no_such_section():
    run = Run("mates", ledger_of("RegressionSelector", [6.0, 5.0]))
    assert arms_section(run) is None
    assert TITLE not in build_page([run])
    assert TITLE in build_page([a_bandit()])


def test_arms_are_what_the_last_record_that_knows_them_says():
    rounds = a_bandit().ledger.rounds
    arms = {arm.name: arm for arm in arms_of(rounds, rounds)}
    assert {name: arm.reward for name, arm in arms.items()} == {"arm 0": -1.0, "arm 1": 0.375, "arm 2": 1.375}
    assert [arms["arm 2"].bonus, arms["arm 2"].pulls, arms["arm 2"].left] == [2.5, 4.0, 98]
    assert arms["arm 2"].shares == [20 / 30] * 4
    assert arms["arm 2"].share == pytest.approx(20 / 30)
    assert arms["arm 1"].rewards == [0.0, 0.125, 0.25, 0.375]
    assert arms["arm 0"].rewards == [-1.0] * 4  # the first record's, as long as no other tells it
    assert arms["arm 0"].left is None


def test_the_table_begins_with_the_best_arm_and_holds_every_number():
    run = a_bandit()
    page = section_of(run)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)[1:]]
    arms = sorted(arms_of(run.ledger.rounds, run.ledger.rounds), key=lambda arm: -arm.reward)
    assert [row[0] for row in rows] == [arm.name for arm in arms] == ["arm 2", "arm 1", "arm 0"]
    for row, arm in zip(rows, arms, strict=True):
        numbers = [f"{arm.reward:.2f}".replace("-", words.MINUS), f"{arm.bonus:.2f}", f"{arm.pulls:.1f}"]
        assert row[2:6] == [*numbers, words.percent(arm.share)]
        assert row[8] == words.number(arm.left)


def test_best_and_worst_arms_come_with_texts():
    best, worst = section_of(a_bandit(arms=8)).split("<h3>Worst arms</h3>")
    assert [int(arm) for arm in re.findall(r"text of arm (\d)", best)] == [7, 6, 5]
    assert [int(arm) for arm in re.findall(r"text of arm (\d)", worst)] == [0, 1, 2]
    few = section_of(a_bandit(arms=2))
    assert sorted(re.findall(r"text of arm (\d)", few)) == ["0", "1"]


def test_a_good_arm_that_is_used_up_keeps_its_place_and_its_last_text():
    run = a_bandit(arms=6, rounds=4)
    last = run.ledger.rounds[-1]
    last.groups["arm 5"] |= {"chosen": 0, "available": 0}
    run.ledger.rounds[-1] = replace(last, examples=[each for each in last.examples if each.group != "arm 5"])
    best = section_of(run).split("<h3>Best arms</h3>")[1].split("<h3>Worst arms</h3>")[0]
    assert [int(arm) for arm in re.findall(r"text of arm (\d)", best)] == [5, 4, 3]
    assert re.findall("used up", best) == ["used up"]


def test_numbers_of_a_column_have_equally_many_decimals_and_zero_has_no_sign():
    assert [words.decimals(value) for value in (16.0, -0.0715, -0.001, math.nan)] == [
        "16.00",
        f"{words.MINUS}0.07",
        "0.00",
        "not a number",
    ]


def test_of_very_many_arms_the_best_and_the_worst_are_listed():
    page = section_of(a_bandit(arms=ARMS_LISTED + 5, rounds=2))
    listed = [int(arm) for arm in re.findall(r"<td>arm (\d+)</td>", page)]
    half = ARMS_LISTED // 2
    assert listed == [*reversed(range(half + 5, ARMS_LISTED + 5)), *reversed(range(half))]
    assert "5 arms between these are left out" in page


def test_names_and_texts_of_arms_are_escaped():
    run = a_bandit()
    record = run.ledger.rounds[-1]
    record.groups["<u>arm</u>"] = record.groups["arm 2"]
    run.ledger.rounds[-1] = replace(record, examples=[Example(1, "<u>arm</u>", 2.0, True, "<u>text</u>")])
    page = section_of(run)
    assert "<u>" not in page
    assert "&lt;u&gt;arm" in page


def test_cells_are_as_strong_as_their_values_in_the_colour_of_their_sign_and_gaps_have_their_own():
    run = a_bandit()
    del run.ledger.rounds[0].groups["arm 2"]  # its reward is not known before the second round
    page, largest = section_of(run), 1.375  # arm 2, in the last round
    expected = {
        "arm 0": [("series-1", 1.0)] * 4,
        "arm 1": [("", 0.0), *(("series-0", index / 8) for index in (1, 2, 3))],
        "arm 2": [("line", math.nan), *(("series-0", 1 + index / 8) for index in (1, 2, 3))],
    }
    for name, cells in expected.items():
        row = re.search(rf"<tr><td>{name}<.*?</tr>", page).group()
        shares, rewards = re.findall(r'<svg class="strip".*?</svg>', row)
        shown = re.findall(r'<rect x="(\d+)".*?fill="var\(--(.*?)\)" opacity="(.*?)"', rewards)
        assert shown == [
            (str(10 * place), colour, f"{0.6 if math.isnan(size) else math.sqrt(size / largest):.2f}")
            for place, (colour, size) in enumerate(cells)
            if size != 0
        ]
    shown = re.findall(r'<rect x="(\d+)".*?fill="(.*?)" opacity="(.*?)"', shares)  # of arm 2: none, then 20 of 30
    assert shown == [(str(10 * place), "var(--series-0)", "1.00") for place in (1, 2, 3)]


def test_a_bound_is_drawn_to_scale_and_an_infinite_one_to_the_edge():
    run = a_bandit()
    run.ledger.rounds[-1].groups["arm 2"]["bonus"] = math.inf
    page = section_of(run)

    def at(value):  # the axis goes from the lowest reward to the largest finite bound
        return f"{5 + 110 * (value + 1) / (1.875 + 1):.1f}"

    for name, reward, end in (("arm 0", -1.0, at(-0.5)), ("arm 1", 0.375, "115.0"), ("arm 2", 1.375, "120.0")):
        row = re.search(rf"<tr><td>{name}<.*?</tr>", page).group()
        assert re.search(r'x1="([\d.]+)" y1="7" x2="([\d.]+)"', row).groups() == (at(reward), end)
        assert re.search(r'x1="([\d.]+)" y1="0"', row).group(1) == at(0)
