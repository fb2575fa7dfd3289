"""Weights of a mixture: bounds that hold, means that chance does not move, and the maximum that the steps go to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from liveselect.functional.mixture import mirror_step, shrunken_means, within_bounds

torch.set_num_threads(1)


def simplex(values):
    weights = torch.tensor(values, dtype=torch.float64)
    return weights / weights.sum()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12),
    st.lists(st.floats(0.01, 1.0), min_size=12, max_size=12),
    st.floats(0.0, 1.0),
    st.floats(1.0, 20.0),
)
def test_the_bounds_hold_exactly_and_the_rest_keeps_its_proportions(values, shares, floor, cap):
    weights, share = simplex(values), simplex(shares[: len(values)])
    least, most = floor * share, cap * share
    found = within_bounds(weights, least, most)
    assert bool((found >= least).all())
    assert bool((found <= most).all())
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-9)
    free = (found > least) & (found < most)
    factors = (found / weights)[free]
    if len(factors):
        factor = float(factors[0])
        torch.testing.assert_close(factors, torch.full_like(factors, factor), rtol=1e-6, atol=0.0)
        assert bool((weights * factor <= least * (1 + 1e-6))[found == least].all())
        assert bool((weights * factor >= most * (1 - 1e-6))[found == most].all())


def test_what_keeps_to_its_bounds_is_left_alone_and_a_weight_of_zero_stays_at_its_floor():
    weights = simplex([3.0, 2.0, 5.0])
    torch.testing.assert_close(within_bounds(weights, 0 * weights, 0 * weights + 1), weights)
    gone = within_bounds(simplex([1.0, 0.0, 1.0]), torch.tensor([0.0, 0.1, 0.0]).double(), torch.ones(3).double())
    torch.testing.assert_close(gone, torch.tensor([0.45, 0.1, 0.45], dtype=torch.float64))
    with pytest.raises(ValueError, match="lower the floor, or raise the cap"):
        within_bounds(simplex([1.0, 0.0]), torch.zeros(2).double(), torch.tensor([0.5, 0.5]).double())


def test_the_steps_go_to_the_maximum_of_the_worth_less_the_divergence():
    base, worth, strength = simplex([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, -0.3, 0.0, 0.2]).double(), 2.0
    weights = base
    for _ in range(60):
        weights = mirror_step(weights, base, worth, strength, 0.3)

    def loss(logits):
        found = torch.softmax(torch.tensor(logits), 0)
        return float((found * (found / base).log()).sum() / strength - found @ worth)

    best = torch.softmax(torch.tensor(minimize(loss, [0.0] * 4, tol=1e-12).x), 0)
    torch.testing.assert_close(weights, best, rtol=1e-4, atol=1e-5)
    once = mirror_step(base, base, worth, strength, 1.0)
    torch.testing.assert_close(once, weights, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cells", [8, 60])
def test_means_that_differ_by_chance_alone_are_zero_and_others_are_nearer_to_the_truth_than_plain_means(cells):
    generator = torch.Generator().manual_seed(cells)
    counts = torch.full((cells,), 6.0, dtype=torch.float64)
    by_chance, errors, plain = 0, 0.0, 0.0
    for _ in range(200):
        noise = torch.randn(cells, generator=generator, dtype=torch.float64) * 6**0.5
        by_chance += int((shrunken_means(noise, counts, [], 1.0).abs() > 0.1).any())
        truth = 0.4 * torch.randn(cells, generator=generator, dtype=torch.float64)
        sums = counts * truth + noise
        errors += float((shrunken_means(sums, counts, [], 1.0) - truth).square().sum())
        plain += float((sums / counts - truth).square().sum())
    assert errors < 0.75 * plain
    assert by_chance < 200 * 0.6


def test_cells_share_what_their_source_is_worth():
    """Twenty cells of two measurements each: alone they show little, together their source does."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(20) % 2
    counts = torch.full((20,), 2.0, dtype=torch.float64)
    truth = torch.where(codes == 0, 0.5, -0.5).double()
    errors = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        noise = torch.randn(20, generator=generator, dtype=torch.float64) * 2**0.5
        for place, factors in enumerate(([codes], [])):
            errors[place] += (shrunken_means(counts * truth + noise, counts, factors, 1.0) - truth).square().mean()
    assert errors[0] < 0.5 * errors[1]
    assert torch.equal(shrunken_means(0 * counts, 0 * counts, [codes], 8.0), 0 * counts)
