import math

import pytest
import torch
from bandit_play import pull_regret, simulate_pulls, ucb1_regret_bound

from liveselect.functional.bandit import (
    allocate,
    arm_means,
    credit_pulls,
    exploration_bonus,
    follow_controls,
    follow_moments,
    neighbour_weights,
    top_arms,
    ucb_scores,
)

torch.set_num_threads(1)
SEEDS = 12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def compressed(matrix):
    """The rows of a square matrix without its zeros: starts, columns, values."""
    rows, columns = matrix.nonzero(as_tuple=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), rows.bincount(minlength=len(matrix)).cumsum(0)])
    return starts, columns, matrix[rows, columns]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("released", "expected", "order"),
    [(False, (0.207298, 0.264597, 0.215971), [1, 2, 0]), (True, (0.195971, 0.201743, 0.207609), [2, 1, 0])],
)
def test_scores_worked_out_by_hand_in_both_forms(released, expected, order):
    pulls = doubles(4, 1, 5)
    scores = ucb_scores(doubles(0.10, 0.05, 0.12) * pulls, pulls, alpha=0.1, released=released)
    torch.testing.assert_close(scores, doubles(*expected), atol=5e-7, rtol=0)
    assert top_arms(scores, 3, generator()).tolist() == order


def test_the_first_round_has_no_bonus_where_all_arms_are_unknown():
    assert torch.equal(exploration_bonus(torch.zeros(3).double(), 1.0), torch.full((3,), torch.inf).double())
    assert torch.equal(exploration_bonus(torch.zeros(3).double(), 1.0, released=True), torch.zeros(3).double())
    assert exploration_bonus(doubles(1, 0), 1.0).tolist() == [0.0, math.inf]


def test_unvisited_arms_come_first_in_an_order_that_the_seed_draws():
    scores = ucb_scores(doubles(50, 0, 0, 0, 50), doubles(1, 0, 0, 0, 1), 1.0)
    orders = {tuple(top_arms(scores, 5, generator(seed)).tolist()) for seed in range(60)}
    assert {order[:3] for order in orders} == {(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)}
    assert {order[3:] for order in orders} == {(0, 4), (4, 0)}
    assert torch.equal(top_arms(scores, 5, generator(7)), top_arms(scores, 5, generator(7)))


def test_closed_arms_are_never_returned_even_when_that_leaves_fewer():
    is_open = torch.tensor([False, True, False, True])
    assert sorted(top_arms(doubles(9, 1, 9, 2), 3, generator(), is_open).tolist()) == [1, 3]


def test_a_neighbour_is_credited_as_much_as_it_is_alike():
    weight = neighbour_weights(torch.tensor(0.05, dtype=torch.float64), 0.2)
    assert weight == pytest.approx(0.75)
    weights = torch.tensor([[1.0, weight], [weight, 1.0]], dtype=torch.float64)
    for released, pulls_of_neighbour in ((False, 0.75), (True, 1.0)):
        rewards, pulls = torch.zeros(2, 2, dtype=torch.float64)
        credit_pulls(rewards, pulls, torch.tensor([0]), doubles(0.4), compressed(weights), released)
        torch.testing.assert_close(rewards, doubles(0.4, 0.3))
        torch.testing.assert_close(pulls, doubles(1.0, pulls_of_neighbour))
        torch.testing.assert_close(arm_means(rewards, pulls)[1], doubles(0.3 / pulls_of_neighbour)[0])


def test_credit_equals_the_dense_product_whatever_the_order_of_pulls():
    arms, outcomes = torch.tensor([3, 0, 5]), doubles(1.0, -2.0, 0.5)
    dense = torch.rand(6, 6, generator=generator(), dtype=torch.float64).round(decimals=1)
    dense = ((dense + dense.T) / 2).fill_diagonal_(1.0)
    expected = dense[arms].T @ outcomes, dense[arms].sum(0)
    for order in ([0, 1, 2], [2, 0, 1]):
        state = torch.zeros(2, 6, dtype=torch.float64)
        credit_pulls(*state, arms[order], outcomes[order], compressed(dense))
        torch.testing.assert_close(state, torch.stack(expected))


