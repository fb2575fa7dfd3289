import io

import pytest
import torch
from fakes import FakeSource, fake_context
from fakes import play as play_one
from torch import Tensor

from liveselect.functional.bandit import ucb_scores
from liveselect.grammar import InfluenceEstimator
from liveselect.pool import GroupGeometry
from liveselect.rounds import SelectionRun
from liveselect.selectors import PriorSelector, UCBSelector, UniformSelector

torch.set_num_threads(1)


def arms_source(sizes=(40, 40, 40, 40, 40), seed=0, **kwargs) -> FakeSource:
    """Candidates whose groups are scattered over the ids."""
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    tokens = torch.arange(len(groups)).view(-1, 1).expand(-1, 3)
    return FakeSource(tokens, groups=groups.int(), group_names=tuple("abcdefghij"[: len(sizes)]), **kwargs)


class ArmInfluence(InfluenceEstimator):
    """Influence with a mean for each arm and seeded noise for each candidate; arms may change with the round."""

    def __init__(self, source: FakeSource, means, noise: float = 1.0, level: float = 0.0, scale: float = 1.0) -> None:
        self.groups = source.pool.groups.long()
        self.means = torch.tensor(means, dtype=torch.float64)
        draws = torch.randn(source.pool.size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.noise = noise * draws
        self.level, self.scale = level, scale

    def score(self, model, batch) -> Tensor:
        ids = batch["id"]
        return self.level + self.scale * (self.means[self.groups[ids]] + self.noise[ids])


def a_run(source, estimator, **settings) -> SelectionRun:
    settings = {"pulls": 2, "at_once": 1, "probes": 4, "controls": 8, "arms": 2, **settings}
    return SelectionRun(UCBSelector(**settings), estimator, UniformSelector(), 0, source)


def known(run) -> dict:
    """What the selector of a run knows of its arms."""
    return run.selector.state_dict()["rewards"]


def play(run, source, rounds, budget, first=0):
    """Run rounds and return, for each, the arms that were pulled in their order and the ids of the plan."""
    pulled, plans = [], []
    assert run.next_round == first
    for _ in range(rounds):
        plan = play_one(run, budget)
        bandit = getattr(run.selector, "selector", run.selector)
        measured = torch.tensor(run.ledger.rounds[-1].measured)[bandit.controls :]
        pulled.append(source.pool.groups[measured].unique_consecutive().tolist())
        plans.append(plan.ids)
    return pulled, plans


def test_every_arm_is_pulled_once_before_any_twice_in_an_order_that_the_seed_draws():
    orders = set()
    for seed in range(4):
        source = arms_source()
        run = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]))
        run.seed, order = seed, []
        for _ in range(3):
            play_one(run, 4)
            measured = torch.tensor(run.ledger.rounds[-1].measured)[8:]
            order += source.pool.groups[measured].unique_consecutive().tolist()
        assert sorted(order[:5]) == [0, 1, 2, 3, 4]
        orders.add(tuple(order[:5]))
    assert len(orders) > 1


def test_the_best_arms_are_found_and_share_the_budget_evenly():
    source = arms_source(sizes=(200,) * 6)
    run = a_run(source, ArmInfluence(source, [0, 3, 0, 0, 3, 0]))
    pulled, plans = play(run, source, 8, 20)
    assert source.pool.groups[plans[-1]].bincount(minlength=6).tolist() == [0, 10, 0, 0, 10, 0]
    pulls = torch.tensor([arm for arms in pulled for arm in arms]).bincount(minlength=6)
    assert pulls[[1, 4]].min() > pulls[[0, 2, 3, 5]].max()


def test_an_outcome_is_known_to_the_next_pull_of_the_same_round():
    for at_once, expected in ((1, [0, 0, 0, 0]), (2, [0, 1, 0, 1])):  # two arms at once are two different ones
        source = arms_source(sizes=(400,) * 2)
        run = a_run(source, ArmInfluence(source, [5, -5], noise=0.1), pulls=4, at_once=at_once, alpha=0.0)
        play(run, source, 2, 2)
        parts = torch.tensor(run.ledger.rounds[-1].measured)[8:].split(4)
        assert [int(source.pool.groups[part[0]]) for part in parts] == expected


