"""How much is measured for the round to come, between the optimizer steps of this one."""

import math
from dataclasses import dataclass

from liveselect import distributed
from liveselect.measurement import Measurement


@dataclass(frozen=True)
class Pace:
    """Either a number of candidates after every step, or a share of the time; neither means all between rounds.

    Attributes:
        probes_between_steps: candidates that all ranks together measure after every optimizer step.
        max_overhead: share of the training time that measuring may take.
    """

    probes_between_steps: int | None = None
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        probes, share = self.probes_between_steps, self.max_overhead
        if probes is not None and (not isinstance(probes, int) or probes < 1):
            raise ValueError(f"expected probes_between_steps of at least 1, or None, got {probes}")
        if share is not None and not 0 < share < math.inf:
            raise ValueError(f"expected max_overhead, a share of the training time, above 0, got {share}")
        if probes is not None and share is not None:
            raise ValueError("expected probes_between_steps or max_overhead, got both: each says how much is measured")

    def __bool__(self) -> bool:
        return self.probes_between_steps is not None or self.max_overhead is not None

    def affordable(self, ahead: Measurement, trained: float) -> int:
        """Return how many candidates all ranks may measure now, after ``trained`` seconds of the round; a collective.

        Rank 0's clock decides, so that the ranks do the same number of collective operations.
        """
        if self.probes_between_steps is not None:
            return self.probes_between_steps
        spent = sum(ahead.meter.seconds.values())
        left = (self.max_overhead or 0.0) * trained - spent
        number = distributed.world_size()  # the first ones show what one costs
        if ahead.measured:
            number = math.floor(left * ahead.measured / spent) if spent else number
        return int(distributed.gather_objects(number if left > 0 else 0)[0])
