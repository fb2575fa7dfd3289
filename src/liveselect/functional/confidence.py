"""Whether a mean differs from a number, with an error rate that holds however often one looks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_VALUES = 12
"""Values from which their autocorrelation can be measured; with fewer, their mean gets no interval."""

MIN_BLOCKS = 6
"""Blocks from which the noise of their means is known well enough to say something."""

MAX_BLOCK_CORRELATION = 0.1
"""Of the means of neighbouring blocks: what is left of it adds to the errors."""

_STANDARD_ERRORS = 1.5  # by which the autocorrelation is taken higher than it was measured: few values hide it
_LONGEST_BLOCK = 64
_TREND_POWERS = 3
_BLOCKS_FROM = 3  # times the fewest blocks
_MIXTURE_VARIANCE = 1.0  # of the effect, in squared units of noise, over which evidence is averaged
_BLOCKS_AT_ONE_SD = 11.0


@dataclass(frozen=True)
class Confidence:
    """A confidence sequence at one look.

    Attributes:
        mean: of the values.
        low: lower bound of the mean; -inf where nothing can be said yet.
        high: upper bound; inf likewise.
        noise: standard deviation of the mean of a block, with fewer than two blocks of a value; NaN below two values.
        blocks: number of whole blocks.
        length: values in a block.
    """

    mean: float
    low: float
    high: float
    noise: float
    blocks: int
    length: int


def confidence_sequence(values: Tensor, error: float = 0.05) -> Confidence:
    """Return bounds of the mean of ``values (n,)`` that hold at all looks together, with probability ``1 - error``.

    Each bound by itself is missed with probability ``error / 2``. Values are averaged over blocks long enough for
    their means to be nearly independent; see :func:`block_length`. The bounds are those of the normal mixture whose
    noise is not known: :func:`mixture_bounds`.

    Raises:
        ValueError: the values are no finite ``(n,)``, or the error is not between 0 and 1.
    """
    if values.dim() != 1 or not bool(values.isfinite().all()):
        raise ValueError(f"expected finite values (n,), got {tuple(values.shape)} {values.tolist()[:4]}")
    length = block_length(values)
    means = block_means(values, length)
    mean = float(values.double().mean()) if len(values) else math.nan
    # with no two blocks yet, that of the values: about as much where they are independent
    noise = float((means if len(means) > 1 else values.double()).std()) if len(values) > 1 else math.nan
    low, high = -math.inf, math.inf
    if len(values) >= MIN_VALUES and len(means) >= MIN_BLOCKS:
        low, high = mixture_bounds(means, error)
    return Confidence(mean, low, high, noise, len(means), length)


def mixture_bounds(values: Tensor, error: float, variance: float = _MIXTURE_VARIANCE) -> tuple[float, float]:
    r"""Return the means that the mixture martingale of independent ``values (n,)`` does not rule out, as an interval.

    The martingale is the ratio of two likelihoods of the values less a mean: with an effect of
    :math:`\mathcal{N}(0, \text{variance})` units of noise, and without one, the noise averaged over :math:`1 / \sigma`
    in both. It has expectation 1 at the true mean for any noise, so it exceeds ``1 / error`` at any look with
    probability ``error`` at most.

    Source: Lai 1976, "On Confidence Sequences"; Wang and Ramdas 2023, "Anytime-valid t-tests", arXiv 2310.03722.
    """
    if not 0 < error < 1 or variance <= 0:
        raise ValueError(f"expected an error between 0 and 1 and a variance above 0, got {error} and {variance}")
    count, values = len(values), values.double()
    if not count:
        return -math.inf, math.inf
    mean = float(values.mean())
    squares = float((values - mean).square().sum())
    prior = 1 / variance
    limit = math.exp(2 / count * (0.5 * math.log1p(count / prior) - math.log(error)))
    slack = 1 - limit * prior / (count + prior)
    if slack <= 0:
        return -math.inf, math.inf
    radius = math.sqrt((limit - 1) * squares / (count * slack))
    return mean - radius, mean + radius


def autocorrelation(values: Tensor) -> float:
    """Return the correlation of neighbouring ``values (n,)`` around their trend; NaN below 6 values.

    The trend is a parabola: an effect that grows or fades over a run is no noise, and would look like noise of long
    memory. What it takes off the correlation of a short series is added again, to the first order in 1 / n.
    """
    count = len(values)
    if count < 6:
        return math.nan
    place = torch.linspace(-1, 1, count, dtype=torch.float64)
    trend, _ = torch.linalg.qr(torch.stack([place**power for power in range(_TREND_POWERS)], dim=1))
    series = values.double().cpu()
    left = series - trend @ (trend.T @ series)
    square = float(left.square().sum())
    if square <= 1e-24 * float(series.square().sum()):
        return 0.0
    found = float((left[1:] * left[:-1]).sum()) / square
    return found + (_TREND_POWERS + (_TREND_POWERS + 2) * found) / count


def block_length(values: Tensor) -> int:
    """Return how many neighbouring ``values (n,)`` to average, so that the means are nearly independent.

    It follows from the measured autocorrelation, taken higher by 1.5 standard errors because a short series hides it,
    as if each value depended on the one before only. From 18 values on blocks are never so long that there are fewer
    than 6 of them: simulated autoregressions up to 0.5 keep the error then.
    """
    found = autocorrelation(values)
    if math.isnan(found):
        return 1
    assumed = min(max(found + _STANDARD_ERRORS / math.sqrt(len(values)), 0.0), 0.95)
    # a strong effect whose trend is no parabola must not wait for ever: from some values on there are blocks enough
    longest = len(values) // MIN_BLOCKS if len(values) >= _BLOCKS_FROM * MIN_BLOCKS else _LONGEST_BLOCK
    length = 1
    while length < min(longest, _LONGEST_BLOCK) and _block_correlation(assumed, length) > MAX_BLOCK_CORRELATION:
        length += 1
    return length


def block_means(values: Tensor, length: int) -> Tensor:
    """Return the means of whole blocks of ``length`` neighbouring ``values (n,)``, ``(n // length,)`` float64."""
    whole = len(values) // length
    return values[: whole * length].double().reshape(whole, length).mean(dim=1)


def blocks_needed(effect: float, noise: float) -> float:
    """Return about how many blocks it takes to tell an effect from 0: 11 (noise / effect)^2."""
    if not effect or math.isnan(effect) or math.isnan(noise):
        return math.inf
    return _BLOCKS_AT_ONE_SD * (noise / effect) ** 2


def values_needed(effect: float, found: Confidence) -> float:
    """Return about how many values it takes to tell an effect from 0, given what was found of the first ones."""
    length = found.length if found.blocks > 1 else 1
    known = min(MIN_BLOCKS * length, _BLOCKS_FROM * MIN_BLOCKS)
    return max(float(MIN_VALUES), float(known), blocks_needed(effect, found.noise) * length)


def _block_correlation(first: float, length: int) -> float:
    """Return the correlation of neighbouring block means of a first-order autoregression."""
    if not first:
        return 0.0
    decayed = 1 - first**length
    return first * decayed**2 / (length * (1 - first * first) - 2 * first * decayed)
