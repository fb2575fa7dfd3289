"""What the look-ahead's numbers say: paying, not paying, or cannot tell yet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch

from liveselect.functional.confidence import Confidence, confidence_sequence, values_needed
from liveselect.functional.contests import fall_per_step
from liveselect.functional.curves import MIN_POINTS, break_even, fit_curve

Said = Literal["paying", "not paying", "cannot tell yet"]

HELD_OUT = "reference"
"""The half of the reference set that selection does not see."""

POOL = "pool"
"""Rows of the pool's own mixture, at which selection does not aim."""

_SLOPE_POINTS = 10


@dataclass(frozen=True)
class Look:
    """One finished look-ahead.

    Attributes:
        step: optimizer steps done when it began.
        steps: its length.
        chosen: mean loss on every set of the arm that trained on chosen data, nats per token.
        random: likewise of the arm that trained on random candidates.
    """

    step: int
    steps: int
    chosen: dict[str, float]
    random: dict[str, float]

    def gain(self, name: str) -> float:
        """Return by how much the chosen data lowered a set's loss more, nats per token."""
        return self.random[name] - self.chosen[name]


@dataclass(frozen=True)
class Block:
    """One block of rounds of a switchback.

    Attributes:
        index: of the block.
        random: whether its rounds were drawn at random.
        steps: optimizer steps between the two losses.
        before: held-out reference loss when what the block before left behind had faded, nats per token.
        after: likewise at the block's end.
    """

    index: int
    random: bool
    steps: int
    before: float
    after: float


@dataclass(frozen=True)
class Costs:
    """What selection costs, as shares of what training costs, the look-aheads that measure it included.

    Attributes:
        running: of rounds and what is around them, so far.
        once: of what was spent once (scores made before training, opening the data), over the whole run.
        once_steps: optimizer steps that cost as much as what was spent once.
    """

    running: float
    once: float = 0.0
    once_steps: float = 0.0

    @property
    def share(self) -> float:
        """Both."""
        return self.running + self.once


