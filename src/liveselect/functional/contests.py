"""Several ways to train compared from shared states: what each is worth, and how sure that is.

Shape letters: ``C`` contests, each from one state, ``P`` ways.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CONFIDENCE = 0.95
"""Share of differences that lie below the width, one-sided."""


@dataclass(frozen=True)
class Standing:
    """What contests say of each way.

    Attributes:
        worth: ``(P,)`` by how much each lowers the loss more than the first one, float64; NaN where it never took part.
        noise: standard deviation of a single result; NaN where it cannot be known yet.
        freedom: degrees of freedom behind the noise.
        covariance: ``(P, P)`` of the worths, in squared units of noise.
    """

    worth: Tensor
    noise: float
    freedom: int
    covariance: Tensor

    def width(self, one: int, other: int) -> float:
        """Return by how much the difference of two ways may be off, one-sided 95%; infinite where that is not known."""
        if one == other:
            return 0.0
        if self.freedom < 1 or bool(self.worth[[one, other]].isnan().any()):
            return math.inf
        cov = self.covariance
        spread = float(cov[one, one] + cov[other, other] - 2 * cov[one, other])
        from scipy.stats import t as student_t

        return float(student_t.ppf(_CONFIDENCE, self.freedom)) * self.noise * math.sqrt(max(0.0, spread))


def standing(losses: Tensor) -> Standing:
    """Return what each way is worth by the losses ``(C, P)`` that it ended at; NaN where it took no part.

    Losses of one contest share its state, whose level is taken off: least squares over levels and worths, so that ways
    which took part in different contests are compared through those that they share.
    """
    count, ways = losses.shape
    there = losses.isfinite()
    contest, way = there.nonzero(as_tuple=True)
    design = torch.zeros(len(contest), count + ways, dtype=torch.float64)
    rows = torch.arange(len(contest))
    design[rows, contest] = 1.0
    design[rows, count + way] = -1.0
    seen = there.any(dim=0)
    if not len(contest):
        nothing = torch.full((ways,), math.nan, dtype=torch.float64)
        return Standing(nothing, math.nan, 0, torch.zeros(ways, ways, dtype=torch.float64))
    design[:, count + int(seen.nonzero()[0])] = 0.0  # only differences are known: that of the first one is zero
    values = losses[there].double()
    inverse = torch.linalg.pinv(design.T @ design)
    found = inverse @ (design.T @ values)
    freedom = len(values) - int(torch.linalg.matrix_rank(design))
    left = values - design @ found
    noise = math.sqrt(float(left @ left) / freedom) if freedom > 0 else math.nan
    worth = torch.where(seen, found[count:], torch.nan)
    return Standing(worth, noise, freedom, inverse[count:, count:])


def fall_per_step(steps: Tensor, losses: Tensor, at: float) -> float:
    """Return by how much a loss falls in a step at step ``at``, never below 0; NaN below three different steps.

    It is that of the line through ``losses (n,)`` over the logarithm of ``steps (n,)``.
    """
    if len(steps.unique()) < 3:
        return math.nan
    x = steps.double().log()
    x = x - x.mean()
    y = losses.double() - losses.double().mean()
    return max(0.0, -float(x @ y / (x @ x)) / max(1.0, at))