def test_the_share_of_a_budget_is_proportional_and_respects_what_there_is():
    weights, room = doubles(1, 1, 2, 0, 4), torch.tensor([100, 100, 100, 100, 10])
    assert allocate(weights, torch.full((5,), 1000), 80).tolist() == [10, 10, 20, 0, 40]
    assert allocate(weights, room, 50).tolist() == [10, 10, 20, 0, 10]
    assert allocate(weights, room, 500).tolist() == [100, 100, 100, 0, 10]
    assert allocate(weights, torch.zeros(5, dtype=torch.int64), 5).tolist() == [0] * 5


def test_shares_of_any_budget_add_up_and_stay_within_a_unit_of_their_proportion():
    draws = generator()
    for _ in range(200):
        weights = torch.rand(7, generator=draws, dtype=torch.float64)
        room = torch.randint(0, 30, (7,), generator=draws)
        budget = int(torch.randint(0, 150, (), generator=draws))
        counts = allocate(weights, room, budget)
        assert int(counts.sum()) == min(budget, int(room.sum()))
        assert (counts <= room).all()
        free = counts < room
        if free.sum() > 1:
            level = counts[free].double() / weights[free]
            assert (level[0] - level).abs().max() <= 1 / weights[free].min()


def test_running_moments_are_those_of_the_values_and_forget_the_past_geometrically():
    values = torch.randn(50, generator=generator(), dtype=torch.float64)
    first = follow_moments(None, values)
    assert first == pytest.approx((float(values.mean()), float(values.var())))
    constant = doubles(3.0, 3.0)
    moments = first
    for _ in range(200):
        moments = follow_moments(moments, constant, decay=0.9)
    assert moments == pytest.approx((3.0, 0.0), abs=1e-6)
    assert follow_moments((1.0, 4.0), doubles(2.0), decay=0.75, center=0.0) == pytest.approx(
        (0.75, 0.75 * 4 + 0.25 * 1.5625)
    )


def test_level_and_spread_of_controls_follow_a_jump_of_their_scale_within_one_round():
    for jump in (1e3, 1e-3):
        moments = None
        for factor in (1.0, 1.0, 1.0, jump):
            level, variance = 2 * factor, factor**2
            values = level + math.sqrt(variance) * doubles(-1, 1).repeat(8) * math.sqrt(15 / 16)
            moments = follow_controls(moments, values)
        assert abs(moments[0] - level) < 1.1 * math.sqrt(variance)
        assert 1 / 2.5 < math.sqrt(moments[1] / variance) < 2.5


def test_steady_controls_are_averaged_and_a_shift_or_a_factor_of_all_passes_through():
    draws = torch.randn(400, 16, generator=generator(), dtype=torch.float64)

    def levels(shift, factor):
        moments, found = None, []
        for values in draws:
            moments = follow_controls(moments, shift + factor * values)
            found.append(moments)
        return doubles(*(level for level, _ in found)), doubles(*(variance for _, variance in found))

    level, variance = levels(0.0, 1.0)
    # weights of one half for the round and its past: the variance of a mean of 16 falls to a third
    assert float(level.var()) == pytest.approx(1 / 16 / 3, rel=0.25)
    assert float(variance.log().mean()) == pytest.approx(0.0, abs=0.1)
    torch.testing.assert_close(levels(7.0, 1e3)[0], 7.0 + 1e3 * level)
    torch.testing.assert_close(levels(7.0, 1e3)[1], 1e6 * variance)


def test_influence_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="only finite ones, got"):
        follow_moments(None, doubles(1.0, math.nan))