@dataclass(frozen=True)
class Answer:
    """A verdict, with the numbers behind it.

    Attributes:
        said: the verdict.
        step: optimizer steps done when it was given.
        gain: mean gain of the chosen data over random ones in a look-ahead, nats per token of the held-out reference.
        low: lower bound of the gain, at any look.
        high: upper bound.
        price: nats that random data would gain in the steps that selection's cost would pay for.
        overhead: selection's whole cost, as a share of training's.
        slope: nats per optimizer step by which the loss falls now, at this step.
        noise: standard deviation of a block's mean gain.
        effect: gain less price, in units of the noise.
        looks: finished look-aheads.
        blocks: blocks that they make.
        block_length: look-aheads in a block.
        steps: optimizer steps of a look-ahead.
        expected_step: step by which an answer can be expected, None where none can.
        gains: mean gain by set.
        switchback: the mean gain of a block and its bounds, where blocks of rounds alternate: the other estimate.
        break_even: optimizer steps after which selection is ahead at equal total cost, by the curve through the losses
            of random arms: ``step``, and ``low`` and ``high`` by the bounds of the gain; infinite for never.
        doubt: why that curve says nothing.
        reason: why nothing can be said, where it is not the number of look-aheads.
    """

    said: Said
    step: int
    gain: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    price: float = math.nan
    overhead: float = math.nan
    slope: float = math.nan
    noise: float = math.nan
    effect: float = math.nan
    looks: int = 0
    blocks: int = 0
    block_length: int = 1
    steps: int = 0
    expected_step: int | None = None
    gains: dict[str, float] = field(default_factory=dict)
    switchback: dict[str, float] = field(default_factory=dict)
    break_even: dict[str, float] = field(default_factory=dict)
    doubt: str = ""
    reason: str = ""

    def numbers(self) -> dict[str, float]:
        """Return the finite numbers for a logger, by name; ``paying`` is 1, 0 or -1 for not paying."""
        found = {
            "paying": {"paying": 1.0, "not paying": -1.0, "cannot tell yet": 0.0}[self.said],
            **{name: float(getattr(self, name)) for name in ("gain", "low", "high", "price", "noise", "effect")},
            **{f"gain/{name}": value for name, value in self.gains.items()},
            **{f"switchback/{name}": value for name, value in self.switchback.items()},
            **{f"break_even/{name}": value for name, value in self.break_even.items()},
            "looks": float(self.looks),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def record(self) -> dict[str, object]:
        """Return it as builtins for the ledger, with its sentence; what is not finite is None."""
        found = {name: _finite(value) for name, value in asdict(self).items()}
        return {**found, "sentence": self.sentence()}

    def sentence(self) -> str:
        """Return the verdict and the numbers behind it, as one sentence."""
        if self.reason:
            return f"{self.said}: {self.reason}"
        if not self.looks:
            return f"{self.said}: no look-ahead is finished"
        bounds = f", between {self.low:+.4f} and {self.high:+.4f}" if math.isfinite(self.low) else ""
        effect = f"; {self.effect:.1f} times its noise" if math.isfinite(self.effect) else ""
        cost = "its cost cannot be set against it before the slope of the loss is known"
        if math.isfinite(self.price):
            cost = f"its cost of {self.overhead:.1%} is worth {self.price:.4f}"
        others = "".join(f", on {name} {value:+.4f}" for name, value in self.gains.items() if name != HELD_OUT)
        said = (
            f"{self.said}: chosen data gained {self.gain:+.4f} nats over random ones in {self.steps} steps on the "
            f"held-out reference{bounds} ({self.looks} look-aheads{effect}), {cost}{others}"
        )
        if "step" in self.break_even:
            there = self.break_even["step"]
            when = f"ahead from step {there:,.0f} on" if math.isfinite(there) else "never ahead"
            said += f"; by the curve of random data it is {when} at equal total cost"
        if math.isfinite(self.switchback.get("gain", math.nan)):
            said += f"; alternating blocks of rounds say {self.switchback['gain']:+.4f} a block"
        if self.said == "cannot tell yet":
            when = f"by step {self.expected_step}" if self.expected_step is not None else "in this run"
            said += f"; an answer can be expected {when}" if self.expected_step else f"; no answer is expected {when}"
        return said


def judge(
    looks: Sequence[Look],
    costs: Costs,
    step: int,
    spacing: float,
    total_steps: float,
    error: float = 0.05,
    blocks: Sequence[Block] = (),
) -> Answer:
    """Return the verdict on look-aheads, which holds however often it is asked for.

    The gain of a look-ahead is set against what the cost of selection would buy: in as many steps it pays for
    ``overhead * steps`` more of them, in each of which the loss falls by its present slope.

    Args:
        looks: finished look-aheads, in order, of one length.
        costs: of selection.
        step: optimizer steps done.
        spacing: steps from one look-ahead to the next.
        total_steps: of the run, which may be infinite.
        error: probability of a wrong verdict.
        blocks: of a switchback.
    """
    other = _switchback(blocks, error)
    if not looks:
        return Answer("cannot tell yet", step, switchback=other)
    found = confidence_sequence(torch.tensor([look.gain(HELD_OUT) for look in looks], dtype=torch.float64), error)
    slope, length = loss_slope(looks, step), looks[-1].steps
    price = slope * costs.share * length
    said: Said = "cannot tell yet"
    if found.low > price:
        said = "paying"
    elif found.high < price:
        said = "not paying"
    net = found.mean - price
    even, doubt = break_even_of(looks, costs, found, total_steps)
    gains = {name: sum(look.gain(name) for look in looks) / len(looks) for name in looks[-1].chosen}
    return Answer(
        said=said,
        step=step,
        gain=found.mean,
        low=found.low,
        high=found.high,
        price=price,
        overhead=costs.share,
        slope=slope,
        noise=found.noise,
        effect=net / found.noise if found.noise else math.nan,
        looks=len(looks),
        blocks=found.blocks,
        block_length=found.length,
        steps=length,
        expected_step=None
        if said != "cannot tell yet"
        else _expected_step(found, len(looks), net, step, spacing, total_steps),
        gains=gains,
        switchback=other,
        break_even=even,
        doubt=doubt,
    )


def break_even_of(
    looks: Sequence[Look], costs: Costs, found: Confidence, total_steps: float
) -> tuple[dict[str, float], str]:
    """Return after how many steps selection is ahead at equal total cost, and why that cannot be said.

    Random data follow the exponential curve through the losses of random arms; chosen ones follow it faster, as the
    gain of a look-ahead says, and are charged for selection. No number where the curve's parameters must not be quoted.
    """
    ends = [look.step + look.steps for look in looks]
    losses = [-look.random[HELD_OUT] for look in looks]
    if len(ends) < MIN_POINTS:
        return {}, f"{len(ends)} of {MIN_POINTS} look-aheads so far"
    unit = float(ends[-1])
    fit = fit_curve(ends, losses, unit, None, lowest_start=None)
    if doubts := fit.doubts():
        return {}, "; ".join(doubts)
    curve, length = fit.curve, looks[-1].steps
    fall = curve.rate_per_flop * float(curve.left(unit)) * length
    if not fall > 0:
        return {}, "the losses of random arms do not fall any more"
    steps = {}
    for name, gain in (("step", found.mean), ("low", found.high), ("high", found.low)):
        faster = max(0.0, 1 + gain / fall) if math.isfinite(gain) else math.inf if gain > 0 else 0.0
        steps[name] = math.inf
        if 0 < faster < math.inf:
            method = replace(curve, rate=curve.rate * faster, selection_flops=costs.once_steps, overhead=costs.running)
            spent = break_even(method, curve, total_steps * (1 + costs.running) + costs.once_steps).flops
            if spent is not None:
                steps[name] = max(0.0, spent - costs.once_steps) / (1 + costs.running)
    return {name: value for name, value in steps.items() if name == "step" or math.isfinite(found.low)}, ""


def loss_slope(looks: Sequence[Look], step: int) -> float:
    """Return by how many nats the held-out loss falls in an optimizer step at ``step``, never below 0; NaN if unknown.

    It is that of the line through the losses of random arms over the logarithm of their steps.
    """
    ends = [(look.step + look.steps, look.random[HELD_OUT]) for look in looks[-_SLOPE_POINTS:]]
    steps, losses = torch.tensor(ends, dtype=torch.float64).reshape(-1, 2).T
    return fall_per_step(steps, losses, step)


def _expected_step(
    found: Confidence, looks: int, net: float, step: int, spacing: float, total_steps: float
) -> int | None:
    """Return the step by which the bounds should leave the price, None where the run ends before."""
    expected = step + max(1.0, values_needed(net, found) - looks) * spacing
    return int(expected) if math.isfinite(expected) and expected <= total_steps else None


def _switchback(blocks: Sequence[Block], error: float) -> dict[str, float]:
    """Return the mean gain of chosen over random blocks, nats in a block's steps, and its bounds.

    Blocks are compared in pairs, of which a coin has drawn one at random, so that the noise of the two is never pooled.
    """
    pairs: dict[int, dict[bool, Block]] = {}
    for block in blocks:
        pairs.setdefault(block.index // 2, {})[block.random] = block
    gains = [
        (_fall(pair[False]) / pair[False].steps - _fall(pair[True]) / pair[True].steps) * pair[False].steps
        for pair in pairs.values()
        if len(pair) == 2
    ]
    if not gains:
        return {}
    found = confidence_sequence(torch.tensor(gains, dtype=torch.float64), error)
    return {"gain": found.mean, "low": found.low, "high": found.high, "noise": found.noise, "pairs": float(len(gains))}


def _fall(block: Block) -> float:
    return block.before - block.after


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return value
