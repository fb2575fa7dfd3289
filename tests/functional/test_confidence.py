"""The confidence sequence: its formula against an integral, its errors and its power against simulated series."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from liveselect.functional.confidence import (
    MIN_BLOCKS,
    MIN_VALUES,
    autocorrelation,
    block_length,
    block_means,
    blocks_needed,
    confidence_sequence,
    mixture_bounds,
    values_needed,
)


def integrated_log_evidence(values: np.ndarray, mean: float, variance: float) -> float:
    """The ratio of two likelihoods, both averaged over the noise and one over the effect, by quadrature."""
    scale = np.sqrt(np.mean((values - mean) ** 2))
    x = (values - mean) / scale  # the ratio does not depend on the unit

    def likelihood(effect: float, log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        # d sigma / sigma is d log sigma; the constant keeps the values near 1
        return math.exp(norm.logpdf(x, effect * sigma, sigma).sum() + 1.42 * len(x))

    def over_noise(effect: float) -> float:
        return quad(lambda s: likelihood(effect, s), -3, 3, points=[0])[0]

    prior = norm(0, math.sqrt(variance))
    mixed = quad(lambda e: over_noise(e) * prior.pdf(e), -5, 5, points=[0, x.mean()])[0]
    return math.log(mixed / over_noise(0.0))


@pytest.mark.parametrize(("count", "shift", "variance"), [(7, 2.0, 0.5), (5, -0.8, 2.0)])
def test_the_bounds_are_where_the_integral_of_the_mixture_reaches_the_limit(count, shift, variance):
    values = np.random.default_rng(count).standard_normal(count) + shift
    for bound in mixture_bounds(torch.tensor(values), 0.1, variance):
        assert integrated_log_evidence(values, bound, variance) == pytest.approx(-math.log(0.1), abs=1e-5)


def test_too_few_values_rule_out_nothing():
    assert mixture_bounds(torch.tensor([1.0]), 0.1) == (-math.inf, math.inf)
    assert mixture_bounds(torch.empty(0), 0.1) == (-math.inf, math.inf)
    found = confidence_sequence(torch.ones(MIN_VALUES - 1) + torch.randn(MIN_VALUES - 1) / 1000)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_the_sequence_moves_and_scales_with_the_values():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = confidence_sequence(values), confidence_sequence(3 * values + 7)
    assert (other.low, other.high) == pytest.approx((3 * one.low + 7, 3 * one.high + 7))
    assert (other.blocks, other.length, other.noise) == (one.blocks, one.length, pytest.approx(3 * one.noise))


def autoregressive(rho: float, runs: int, length: int, seed: int = 0) -> torch.Tensor:
    noise = np.random.default_rng(seed).standard_normal((runs, length))
    series = noise.copy()
    for step in range(1, length):
        series[:, step] = rho * series[:, step - 1] + math.sqrt(1 - rho * rho) * noise[:, step]
    return torch.tensor(series)


def alarmed(series: torch.Tensor) -> list[int]:
    """Return after how many blocks each run is said to be above 0, with a look after every value; 0 for never."""
    found = []
    for run in series:
        looks = (confidence_sequence(run[:count]) for count in range(MIN_VALUES, len(run) + 1))
        found.append(next((look.blocks for look in looks if look.low > 0), 0))
    return found


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5])
def test_looking_after_every_value_raises_few_false_alarms(rho):
    # a naive 95% interval raises 43% (rho 0) to 94% (rho 0.6)
    false = sum(map(bool, alarmed(autoregressive(rho, 80, 60))))
    assert false <= 0.05 * 80


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.2, 0.3, 0.4, 0.5])
def test_false_alarms_stay_below_a_twentieth_over_many_runs(rho):
    false = sum(map(bool, alarmed(autoregressive(rho, 800, 100, seed=1))))
    assert false <= 0.05 * 800


def test_an_effect_of_one_standard_deviation_is_found_within_twelve_blocks():
    blocks = alarmed(autoregressive(0.0, 40, 60) + 1)
    assert all(blocks)
    assert np.mean(np.array(blocks) <= 12) >= 0.8
    # the rule of thumb is about right for blocks of one value
    assert blocks_needed(1.0, 1.0) == pytest.approx(11)


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_the_autocorrelation_is_found_and_blocks_are_long_enough(rho):
    series = autoregressive(rho, 1, 20_000)[0]
    assert autocorrelation(series) == pytest.approx(rho, abs=0.03)
    length = block_length(series)
    assert autocorrelation(block_means(series, length)) < 0.15
    assert autocorrelation(block_means(series, max(1, length // 4))) > 0.1


def test_a_fading_effect_is_no_noise_of_long_memory():
    place = torch.arange(40.0, dtype=torch.float64)
    series = autoregressive(0.0, 20, 40) + 6 * torch.exp(-place / 15)
    assert sum(map(bool, alarmed(series))) >= 14  # none, if the trend were taken for noise


def test_few_values_make_longer_blocks_than_many():
    series = autoregressive(0.0, 1, 2000)[0]
    assert block_length(series) == 1 < block_length(series[:12])
    steep = torch.exp(-torch.arange(60.0))
    assert len(block_means(steep, block_length(steep))) >= MIN_BLOCKS


def test_block_means_leave_out_an_incomplete_block():
    assert block_means(torch.arange(7.0), 3).tolist() == [1.0, 4.0]


def test_small_effects_need_more_blocks_and_none_is_never_told():
    assert blocks_needed(0.5, 1.0) == pytest.approx(44)
    assert blocks_needed(-0.5, 1.0) == blocks_needed(0.5, 1.0)
    few = confidence_sequence(torch.tensor([1.0, 1.1, 0.9]))
    assert values_needed(few.mean, few) == MIN_VALUES
    assert values_needed(few.noise, few) == MIN_VALUES
    assert values_needed(few.noise / 3, few) == pytest.approx(99)
    assert blocks_needed(0.0, 1.0) == math.inf


@pytest.mark.parametrize("values", [torch.tensor([1.0, math.nan]), torch.zeros(2, 2)])
def test_values_that_are_no_numbers_are_refused(values):
    with pytest.raises(ValueError, match="expected finite values"):
        confidence_sequence(values)
