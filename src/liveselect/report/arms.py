"""The arms of a bandit: what each was worth, how often it was pulled, and what it gave to the mixture over time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from liveselect.ledger import Example, RoundRecord
from liveselect.report import elements, words
from liveselect.report.choices import spread
from liveselect.report.runs import Run

ARMS_LISTED = 40
ROUNDS_DRAWN = 48
TEXTS_SHOWN = 3


@dataclass(frozen=True)
class Arm:
    """What the records tell of one arm.

    Attributes:
        name: of its group.
        reward: mean reward when it was last told, in standard errors above random candidates.
        bonus: width of its confidence bound then.
        pulls: what was credited to it by then.
        shares: its share of the mixture in each of the rounds that are drawn.
        rewards: its mean reward in each of them, NaN where it was not told.
        share: its share of all that was trained on since arms were chosen.
        left: its candidates that are not used up, None when unknown.
    """

    name: str
    reward: float
    bonus: float
    pulls: float
    shares: list[float]
    rewards: list[float]
    share: float
    left: float | None


def what_arms_were_worth(run: Run) -> str:
    """Return the section about the arms of one run; empty when it had none."""
    rounds = [record for record in run.ledger.rounds if any("reward" in row for row in record.groups.values())]
    if not rounds:
        return ""
    drawn = spread(rounds, ROUNDS_DRAWN)
    arms = sorted(arms_of(rounds, drawn), key=lambda arm: -arm.reward)
    places = range(len(arms))
    listed = [*places[: ARMS_LISTED // 2], *places[max(ARMS_LISTED // 2, len(arms) - ARMS_LISTED // 2) :]]
    left_out = len(arms) - len(listed)
    return (
        f"<section><h2>What the arms of {words.escaped(run.name)} were worth</h2>"
        + elements.paragraph(
            "An arm is a group of similar candidates. Its reward is the mean influence of what was measured of it, in "
            "standard errors above random candidates of the same round: at 0 it is as good as random data. The bonus "
            "is what little evidence adds to it, and gives the bound; the arms with the largest bounds are trained on. "
            f"Shares and rewards are those of rounds {rounds[0].round} to {rounds[-1].round}, one cell for each"
            + ("" if len(drawn) == len(rounds) else " that is drawn")
            + ". Pulls that were forgotten, or credited by a neighbour, count in part.",
            "note",
        )
        + elements.legend(
            {
                "mean reward, and its bonus": BOUND_KEY,
                "share of the mixture, or a reward above 0": elements.AREA_KEY.format(
                    colour="var(--series-0)", opacity=0.9
                ),
                "a reward below 0": elements.AREA_KEY.format(colour="var(--series-1)", opacity=0.9),
                "not known": elements.AREA_KEY.format(colour="var(--line)", opacity=0.6),
            }
        )
        + _table([arms[place] for place in listed], f"Arms of {run.name}")
        + (elements.paragraph(f"{left_out} arms between these are left out.") if left_out else "")
        + _texts(arms, rounds)
        + "</section>"
    )


def arms_of(rounds: Sequence[RoundRecord], drawn: Sequence[RoundRecord]) -> list[Arm]:
    """Return the arms whose reward is told in some of the ``rounds``, with what they were in the ``drawn`` ones."""
    last: dict[str, Mapping[str, float]] = {}
    for record in rounds:
        last |= {name: row for name, row in record.groups.items() if "reward" in row}
    total = sum(record.chosen for record in rounds) or 1
    return [
        Arm(
            name=name,
            reward=row["reward"],
            bonus=row.get("bonus", math.nan),
            pulls=row.get("pulls", math.nan),
            shares=[record.groups.get(name, {}).get("chosen", 0) / max(1, record.chosen) for record in drawn],
            rewards=_carried([record.groups.get(name, {}).get("reward", math.nan) for record in drawn]),
            share=sum(record.groups.get(name, {}).get("chosen", 0) for record in rounds) / total,
            left=rounds[-1].groups.get(name, {}).get("available"),
        )
        for name, row in last.items()
    ]


def _carried(values: Sequence[float]) -> list[float]:
    """Return the values with gaps filled by what stood before: of many arms a record tells only those it touched."""
    known = math.nan
    carried = []
    for value in values:
        known = known if math.isnan(value) else value
        carried.append(known)
    return carried


def _table(arms: Sequence[Arm], caption: str) -> str:
    bounds = [arm.reward + (arm.bonus if math.isfinite(arm.bonus) else 0.0) for arm in arms]
    low = min(0.0, *(arm.reward for arm in arms))
    high = max(0.0, *bounds)
    largest_share = max(max(arm.shares) for arm in arms) or 1.0
    largest_reward = max((abs(r) for arm in arms for r in arm.rewards if math.isfinite(r)), default=0.0) or 1.0
    rows = [
        [
            words.escaped(arm.name),
            bound_picture(arm.reward, arm.bonus, low, high),
            decimals(arm.reward),
            decimals(arm.bonus),
            decimals(arm.pulls, 1),
            words.percent(arm.share),
            strip([share / largest_share for share in arm.shares]),
            strip([_stretched(reward / largest_reward) for reward in arm.rewards]),
            words.number(arm.left),
        ]
        for arm in arms
    ]
    columns = ["arm", "bound", "reward", "bonus", "pulls", "share", "shares", "rewards", "left"]
    return '<div class="arms">' + elements.table(columns, rows, caption) + "</div>"


BOUND_KEY = (
    '<svg viewBox="0 0 40 10" aria-hidden="true"><line x1="8" y1="5" x2="34" y2="5" stroke="var(--series-0)" '
    'stroke-width="2"/><circle cx="8" cy="5" r="4" fill="var(--series-0)"/></svg>'
)


def bound_picture(reward: float, bonus: float, low: float, high: float) -> str:
    """Return a dot at the reward and a line up to its bound, on an axis from ``low`` to ``high`` that shows 0."""
    width, room = 120.0, 5.0

    def at(value: float) -> float:
        return room + (width - 2 * room) * (value - low) / ((high - low) or 1.0)

    end = at(reward + bonus) if math.isfinite(bonus) else width
    colour = f"var(--series-{0 if reward >= 0 else 1})"
    return (
        f'<svg class="bound" viewBox="0 0 {width:.0f} 14" role="img" aria-label="reward {reward:.2f}">'
        f'<line x1="{at(0):.1f}" y1="0" x2="{at(0):.1f}" y2="14" stroke="var(--muted)" stroke-dasharray="2 2"/>'
        f'<line x1="{at(reward):.1f}" y1="7" x2="{end:.1f}" y2="7" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{at(reward):.1f}" cy="7" r="4" fill="{colour}"/></svg>'
    )


def strip(values: Sequence[float]) -> str:
    """Return a row of cells, one for each value in -1..1, as strong as the value is far from 0; NaN is its own."""
    cells = []
    for index, value in enumerate(values):
        if math.isnan(value):
            colour, strength = "var(--line)", 0.6
        else:
            colour, strength = f"var(--series-{0 if value >= 0 else 1})", min(1.0, abs(value))
        if strength > 0:
            cells.append(f'<rect x="{10 * index}" width="9" height="14" fill="{colour}" opacity="{strength:.2f}"/>')
    width = 10 * len(values)
    return (
        f'<svg class="strip" viewBox="0 0 {width} 14" style="width: {min(7.5, 0.35 * len(values) + 0.5):.1f}rem" '
        'preserveAspectRatio="none" aria-hidden="true">' + "".join(cells) + "</svg>"
    )


def _stretched(value: float) -> float:
    """Return the square root of a value in -1..1 with its sign: beside one large reward the others stay visible."""
    return math.copysign(math.sqrt(abs(value)), value)


def decimals(value: float, places: int = 2) -> str:
    """Return a number with so many decimals, so that those of a column stand below each other."""
    if not math.isfinite(value):
        return words.number(value)
    text = f"{value:.{places}f}"
    return text.replace("-", words.MINUS) if float(text) else text.replace("-", "")


def _texts(arms: Sequence[Arm], rounds: Sequence[RoundRecord]) -> str:
    """Return a typical text of each of the best arms and of the worst: the last one that was written down of it."""
    texts = {example.group: example for record in rounds for example in record.examples}
    known = [arm for arm in arms if arm.name in texts]
    top, bottom = known[:TEXTS_SHOWN], known[max(TEXTS_SHOWN, len(known) - TEXTS_SHOWN) :][::-1]
    columns = [
        f"<div><h3>{title}</h3>" + "".join(_text(arm, texts[arm.name]) for arm in shown) + "</div>"
        for title, shown in (("Best arms", top), ("Worst arms", bottom))
        if shown
    ]
    return '<div class="pair">' + "".join(columns) + "</div>" if columns else ""


def _text(arm: Arm, example: Example) -> str:
    header = [arm.name, f"reward {decimals(arm.reward)}", f"{words.percent(arm.share)} of the mixture"]
    header += ["used up"] if arm.left == 0 else []
    return elements.article(header, example.text, "chosen" if example.chosen else "rejected")