def test_probes_lie_in_front_of_what_training_takes_and_nothing_is_trained_on_twice():
    source = arms_source(sizes=(60, 60))
    run = a_run(source, ArmInfluence(source, [1, 1], noise=0.1), tau=None, alpha=1.0)
    _, plans = play(run, source, 5, 20)
    probed = torch.cat([torch.tensor(record.measured[8:]) for record in run.ledger.rounds])
    trained = torch.cat(plans)
    assert len(trained.unique()) == len(trained) == 100
    first_round = torch.tensor(run.ledger.rounds[0].measured[8:])
    assert torch.isin(first_round, plans[0]).all()
    assert torch.isin(probed[:-8], trained).float().mean() > 0.9


def test_training_walks_each_arm_in_one_order_whatever_the_rounds_are():
    taken = []
    for rounds, budget in ((4, 6), (2, 12)):
        source = arms_source(sizes=(60, 60))
        run = a_run(source, ArmInfluence(source, [2, 2], noise=0.0), tau=None)
        _, plans = play(run, source, rounds, budget)
        ids = torch.cat(plans)
        taken.append({arm: set(ids[source.pool.groups[ids] == arm].tolist()) for arm in (0, 1)})
    assert taken[0] == taken[1]


@pytest.mark.parametrize(("level", "scale"), [(100.0, 1.0), (-3.0, 1e-4), (0.0, 1e5)])
def test_level_and_unit_of_influence_change_nothing(level, scale):
    results = []
    for settings in ({}, {"level": level, "scale": scale}):
        source = arms_source()
        run = a_run(source, ArmInfluence(source, [0, 1, 2, 1, 0], **settings))
        pulled, plans = play(run, source, 6, 8)
        results.append((pulled, torch.cat(plans).tolist()))
    assert results[0] == results[1]


def test_an_arm_as_good_as_random_data_has_a_reward_near_zero_and_of_unit_spread():
    rewards = []
    for seed in range(20):
        source = arms_source(sizes=(300,) * 10, seed=seed)
        run = a_run(source, ArmInfluence(source, [7.0] * 10, noise=2.0), pulls=10, at_once=10, controls=200, probes=8)
        play(run, source, 1, 4)
        rewards += known(run)["sums"].tolist()
    rewards = torch.tensor(rewards)
    assert abs(float(rewards.mean())) < 3 / 200**0.5
    assert float(rewards.std()) == pytest.approx(1.0, abs=0.15)


def test_the_scores_of_the_record_are_the_mean_rewards_and_the_order_is_that_of_the_bound():
    source = arms_source(sizes=(100,) * 4)
    run = a_run(source, ArmInfluence(source, [0, 1, 2, 3]), pulls=4, arms=1, alpha=0.7)
    _, plans = play(run, source, 4, 5)
    state = known(run)
    best = ucb_scores(state["sums"], state["pulls"], 0.7).argmax()
    assert source.pool.groups[plans[-1]].unique().tolist() == [best]
    shown = {example.group: example.score for example in run.ledger.rounds[-1].examples}
    means = state["sums"] / state["pulls"]
    rows = run.ledger.rounds[-1].groups
    assert [rows[name]["pulls"] for name in "abcd"] == state["pulls"].tolist()
    scores = torch.tensor([rows[name]["reward"] + rows[name]["bonus"] for name in "abcd"], dtype=torch.float64)
    torch.testing.assert_close(scores, ucb_scores(state["sums"], state["pulls"], 0.7))
    assert shown == {name: pytest.approx(float(means[i])) for i, name in enumerate("abcd")}


def test_an_exhausted_arm_is_retired_and_the_run_goes_on_to_the_end_of_the_pool():
    source = arms_source(sizes=(10, 50, 20))
    run = a_run(source, ArmInfluence(source, [5, 0, 1]), tau=None, pulls=3, at_once=3)
    pulled, plans = play(run, source, 8, 10)
    assert sorted(torch.cat(plans).tolist()) == list(range(80))
    for index in range(8):
        left = torch.ones(80, dtype=torch.bool)
        left[torch.cat([torch.empty(0, dtype=torch.int64), *plans[:index]])] = False
        open_arms = set(source.pool.groups[left].tolist())
        assert set(pulled[index]) <= open_arms
        assert run.ledger.rounds[index].metrics["arms/retired"] == 3 - len(open_arms)
    play(run, source, 1, 10, first=8)
    assert int(source.pool.uses.max()) == 2