def mean_regret(*, drift=0.0, arms=200, k=10, rounds=400, scale=1.0, **settings):
    """Mean regret per pull over the seeds and its standard error; arms drawn from a normal, in the unit of their sd."""
    results = []
    for seed in range(SEEDS):
        draws = generator(seed)
        means = torch.randn(1, arms, generator=draws, dtype=torch.float64)
        rows = [means[0]]
        for _ in range(rounds - 1):
            step = torch.randn(arms, generator=draws, dtype=torch.float64) if drift else 0.0
            rows.append(math.sqrt(1 - drift**2) * rows[-1] + drift * step)
        means = torch.stack(rows)
        pulled = simulate_pulls(means * scale, k, generator=draws, noise=scale, **settings)
        results.append(float(pull_regret(means, pulled).mean()))
    results = torch.tensor(results)
    return float(results.mean()), float(results.std()) / math.sqrt(SEEDS)


# The expected values are means over twelve seeds too, given to two decimals.
@pytest.mark.parametrize(
    ("expected", "settings"),
    [
        (0.25, {"alpha": 0.1}),
        (0.19, {"alpha": 0.3}),
        (0.88, {"alpha": 2.0}),
        (0.43, {"alpha": 0.3, "released": True}),
        (1.02, {"alpha": 1e-4, "released": True}),
        (0.91, {"alpha": 1e-4, "released": True, "scale": 1e-3}),
        (0.75, {"alpha": 0.3, "drift": 0.10}),
        (0.62, {"alpha": 0.3, "drift": 0.10, "discount": 0.99}),
        (1.04, {"alpha": 0.3, "drift": 0.02, "discount": 0.95}),
    ],
    ids=str,
)
def test_regret_is_what_an_independent_simulation_found(expected, settings):
    regret, standard_error = mean_regret(**settings)
    tolerance = max(0.1 * expected, 2 * math.sqrt(2) * standard_error) + 0.005
    assert regret == pytest.approx(expected, abs=tolerance)


def bernoulli_pulls(probabilities, pulls, alpha, seed):
    """UCB1 on Bernoulli arms, one pull at a time; returns the pulled arms."""
    draws = generator(seed)
    rewards, counts = torch.zeros(2, len(probabilities), dtype=torch.float64)
    history = []
    for _ in range(pulls):
        arm = top_arms(ucb_scores(rewards, counts, alpha), 1, draws)
        credit_pulls(rewards, counts, arm, (torch.rand(1, generator=draws) < probabilities[arm]).double())
        history.append(arm)
    return torch.cat(history)


def test_ucb1_on_bernoulli_arms_stays_below_its_bound_and_its_regret_per_pull_falls():
    probabilities = doubles(0.9, 0.8, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2)
    gaps = 0.9 - probabilities
    regret = torch.stack([gaps[bernoulli_pulls(probabilities, 1500, 1.0, seed)] for seed in range(4)]).mean(0).cumsum(0)
    for n in (100, 400, 1500):
        assert float(regret[n - 1]) <= ucb1_regret_bound(gaps, n)
    assert regret[1499] / 1500 < 0.7 * regret[399] / 400 < 0.7 * 0.9 * regret[99] / 100


def test_without_exploration_some_runs_never_leave_a_bad_arm():
    probabilities = doubles(0.6, 0.5)
    last = [int(bernoulli_pulls(probabilities, 200, 0.0, seed)[-1]) for seed in range(20)]
    assert 0 < sum(last) < 20


def test_the_bound_of_ucb1_by_hand():
    assert ucb1_regret_bound(doubles(0.0, 0.5), 100) == pytest.approx(
        8 * math.log(100) / 0.5 + (1 + math.pi**2 / 3) * 0.5
    )


def test_regret_of_the_best_arms_is_zero_and_follows_means_that_drift():
    means = doubles(3, 1, 2, 0)
    assert pull_regret(means, torch.tensor([[0, 2], [1, 3]])).tolist() == [0.0, 2.0]
    drifting = torch.stack([means, means.flip(0)])
    assert pull_regret(drifting, torch.tensor([[0, 2], [0, 2]])).tolist() == [0.0, 2.0]
