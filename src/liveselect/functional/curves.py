r"""How a score grows with compute, and when a method of selection has earned what it cost.

The score of a model is described by :math:`P(C) = \bar P - (\bar P - P_0)\, e^{-\lambda (C - S) / C_{full}}`, with C
the FLOPs of training and selection, S those of selection, and :math:`C_{full}` those of training on all of the pool.
These are descriptions of a few points by two or three numbers: they hold between the points, and not for another model.

Source: Yin and Rush 2024, "Compute-Constrained Data Selection", arXiv 2410.16208.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

Reading = Literal["offset", "total"]
"""``offset``: the score grows with C - S, as in the paper's simulation. ``total``: with C, as in its published fits."""

Shape = Literal["exponential", "power"]

MIN_POINTS = 5
MIN_RATE_SPAN = 1.0
MIN_R2 = 0.8
PUBLISHED_SIZE_RATIOS = {"perplexity": 5.0, "gradient": 10.0}
"""How many times larger than its scorer the trained model must be for a method to be compute-optimal, as published."""

_LOWEST_RATE, _HIGHEST_RATE, _RATES = 1e-4, 5e2, 400
_REFINEMENTS = 9  # each narrows the bracket of the rate tenfold
_REFINED_RATES = 21
_MOST_FALLEN = 600.0  # exponents beyond it leave float64
_LATE = 60.0  # in units of 1 / rate: an exponential has become zero there