def test_arms_below_tau_are_left_out_while_others_suffice_and_the_record_says_when_they_do_not():
    source = arms_source(sizes=(30, 30, 30))
    run = a_run(source, ArmInfluence(source, [4, -4, -4], noise=0.1), pulls=3, arms=3, tau=0.0)
    _, plans = play(run, source, 4, 10)
    groups = [source.pool.groups[ids].bincount(minlength=3).tolist() for ids in plans]
    assert groups[:3] == [[10, 0, 0]] * 3
    assert groups[3][0] == 0
    assert not run.ledger.rounds[2].notes
    assert "10 of 10 candidates go beyond tau" in run.ledger.rounds[3].notes[0]


def test_the_first_good_arm_shares_the_round_with_arms_that_nobody_knows():
    source = arms_source(sizes=(40,) * 6)
    run = a_run(source, ArmInfluence(source, [4, -4, -4, -4, -4, -4], noise=0.1), pulls=2, at_once=2, arms=3, tau=0.0)
    while 0 not in [arm for arms in play(run, source, 1, 12, first=len(run.ledger.rounds))[0] for arm in arms]:
        assert len(run.ledger.rounds) < 4
    known = (run.selector.state_dict()["rewards"]["pulls"] > 0).nonzero().flatten().tolist()
    shares = source.pool.groups[run.plan.ids].bincount(minlength=6).tolist()
    assert shares[0] == 12 // (1 + min(2, 6 - len(known)))
    assert not any(shares[arm] for arm in known if arm != 0)
    assert not run.ledger.rounds[-1].notes


def test_a_prior_that_leaves_too_few_lets_the_arms_take_what_comes_next():
    source = arms_source()
    inner = UCBSelector(pulls=5, at_once=5, probes=2, controls=4, arms=2, tau=None)
    selector = PriorSelector(inner, torch.arange(200.0), ratio=0.1)
    run = SelectionRun(selector, ArmInfluence(source, [0, 1, 2, 3, 4]), UniformSelector(), 0, source)
    _, (plan,) = play(run, source, 1, 30)
    assert sorted(plan.tolist()) == list(range(170, 200))


def test_gamma_bounds_what_one_round_takes_from_an_arm():
    source = arms_source(sizes=(40, 40, 40))
    run = a_run(source, ArmInfluence(source, [3, 2, 1], noise=0.1), pulls=3, arms=1, gamma=0.1, tau=None)
    _, plans = play(run, source, 1, 10)
    assert source.pool.groups[plans[0]].bincount(minlength=3).tolist() == [4, 3, 3]


def test_influence_that_is_not_finite_is_left_out_and_an_arm_without_any_is_not_credited():
    source = arms_source(sizes=(40, 40))
    estimator = ArmInfluence(source, [1, 2])
    estimator.means[0] = float("nan")
    run = a_run(source, estimator, tau=None)
    play(run, source, 1, 4)
    assert known(run)["pulls"].tolist() == [0.0, 1.0]
    assert "measured influences are not finite" in run.ledger.rounds[0].notes[0]
    estimator.means[1] = float("inf")
    other = a_run(source, estimator)
    play(other, source, 1, 4)
    assert "drawn uniformly" in other.ledger.rounds[0].notes[1]


def test_neighbours_learn_from_a_pull_as_much_as_they_are_near():
    source = arms_source(sizes=(40, 40, 40))
    source.pool.geometry = GroupGeometry(
        starts=torch.tensor([0, 1, 2, 2]),
        columns=torch.tensor([1, 0]),
        distances=torch.tensor([0.05, 0.05]),
        reach=0.2,
        typical=torch.stack([(source.pool.groups == arm).nonzero()[0, 0] for arm in range(3)]),
        offsets=torch.rand(120),
    )
    run = a_run(source, ArmInfluence(source, [1, 1, 0]), pulls=3, at_once=1, tau=None)
    pulled, _ = play(run, source, 1, 4)
    pulls = known(run)["pulls"]
    # the neighbour of an arm that was pulled is known, so the stranger is pulled before it
    first = pulled[0].index(2) + 1
    assert first <= 2
    assert float(pulls[2]) >= 1.0
    near = pulled[0].count(0) + pulled[0].count(1)
    assert float(pulls[0] + pulls[1]) == pytest.approx(1.75 * near)


def test_arms_at_the_cutoff_learn_nothing_and_a_cutoff_beyond_what_is_listed_is_told_before_training():
    source = arms_source((8, 8, 8))
    far = torch.tensor([0.2, 0.2], dtype=torch.float32)
    source.pool.geometry = GroupGeometry(
        torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0]), far, 0.2, torch.arange(3), torch.zeros(24)
    )
    run = a_run(source, ArmInfluence(source, [0, 1, 2]), pulls=1, cutoff=0.2)
    (pulled,), _ = play(run, source, 1, 4)
    assert known(run)["pulls"].tolist() == [float(arm in pulled) for arm in range(3)]
    with pytest.raises(ValueError, match=r"list them only up to 0\.2: lower the cutoff"):
        UCBSelector(cutoff=0.3).check(fake_context(source).round, 4)


