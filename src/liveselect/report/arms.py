"""The arms of a bandit: the reward, the pulls and the share of the mixture of each, over the rounds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from liveselect.ledger import RoundRecord, spread
from liveselect.report.runs import Run, Section, has_arms

ARMS_LISTED = 40
"""Half of them the best, half the worst: a bandit may have thousands."""
ROUNDS_DRAWN = 48
"""Cells in the strip of an arm: as many as fit beside its numbers."""
TEXTS_SHOWN = 3
"""Texts of the best arms, and of the worst."""


@dataclass(frozen=True)
class Arm:
    """What the records say about one arm.

    Attributes:
        name: of its group.
        reward: mean reward when it was last recorded, in standard errors above random candidates.
        bonus: width of its confidence bound then.
        pulls: what was credited to it by then.
        shares: its share of the mixture in each of the rounds that the report draws.
        rewards: its mean reward in each of these, NaN where it was unknown.
        share: its share of everything chosen since the first round with arms.
        left: how many of its candidates are not used up, None when unknown.
    """

    name: str
    reward: float
    bonus: float
    pulls: float
    shares: list[float]
    rewards: list[float]
    share: float
    left: float | None


def arms_section(run: Run) -> Section | None:
    """Return the section about the arms of one run; None when it had none."""
    rounds = [record for record in run.ledger.rounds if has_arms(record)]
    if not rounds:
        return None
    drawn = spread(rounds, ROUNDS_DRAWN)
    arms = sorted(arms_of(rounds, drawn), key=lambda arm: -arm.reward)
    half = ARMS_LISTED // 2
    listed = [*arms[:half], *arms[max(half, len(arms) - half) :]]
    # a text of each of the best and of the worst arms: the last one that was recorded
    texts = {example.group: example for record in rounds for example in record.examples}
    known = [arm for arm in arms if arm.name in texts]
    best, worst = known[:TEXTS_SHOWN], known[max(TEXTS_SHOWN, len(known) - TEXTS_SHOWN) :][::-1]
    finite = [reward for arm in listed for reward in arm.rewards if math.isfinite(reward)]
    about = {
        "run": run,
        "arms": listed,
        "low": min(0.0, *(arm.reward for arm in listed)),
        "high": max(0.0, *(arm.reward + (arm.bonus if math.isfinite(arm.bonus) else 0.0) for arm in listed)),
        "largest_share": max(max(arm.shares) for arm in listed) or 1.0,
        "largest_reward": max(map(abs, finite), default=0.0) or 1.0,
        "first": rounds[0].round,
        "last": rounds[-1].round,
        "all_drawn": len(drawn) == len(rounds),
        "left_out": len(arms) - len(listed),
        "texts": texts,
        "best": best,
        "worst": worst,
    }
    return Section(f"What the arms of {run.name} were worth", "arms", about)


def arms_of(rounds: Sequence[RoundRecord], drawn: Sequence[RoundRecord]) -> list[Arm]:
    """Return the arms whose reward is known in some of the ``rounds``, with what they were in the ``drawn`` ones."""
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
            shares=[record.share(name) for record in drawn],
            rewards=_carried([record.groups.get(name, {}).get("reward", math.nan) for record in drawn]),
            share=sum(record.groups.get(name, {}).get("chosen", 0) for record in rounds) / total,
            left=rounds[-1].groups.get(name, {}).get("available"),
        )
        for name, row in last.items()
    ]


def _carried(values: Sequence[float]) -> list[float]:
    """Return the values with gaps filled by the value before: of many arms a record holds only some."""
    known = math.nan
    carried = []
    for value in values:
        known = known if math.isnan(value) else value
        carried.append(known)
    return carried
