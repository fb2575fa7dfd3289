"""How a run finds out whether its selection pays."""

from dataclasses import dataclass
from typing import Literal, get_args

OnNotPaying = Literal["warn", "random", "stop"]
CostUnit = Literal["seconds", "flops"]

LOOKS_PLANNED = 20
"""Look-aheads that a run is meant to afford: the noise must be known before anything can be said."""

SHORTEST_LOOK = 20
"""Optimizer steps below which a look-ahead shows little but the optimizer's momentum."""


@dataclass(frozen=True)
class Verdict:
    """A verdict inside the run, on whether selection beats random data at equal total cost.

    At the start of some rounds a copy of weights, optimizer and random states trains on random candidates for some
    steps and is thrown away; training on the chosen data for as many steps is compared with it, on a half of the
    reference set that selection never sees.

    Args:
        share: of the run's training steps that look-aheads may cost, 0..1.
        steps: optimizer steps of a look-ahead; by default as many as let the run afford 20 of them, and at least 20.
            Long ones see more, and few of them tell more than many short ones.
        on_not_paying: what to do when selection does not pay: ``warn``, go on with ``random`` data, or ``stop``.
        error: probability that a verdict is wrong, over all looks of the run together.
        cost: what selection's cost is counted in. Seconds are those of rank 0's clock, so two runs may differ; with
            FLOPs a run that is resumed acts as the whole one does, but work that takes time and no FLOPs is not seen.
        switchback: rounds of a block, where blocks alternate: of every two, a coin under the run's seed draws one at
            random. 0 for none. It sees further than a look-ahead, and costs half of what selection gains.
        rows: rows of the pool's own mixture, and at most as many of the held-out half, on which both arms are judged.

    Raises:
        ValueError: a value is out of its range.
    """

    share: float = 0.01
    steps: int | None = None
    on_not_paying: OnNotPaying = "warn"
    error: float = 0.05
    cost: CostUnit = "seconds"
    switchback: int = 0
    rows: int = 64

    def __post_init__(self) -> None:
        for name, value in {"share": self.share, "error": self.error}.items():
            if not 0 < value < 1:
                raise ValueError(f"expected {name} between 0 and 1, got {value}")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"expected steps of at least 1, or None, got {self.steps}")
        if self.on_not_paying not in get_args(OnNotPaying):
            raise ValueError(f"expected on_not_paying to be one of {get_args(OnNotPaying)}, got {self.on_not_paying!r}")
        if self.cost not in get_args(CostUnit):
            raise ValueError(f"expected cost to be one of {get_args(CostUnit)}, got {self.cost!r}")
        if not isinstance(self.switchback, int) or self.switchback < 0:
            raise ValueError(f"expected switchback, the rounds of a block, of zero or more, got {self.switchback}")
        if self.rows < 1:
            raise ValueError(f"expected rows of at least 1, got {self.rows}")

    def length(self, total_steps: float) -> int:
        """Return the optimizer steps of a look-ahead in a run of ``total_steps``, which may be infinite."""
        if self.steps is not None:
            return self.steps
        if total_steps == float("inf"):
            return 10 * SHORTEST_LOOK
        return max(SHORTEST_LOOK, int(self.share * total_steps / LOOKS_PLANNED))
