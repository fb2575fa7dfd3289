"""The width of a choice: it goes to where better scores are worth no more, and chance leaves it where it is."""

import pytest
import torch
from fakes import fake_context, random_source

from liveselect.regressors import HashedRidgeRegressor
from liveselect.selectors import PriorSelector, RegressionSelector, UniformSelector
from liveselect.selectors.width import Width

SIZE = 2000
SCORES = torch.linspace(1, 0, SIZE)  # candidate i is the i-th best


def play(worth, rounds, noise=0.3, probes=24, first=0.4, seed=0):
    """Measure candidates of the kept share in every round; returns the shares, ``(rounds,)``."""
    width, generator, shares = Width(first), torch.Generator().manual_seed(seed), []
    for _ in range(rounds):
        kept = max(1, round(width.share * SIZE))
        ids = torch.randperm(kept, generator=generator)[:probes]
        found = worth(ids / SIZE) + noise * torch.randn(len(ids), generator=generator)
        width.observe(ids, found)
        width.move(torch.arange(SIZE), SCORES)
        shares.append(width.share)
    return torch.tensor(shares)


def test_where_better_scores_are_worth_more_the_choice_becomes_as_narrow_as_it_may():
    assert play(lambda place: -20 * place, 20)[-1] == pytest.approx(0.4 / 16)


def test_where_better_scores_are_worth_less_it_becomes_the_whole_pool():
    assert play(lambda place: 5 * place, 20)[-1] == 1.0


@pytest.mark.parametrize("peak", [0.05, 0.2])
def test_it_ends_where_better_and_worse_scores_are_worth_the_same(peak):
    """Worth falls on both sides of the peak, so that a share of twice as much is balanced."""
    shares = torch.stack(
        [play(lambda place: -10 * (place - peak).abs(), 60, 0.1, 64, seed=seed)[20:] for seed in range(8)]
    )
    assert float(shares.log().mean().exp()) == pytest.approx(2 * peak, rel=0.25)


def test_what_the_model_has_learned_makes_the_choice_wider_again():
    """The worth of a part falls with how much of it was trained on, and comes back slowly."""
    learned, width, generator = torch.zeros(SIZE), Width(0.1), torch.Generator().manual_seed(0)
    shares = []
    for _ in range(80):
        kept = round(width.share * SIZE)
        ids = torch.randperm(kept, generator=generator)[:48]
        width.observe(ids, SCORES[ids] - learned[ids] + 0.05 * torch.randn(len(ids), generator=generator))
        width.move(torch.arange(SIZE), SCORES)
        learned *= 0.9
        learned[: max(1, round(width.share * SIZE / 2))] += 0.2 * 0.1 / width.share  # a narrow part is learned faster
        shares.append(width.share)
    late = torch.tensor(shares[40:])
    assert late.min() > 0.1 / 16
    assert late.max() < 1.0


def test_chance_alone_moves_it_little():
    ends = torch.stack([play(torch.zeros_like, 30, seed=seed)[-1] for seed in range(40)])
    assert abs(float((ends / 0.4).log2().mean())) < 0.5
    assert float((ends / 0.4).log2().abs().mean()) < 1.5


def test_few_or_equal_measurements_say_nothing():
    assert play(lambda place: -5 * place, 20, probes=7)[-1] == 0.4
    assert play(torch.zeros_like, 5, noise=0.0)[-1] == 0.4


def test_what_was_trained_on_already_is_no_evidence():
    width = Width(0.4)
    ids = torch.arange(64)
    width.observe(ids, -SCORES[ids])
    width.move(torch.arange(64, SIZE), SCORES)
    assert width.share == 0.4


def test_it_resumes_between_a_measurement_and_its_round():
    one, other = Width(0.4), Width(0.4)
    ids = torch.arange(0, 640, 20)
    one.observe(ids, SCORES[ids])
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.observe(ids + 1, SCORES[ids])
        each.move(torch.arange(SIZE), SCORES)
    assert one.share == other.share < 0.4
    assert one.state_dict().keys() == other.state_dict().keys()


def test_a_selector_keeps_less_where_better_scores_are_worth_more_and_says_so():
    context = fake_context(random_source(candidates=400))
    worth = torch.linspace(1, 0, 400)
    inner = RegressionSelector(HashedRidgeRegressor(), probes=32, ratio=0.5, min_spearman=None)
    selector = PriorSelector(inner, worth.numpy(), ratio=0.4, offset=1.0, find_width=True)
    ids = selector.propose(context.round)
    selector.observe(ids, worth[ids])
    selection = selector.select(context.round, 40)
    assert selection.metrics["prior/ratio"] == pytest.approx(0.2)
    assert selection.metrics["prior/evidence"] > 2
    assert int(selection.ids.max()) < 0.2 * 400
    again = PriorSelector(
        RegressionSelector(HashedRidgeRegressor(), probes=32, ratio=0.5, min_spearman=None),
        worth.numpy(),
        0.4,
        offset=1.0,
        find_width=True,
    )
    again.load_state_dict(selector.state_dict())
    assert again._kept_share() == pytest.approx(0.2)


def test_the_width_cannot_be_found_without_measurements():
    with pytest.raises(ValueError, match="UniformSelector measures nothing"):
        PriorSelector(UniformSelector(), [0.0], find_width=True)