def test_without_a_cutoff_neighbours_learn_nothing():
    source = arms_source(sizes=(40, 40))
    source.pool.geometry = GroupGeometry(
        torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.zeros(2), 0.1, torch.tensor([0, 1]), torch.zeros(80)
    )
    with pytest.raises(ValueError, match=r"list them only up to 0\.1: lower the cutoff"):
        play(a_run(source, ArmInfluence(source, [1, 1])), source, 1, 4)
    run = a_run(source, ArmInfluence(source, [1, 1]), pulls=1, cutoff=None)
    play(run, source, 1, 4)
    assert sorted(known(run)["pulls"].tolist()) == [0.0, 1.0]


def test_forgetting_lets_the_choice_follow_arms_that_change():
    followed = {}
    for discount in (1.0, 0.8):
        source = arms_source(sizes=(2000,) * 4)
        estimator = ArmInfluence(source, [3, 0, 0, 0])
        run = a_run(source, estimator, discount=discount, arms=1)
        play(run, source, 40, 4)
        estimator.means = torch.tensor([-1, 0, 0, 3], dtype=torch.float64)
        _, plans = play(run, source, 12, 4, first=40)
        followed[discount] = source.pool.groups[plans[-1]].unique().tolist()
    assert followed == {1.0: [0], 0.8: [3]}


def test_an_arm_that_training_has_shown_is_credited_once_and_needs_no_probes():
    source = arms_source(sizes=(100,) * 4)
    run = a_run(source, ArmInfluence(source, [2, 1, 0, -1], noise=0.0), pulls=4, at_once=1, probes=4)
    play(run, source, 2, 8)
    before = known(run)
    level, variance = before["moments"]
    trained = (source.pool.groups == 0).nonzero().flatten()[:10]
    influence = torch.linspace(1.0, 2.0, 10)
    run.selector.observe_step(trained[:5], influence[:5])
    run.selector.observe_step(trained[5:], influence[5:])
    context = fake_context(source, index=2, candidates=source.pool.available(8))
    asked = run.selector.propose(context.round)
    after = known(run)
    outcome = (influence.double().mean() - level) / (variance / 4) ** 0.5
    assert float(after["sums"][0] - before["sums"][0]) == pytest.approx(float(outcome))
    assert (after["pulls"] - before["pulls"]).tolist() == [1.0, 0.0, 0.0, 0.0]
    while len(asked):
        run.selector.observe(asked, torch.zeros(len(asked)))
        asked = run.selector.propose(context.round)
        assert not (source.pool.groups[asked] == 0).any()
    assert run.selector.select(context.round, 8).metrics["arms/overheard"] == 1.0


def test_what_is_overheard_before_any_control_was_measured_is_dropped():
    source = arms_source()
    selector = UCBSelector()
    selector.observe_step(torch.arange(5), torch.ones(5))
    selector.propose(fake_context(source).round)
    assert not selector.state_dict()["rewards"]["pulls"].any()


def saved(run):
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_resumed_run_pulls_the_same_arms_to_the_bit(cut):
    def new():
        source = arms_source(sizes=(30,) * 7)
        estimator = ArmInfluence(source, [0, 1, 2, 3, 2, 1, 0], level=5.0)
        return a_run(source, estimator, discount=0.95, pulls=3, at_once=2), source

    whole, source = new()
    pulled, plans = play(whole, source, 8, 12)
    first, source = new()
    play(first, source, cut, 12)
    state = saved(first)
    second, source = new()
    second.load_state_dict(state)
    continued, later = play(second, source, 8 - cut, 12, first=cut)
    assert continued == pulled[cut:]
    assert all(torch.equal(a, b) for a, b in zip(later, plans[cut:], strict=True))
    whole, second = ({**known(run), **run.selector.state_dict()} for run in (whole, second))
    for name in ("sums", "pulls", "cursors"):
        assert torch.equal(whole[name], second[name])
    assert whole["moments"] == second["moments"]