@dataclass(frozen=True)
class Curve:
    """A score as a function of the FLOPs spent.

    Attributes:
        start: the score at no training; in the ``total`` reading an extrapolation to before selection was over.
        ceiling: the score that it tends to.
        rate: how fast, per ``full_flops`` of training.
        full_flops: FLOPs of training on the whole pool once.
        selection_flops: spent before training; no score is defined below them.
        overhead: FLOPs of recurring selection for each FLOP of training.
        reading: what the score grows with.
        shape: ``power`` is ``ceiling - (ceiling - start) u ** -rate``, which fits losses of pretraining better.
    """

    start: float
    ceiling: float
    rate: float
    full_flops: float
    selection_flops: float = 0.0
    overhead: float = 0.0
    reading: Reading = "offset"
    shape: Shape = "exponential"

    @property
    def rate_per_flop(self) -> float:
        """The rate per FLOP of training, which does not depend on the unit ``full_flops``."""
        return self.rate / self.full_flops

    def score(self, flops: float | np.ndarray) -> np.ndarray:
        """Return the score after ``flops (n,)`` in all; NaN below the cost of selection."""
        return self.ceiling - self.left(flops)

    def left(self, flops: float | np.ndarray) -> np.ndarray:
        """Return the distance to the ceiling after ``flops (n,)`` in all; NaN below the cost of selection."""
        spent = np.asarray(flops, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            left = (self.ceiling - self.start) * _falling(self.grown(spent), self.rate, self.shape)
        return np.where(spent >= self.selection_flops, left, np.nan)

    def grown(self, flops: np.ndarray) -> np.ndarray:
        """Return what the score grows with after ``flops (n,)`` in all, in units of ``full_flops``."""
        offset = self.selection_flops if self.reading == "offset" else 0.0
        return (flops - offset) / (1.0 + self.overhead) / self.full_flops

    def shared(self, runs: float) -> "Curve":
        """Return the curve of each of ``runs`` runs that share the cost of one selection."""
        if not runs >= 1:
            raise ValueError(f"expected at least 1 run to share the scores, got {runs}")
        return replace(self, selection_flops=self.selection_flops / runs)


@dataclass(frozen=True)
class CurveFit:
    """A curve through points, and how far it can be trusted.

    Attributes:
        curve: the fit of least squares.
        flops: ``(n,)`` of the points.
        scores: ``(n,)``.
        squared_error: summed over the points.
        r2: the share of the scores' variance that the curve explains.
        at_bound: whether ``start`` lies on its bound, so that the curve cannot follow the points.
        parameters: fitted.
    """

    curve: Curve
    flops: np.ndarray
    scores: np.ndarray
    squared_error: float
    r2: float
    at_bound: bool
    parameters: int

    @property
    def residuals(self) -> np.ndarray:
        """Scores less the curve, ``(n,)``."""
        return self.scores - self.curve.score(self.flops)

    @property
    def aicc(self) -> float:
        """Akaike's criterion for small samples, smaller is better; infinite where the points are too few for it."""
        n, k = len(self.scores), self.parameters + 1  # the variance is one more
        if n <= k + 1:
            return math.inf
        return n * math.log(max(self.squared_error / n, 1e-300)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)

    def doubts(self) -> tuple[str, ...]:
        """Return why the parameters must not be quoted; empty where they may."""
        spent = self.curve.grown(self.flops)
        span = self.curve.rate * float(spent.max() - spent.min())
        if self.curve.shape == "power":
            span = self.curve.rate * math.log(float(spent.max() / spent.min()))
        found = []
        if len(self.scores) < MIN_POINTS:
            found.append(f"{len(self.scores)} of {MIN_POINTS} evaluations so far")
        if not span >= MIN_RATE_SPAN:
            found.append(
                f"the evaluations span {span:.2g} of the curve's time constants, of at least {MIN_RATE_SPAN:g}"
            )
        if not self.r2 >= MIN_R2:
            found.append(f"the curve explains {self.r2:.0%} of the variance, of at least {MIN_R2:.0%}")
        if self.at_bound:
            found.append("its start lies at the bound of what was allowed")
        return tuple(found)


@dataclass(frozen=True)
class BreakEven:
    """When one method overtakes another.

    Attributes:
        flops: spent in all when it does; None where it does not.
        kind: ``crosses``; ``ahead`` from its first step on, at the cost of its selection; or ``never``.
        score: of both methods there; NaN where there is none.
    """

    flops: float | None
    kind: Literal["crosses", "ahead", "never"]
    score: float = math.nan


def fit_curve(
    flops: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    full_flops: float,
    ceiling: float | None,
    *,
    selection_flops: float = 0.0,
    overhead: float = 0.0,
    reading: Reading = "offset",
    lowest_start: float | None = 0.0,
    shape: Shape = "exponential",
) -> CurveFit:
    r"""Fit a curve by least squares.

    For a fixed rate the rest is linear and has a closed form (variable projection), so one number is searched for, over
    the whole of its range: there is no start to choose, and no optimum to miss.

    Args:
        flops: ``(n,)`` FLOPs of training and selection in all.
        scores: ``(n,)``, larger is better; give a loss with a minus sign and ``lowest_start=None``.
        full_flops: FLOPs of training on the whole pool once.
        ceiling: the score of full training, as published fits take it; None fits it as well.
        selection_flops: spent before training.
        overhead: as in :class:`Curve`.
        reading: as in :class:`Curve`.
        lowest_start: bound of the score at no training; None for none.
        shape: as in :class:`Curve`.

    Raises:
        ValueError: fewer points than parameters, numbers that are not finite, or FLOPs below those of selection.
    """
    spent, seen = np.asarray(flops, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    free = 2 if ceiling is not None else 3
    if spent.shape != seen.shape or spent.ndim != 1 or len(spent) < free:
        raise ValueError(f"expected flops and scores of at least {free} points, got {spent.shape} and {seen.shape}")
    if not (np.isfinite(spent).all() and np.isfinite(seen).all() and full_flops > 0):
        raise ValueError("expected finite flops and scores and positive full_flops: leave failed evaluations out")
    template = Curve(0.0, ceiling or 0.0, 1.0, full_flops, selection_flops, overhead, reading, shape)
    grown = template.grown(spent)
    if spent.min() < selection_flops or (shape == "power" and grown.min() <= 0):
        raise ValueError(
            f"expected flops of training and selection, at least {selection_flops:.4g}, got {spent.min():.4g}"
        )
    rate, start, top, error, bound = _project(grown, seen[None], ceiling, lowest_start, shape)
    total = float(((seen - seen.mean()) ** 2).sum())
    squared = float(error[0])
    return CurveFit(
        curve=replace(template, start=float(start[0]), ceiling=float(top[0]), rate=float(rate[0])),
        flops=spent,
        scores=seen,
        squared_error=squared,
        r2=1.0 - squared / total if total > 0 else math.nan,
        at_bound=bool(bound[0]),
        parameters=free,
    )


def resampled(fit: CurveFit, draws: int, generator: torch.Generator, lowest_start: float | None = 0.0) -> list[Curve]:
    """Return curves fitted to the points with resampled residuals, ``draws`` of them.

    Residuals are widened by ``sqrt(n / (n - p))``, because a fit of p parameters makes them too small.

    Args:
        fit: of the points; a ceiling that was fixed stays so.
        draws: at least 200 for an interval of 80 %.
        generator: of the draws.
        lowest_start: as in :func:`fit_curve`.
    """
    n = len(fit.scores)
    widened = fit.residuals * math.sqrt(n / max(1, n - fit.parameters))
    rows = torch.randint(n, (draws, n), generator=generator).numpy()
    scores = fit.curve.score(fit.flops)[None] + (widened - widened.mean())[rows]
    ceiling = fit.curve.ceiling if fit.parameters == 2 else None
    rate, start, top, _, _ = _project(fit.curve.grown(fit.flops), scores, ceiling, lowest_start, fit.curve.shape)
    parameters = zip(rate.tolist(), start.tolist(), top.tolist(), strict=True)
    return [replace(fit.curve, rate=r, start=s, ceiling=c) for r, s, c in parameters]


def break_even(method: Curve, baseline: Curve, budget: float = math.inf) -> BreakEven:
    """Return when a method of selection is first ahead of a baseline at equal FLOPs in all, within a budget.

    A crossing where the method falls behind is none. Curves may differ in every parameter.
    """
    first = max(method.selection_flops, baseline.selection_flops)
    if first > budget:
        return BreakEven(None, "never")
    if _lead(method, baseline, first) > 0:
        return BreakEven(first, "ahead", float(method.score(first)))
    late = max(_LATE * c.full_flops * (1 + c.overhead) / c.rate for c in (method, baseline) if c.rate > 0)
    last = min(budget, first + late)
    spread = np.concatenate([[0.0], np.geomspace(1e-9, 1.0, 4000)]) * (last - first) + first
    ahead = np.flatnonzero(_lead(method, baseline, spread) > 0)
    if not len(ahead):
        return BreakEven(None, "never")
    low, high = float(spread[ahead[0] - 1]), float(spread[ahead[0]])
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if _lead(method, baseline, middle) > 0 else (middle, high)
    return BreakEven(high, "crosses", float(method.score(high)))


def break_even_interval(
    method: Sequence[Curve], baseline: Sequence[Curve], budget: float = math.inf, coverage: float = 0.8
) -> tuple[float, float]:
    """Return the interval of the break-even over pairs of resampled curves, FLOPs; infinite where too many have none.

    Args:
        method: from :func:`resampled`.
        baseline: as many.
        budget: as in :func:`break_even`.
        coverage: share of the pairs inside.
    """
    found = [break_even(ours, theirs, budget).flops for ours, theirs in zip(method, baseline, strict=True)]
    sorted_flops = np.sort([math.inf if each is None else each for each in found])
    tail = (1 - coverage) / 2
    places = [math.floor(tail * (len(sorted_flops) - 1)), math.ceil((1 - tail) * (len(sorted_flops) - 1))]
    return float(sorted_flops[places[0]]), float(sorted_flops[places[1]])


def recurring_selection_pays(rate: float, baseline_rate: float, overhead: float) -> bool:
    """Return whether selection that costs ``overhead`` FLOPs per FLOP of training ever breaks even.

    It must raise the rate per FLOP of training by more than its share of the cost.
    """
    return rate > (1.0 + overhead) * baseline_rate


def break_even_share(selection_share: float, size_ratio: float, rate_gain: float) -> float:
    """Return the share of a full training at which one selection has paid, infinite where it never does.

    Args:
        selection_share: FLOPs of the selection, as a share of training a model of the scorer's size on the whole pool:
            1/3 to take a perplexity of each example, 1 for a gradient, 1.8 for LESS as its paper draws it.
        size_ratio: parameters of the trained model over those of the scorer.
        rate_gain: rate of the method over that of the baseline.
    """
    if not rate_gain > 1:
        return math.inf
    return selection_share / size_ratio * rate_gain / (rate_gain - 1.0)


def rate_gain_needed(overhead: float, selection_share: float) -> float:
    """Return how many times as fast as the baseline a method must learn to be level at the end of a run of fixed cost.

    For curves that start and end alike; infinite where nothing is left of the run for training.

    Args:
        overhead: cost of recurring selection for each unit of training.
        selection_share: cost of selection before training, as a share of the whole run's.
    """
    return (1.0 + overhead) / (1.0 - selection_share) if selection_share < 1 else math.inf


def size_ratio_needed(selection_share: float, within: float, rate_gain: float) -> float:
    """Return how many times its scorer's size a model must have to break even ``within`` a share of full training."""
    return break_even_share(selection_share, 1.0, rate_gain) / within


def runs_needed(method: Curve, baseline: Curve, within: float) -> int | None:
    """Return how many runs must share the scores to break even ``within`` a share of full training each.

    For curves that start and end alike; None where no number is enough.
    """
    if not method.rate > baseline.rate:
        return None
    affordable = within * method.full_flops * (method.rate - baseline.rate) / method.rate
    return max(1, math.ceil(method.selection_flops / affordable * (1 - 1e-12)))


def frontier(flops: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the runs that no other dominates, as indices in order of cost.

    One dominates another that costs no less and scores no more, unless they are equal in both.
    """
    spent, seen = np.asarray(flops, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    best = -math.inf
    kept: list[int] = []
    for index in np.lexsort((-seen, spent)):
        if seen[index] > best or (kept and (spent[index], seen[index]) == (spent[kept[-1]], best)):
            kept.append(int(index))
            best = float(seen[index])
    return np.asarray(kept, dtype=np.int64)


def frontier_line(flops: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line of scores on log10 of FLOPs."""
    slope, intercept = np.polyfit(np.log10(np.asarray(flops, dtype=np.float64)), np.asarray(scores), 1)
    return float(slope), float(intercept)


def advantage(
    flops: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    other_flops: Sequence[float] | np.ndarray,
    other_scores: Sequence[float] | np.ndarray,
    tolerance: float = 1e-4,
) -> np.ndarray:
    """Return each run's score less the best of the others that cost no more, ``(n,)``; NaN where none cost so little.

    ``tolerance`` is the share by which the others may cost more and still count as equal.
    """
    others, points = np.asarray(other_flops, dtype=np.float64), np.asarray(other_scores, dtype=np.float64)
    found = []
    for cost, score in zip(flops, scores, strict=True):
        affordable = points[others <= cost * (1 + tolerance)]
        found.append(score - affordable.max() if len(affordable) else math.nan)
    return np.asarray(found)


def _lead(method: Curve, baseline: Curve, flops: float | np.ndarray) -> np.ndarray:
    """Return how far the method is ahead; not by subtracting scores, which are equal to rounding near the ceiling."""
    return method.ceiling - baseline.ceiling + (baseline.left(flops) - method.left(flops))


def _falling(grown: np.ndarray, rate: float | np.ndarray, shape: Shape) -> np.ndarray:
    fallen: np.ndarray = np.exp(-rate * grown) if shape == "exponential" else grown**-rate
    return fallen


def _project(
    grown: np.ndarray, scores: np.ndarray, ceiling: float | None, lowest: float | None, shape: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return rate, start, ceiling, squared error and whether the start lies at its bound, of each row of ``scores``."""
    first = float(grown.min())
    highest = min(_HIGHEST_RATE, _MOST_FALLEN / abs(first if shape == "exponential" else math.log(first) or 1e-12))
    if first <= 0 and shape == "exponential":
        highest = _HIGHEST_RATE
    rates = np.broadcast_to(np.geomspace(_LOWEST_RATE, highest, _RATES), (len(scores), _RATES))
    ratio = (highest / _LOWEST_RATE) ** (1 / (_RATES - 1))
    for _ in range(_REFINEMENTS):
        error = _errors(grown, scores, rates, ceiling, lowest, shape)[2]
        best = np.take_along_axis(rates, error.argmin(axis=1)[:, None], axis=1)
        rates = best * np.geomspace(1 / ratio, ratio, _REFINED_RATES)
        ratio **= 2 / (_REFINED_RATES - 1)
    start, top, error, bound = _errors(grown, scores, best, ceiling, lowest, shape)
    return best[:, 0], start[:, 0], top[:, 0], error[:, 0], bound[:, 0]


def _errors(
    grown: np.ndarray, scores: np.ndarray, rates: np.ndarray, ceiling: float | None, lowest: float | None, shape: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the best start and ceiling for given ``rates (d, r)``, their errors, and where the bound holds."""
    first = grown.min(keepdims=True)
    at_first = _falling(first, rates, shape)
    # relative to the first point, else a high rate would leave nothing of any of them
    moved = grown - first if shape == "exponential" else grown / first
    falling = _falling(moved, rates[:, :, None], shape)
    if ceiling is None:
        centred = falling - falling.mean(axis=2, keepdims=True)
        below = scores - scores.mean(axis=1, keepdims=True)
        weight = (centred**2).sum(axis=2)
        height = -(centred * below[:, None]).sum(axis=2) / np.where(weight > 0, weight, np.inf)
        height = height.clip(min=0.0)
        top = scores.mean(axis=1)[:, None] + height * falling.mean(axis=2)
        bound = height == 0
    else:
        top = np.full(rates.shape, ceiling)
        height = (falling * (ceiling - scores)[:, None]).sum(axis=2) / (falling**2).sum(axis=2)
        most = np.inf if lowest is None else (ceiling - lowest) * at_first
        bound = (height >= most) | (height <= 0)
        height = height.clip(0.0, most)
    error = ((top[:, :, None] - height[:, :, None] * falling - scores[:, None]) ** 2).sum(axis=2)
    return top - height / at_first, top, error, bound
