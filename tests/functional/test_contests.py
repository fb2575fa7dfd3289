"""Least squares over contests, against its closed form, scipy and simulated contests."""

import math

import pytest
import torch
from scipy.stats import t as student_t

from liveselect.functional.contests import fall_per_step, standing

NAN = math.nan


def contests(worths, count, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(count, 1, generator=generator, dtype=torch.float64) * 3
    jitter = torch.randn(count, len(worths), generator=generator, dtype=torch.float64) * noise
    return level - torch.tensor(worths, dtype=torch.float64) + jitter


def test_in_whole_contests_worths_are_differences_of_means():
    losses = contests([0.0, 0.3, -0.2], 5, 0.1)
    found = standing(losses)
    means = losses.mean(dim=0)
    assert found.worth.tolist() == pytest.approx((means[0] - means).tolist())
    left = losses - losses.mean(dim=1, keepdim=True)
    left = left - left.mean(dim=0)
    assert found.noise == pytest.approx(math.sqrt(float(left.square().sum()) / (4 * 2)))
    assert found.freedom == 8
    # of a difference of two means of five
    assert found.width(0, 1) == pytest.approx(student_t.ppf(0.95, 8) * found.noise * math.sqrt(2 / 5))


def test_the_level_of_a_contest_does_not_matter():
    losses = contests([0.0, 0.3, -0.2], 4, 0.1)
    losses[2, 1] = NAN
    shifted = losses + torch.tensor([[5.0], [-2.0], [100.0], [0.0]])
    assert standing(shifted).worth.tolist() == pytest.approx(standing(losses).worth.tolist())
    assert standing(shifted).noise == pytest.approx(standing(losses).noise)


def test_ways_that_never_met_are_compared_through_a_third():
    losses = torch.tensor([[1.0, 0.5, NAN], [7.0, NAN, 7.75]], dtype=torch.float64)
    found = standing(losses)
    assert found.worth.tolist() == pytest.approx([0.0, 0.5, -0.75])
    assert found.freedom == 0
    assert found.width(1, 2) == math.inf


def test_what_never_took_part_is_not_known():
    found = standing(torch.tensor([[1.0, NAN, 2.0]], dtype=torch.float64))
    assert found.worth[[0, 2]].tolist() == pytest.approx([0.0, -1.0])
    assert math.isnan(float(found.worth[1]))
    assert standing(torch.empty(0, 2, dtype=torch.float64)).width(0, 1) == math.inf


def test_the_width_holds_in_nineteen_of_twenty_simulations():
    missed = 0
    for seed in range(400):
        found = standing(contests([0.0, 0.1, 0.2], 3, 0.2, seed))
        missed += float(found.worth[2] - found.worth[0]) - found.width(0, 2) > 0.2
    assert missed <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)


def test_the_fall_is_the_slope_of_a_logarithm():
    steps = torch.tensor([100, 200, 400, 800])
    losses = 5 - 0.7 * steps.double().log()
    assert fall_per_step(steps, losses, 350) == pytest.approx(0.7 / 350)
    assert fall_per_step(steps, -losses, 350) == 0
    assert math.isnan(fall_per_step(steps[:2], losses[:2], 350))