def test_what_was_overheard_before_a_checkpoint_is_credited_after_it():
    source = arms_source()
    run = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]), tau=None)
    play(run, source, 2, 8)
    run.selector.observe_step(torch.arange(6), torch.linspace(0.0, 1.0, 6))
    state = saved(run)
    source = arms_source()
    resumed = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]), tau=None)
    resumed.load_state_dict(state)
    for one in (run, resumed):
        one.selector.propose(fake_context(source, index=2).round)
    assert known(resumed)["pulls"].sum() > state["selector"]["state"]["rewards"]["pulls"].sum()
    assert all(torch.equal(known(run)[name], known(resumed)[name]) for name in ("sums", "pulls"))


def test_a_checkpoint_of_other_arms_is_refused():
    source = arms_source()
    run = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]))
    play(run, source, 1, 4)
    source = arms_source(seed=1)
    other = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]))
    other.selector.load_state_dict(run.selector.state_dict())
    with pytest.raises(ValueError, match="the checkpoint was made with the arms 5/"):
        play(other, source, 1, 4)
    with pytest.raises(ValueError, match=r"Pass the groups \(clusters\) that the run began with"):
        other.selector.check(fake_context(source).round, 4)  # before training begins


@pytest.mark.parametrize("settings", [{"probes": 5}, {"controls": 0}])
def test_a_checkpoint_whose_rewards_have_another_unit_is_refused(settings):
    source = arms_source()
    run = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]))
    other = a_run(source, ArmInfluence(source, [0, 1, 2, 3, 4]), **settings)
    other.selector.load_state_dict(run.selector.state_dict())  # nothing was measured yet
    play(run, source, 1, 4)
    with pytest.raises(ValueError, match="holds rewards in standard errors of 4 probes, this run counts them in"):
        other.selector.load_state_dict(run.selector.state_dict())


def test_alpha_and_tau_may_change_when_a_run_is_resumed():
    source = arms_source()
    run = a_run(source, ArmInfluence(source, [-2, -1, 0, 1, 2], noise=0.1), pulls=5)
    play(run, source, 1, 4)
    other = a_run(source, ArmInfluence(source, [-2, -1, 0, 1, 2], noise=0.1), pulls=5, arms=5, alpha=0.0, tau=None)
    other.selector.load_state_dict(run.selector.state_dict())
    other.plan = run.plan
    _, (ids,) = play(other, source, 1, 25, first=1)
    assert len(source.pool.groups[ids].unique()) == 5


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_run_goes_on_when_all_arms_are_used_up_and_uses_everything_equally_often(alpha):
    source = arms_source((7, 1, 12))
    run = a_run(source, ArmInfluence(source, [3, 1, -3]), alpha=alpha, gamma=0.5)
    play(run, source, 10, 4)
    assert source.pool.uses.tolist() == [2] * 20


def test_more_pulls_than_there_are_candidates_measure_each_of_them_once():
    source = arms_source((1, 2, 30))
    run = a_run(source, ArmInfluence(source, [0, 1, 2]), pulls=50, at_once=50, arms=50)
    _, (ids,) = play(run, source, 1, 16)
    assert set(run.ledger.rounds[-1].measured) == set(range(33))
    assert known(run)["pulls"].tolist() == [1.0, 1.0, 8.0]
    assert len(ids.unique()) == 16


def test_a_pool_of_a_single_group_has_no_arms():
    source = FakeSource(torch.zeros(8, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="single one: cluster it"):
        UCBSelector().propose(fake_context(source).round)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"pulls": 0}, "pulls of at least 1"),
        ({"controls": 1}, "at least 2"),
        ({"gamma": 0.0}, "gamma above 0"),
        ({"discount": 1.5}, "discount above 0"),
        ({"cutoff": 0.0}, "positive cutoff"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UCBSelector(**settings)


def test_without_controls_rewards_are_told_in_their_running_root_mean_square():
    source = arms_source(sizes=(100,) * 4)
    run = a_run(source, ArmInfluence(source, [1, 2, 3, 4], noise=0.0), pulls=4, at_once=4, controls=0)
    play(run, source, 1, 4)
    outcomes = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    torch.testing.assert_close(known(run)["sums"], outcomes / outcomes.square().mean().sqrt())


def test_influence_of_candidates_that_were_not_proposed_is_refused():
    source = arms_source()
    selector = UCBSelector()
    ids = selector.propose(fake_context(source).round)
    others = torch.arange(200)[~torch.isin(torch.arange(200), ids)]
    with pytest.raises(ValueError, match="expected the influence of proposed candidates, got that of 3 others"):
        selector.observe(others[:3], torch.zeros(3))
