"""Live influence inside a prior: what is found, what is left alone, and that it does not go back and forth."""

import math
import warnings

import pytest
import torch
from fakes import FakeSource, fake_context, play
from torch import Tensor

from liveselect.grammar import InfluenceEstimator, SelectionWarning
from liveselect.regressors import HashedRidgeRegressor, TokenTableRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import PriorSelector, RegressionSelector, UniformSelector
from liveselect.selectors.steadiness import Steadiness, Trust
from liveselect.watch import Watch

WIDTH, BUDGET = 16, 40
KINDS = 4  # kind k has the tokens 10 k to 10 k + 9
NAMES = tuple(f"kind {k}" for k in range(KINDS))


def a_source(candidates=4000, reference_kind=0, seed=0):
    """A pool of kinds of text with words of their own, a group for each; the reference set is of one kind."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, KINDS, (candidates,), generator=generator)
    tokens = torch.randint(0, 10, (candidates, WIDTH), generator=generator) + 10 * kinds[:, None]
    reference = torch.randint(0, 10, (8, WIDTH), generator=generator) + 10 * reference_kind
    return FakeSource(tokens, reference, groups=kinds, group_names=NAMES)


def aim_at(source, references):
    source.references = source.reference_labels = references


class Saturates(InfluenceEstimator):
    """What tokens of a kind are worth falls with how much of it was trained on lately, as for a model that learns."""

    def __init__(self, worth, saturation=0.0, noise=0.3, tokens=True) -> None:
        self.worth, self.saturation, self.noise, self.tokens = torch.tensor(worth), saturation, noise, tokens
        self.learned = torch.zeros(KINDS)

    def fit(self, model, round):
        if round.trained is not None:
            share = torch.bincount(round.pool.groups[round.trained], minlength=KINDS) / len(round.trained)
            self.learned = 0.3 * self.learned + share
        self.noises = round.generator("noise of the estimator")
        return {}

    def score(self, model, batch) -> Tensor:
        return self.of_tokens(batch).nanmean(dim=1)

    def score_tokens(self, model, batch) -> Tensor | None:
        return self.of_tokens(batch) if self.tokens else None

    def of_tokens(self, batch):
        tokens = batch["input_ids"]
        worth = (self.worth - self.saturation * self.learned)[tokens // 10]
        found = worth + self.noise * torch.randn(tokens.shape, generator=self.noises)
        found[:, 0] = torch.nan
        return found


def default(**settings):
    """The selector of the recommended preset, with a hard draw inside of the gate."""
    inner = RegressionSelector(
        settings.pop("regressor", None) or TokenTableRegressor(2**12),
        probes=24,
        ratio=0.5,
        temperature=0.0,
        trained_share=0.25,
    )
    return PriorSelector(inner, True, ratio=0.4, offset=1.0, gate=2.0, **settings)


def rounds_of(selector, estimator, source, count=10, watch=None, change=None):
    """Play rounds; returns the run and the share of each kind in each plan, ``(count, KINDS)``."""
    run = SelectionRun(selector, estimator, UniformSelector(), 1, source, watch=watch)
    shares = []
    for index in range(count):
        if change is not None and index == count // 2:
            change(source)
        plan = play(run, BUDGET, fake_context(source))
        shares.append(torch.bincount(source.pool.groups[plan.ids], minlength=KINDS) / BUDGET)
    return run, torch.stack(shares)


def test_the_references_kind_is_found_at_once_and_kept():
    _, shares = rounds_of(default(), Saturates([1.0, 0.0, 0.0, 0.0]), a_source())
    assert shares[0, 0] > 0.9
    assert shares[:, 0].mean() > 0.9


def test_a_reference_that_moves_half_way_is_followed():
    def move(source):
        aim_at(source, source.references + 10)

    _, shares = rounds_of(default(), Saturates([1.0, 1.0, 0.0, 0.0]), a_source(), change=move)
    assert shares[:5, 0].mean() > 0.9
    assert shares[5:, 1].mean() > 0.9


def test_of_two_kinds_that_the_prior_lets_through_the_one_that_is_worth_more_is_taken():
    source = a_source()
    aim_at(source, torch.cat([source.references, source.references + 10]))
    _, shares = rounds_of(default(), Saturates([0.2, 1.0, 0.0, 0.0]), source)
    assert shares[3:, 1].mean() > 0.65
    assert shares[3:, :2].sum(dim=1).mean() > 0.95


def test_an_exchangeable_pool_is_left_alone():
    """All kinds are worth the same, and the reference set is a sample of the pool."""
    source = a_source()
    aim_at(source, source.tokens[torch.randperm(4000, generator=torch.Generator().manual_seed(1))[:400]])
    _, shares = rounds_of(default(), Saturates([0.5, 0.5, 0.5, 0.5]), source)
    assert (shares.mean(dim=0) - 1 / KINDS).abs().max() < 0.15


def test_predictions_count_beside_a_prior_as_much_as_held_out_measurements_of_several_rounds_say():
    trust = Trust()
    assert trust.weight == 0
    trust.learn(0.3, 24)
    few = trust.weight
    assert 0 < few < 0.6
    for _ in range(10):
        trust.learn(0.3, 24)
    assert few < trust.weight < 0.3 / 0.5
    assert trust.correlation == pytest.approx(0.3)
    trust.learn(-0.2, 24)  # chance: one in a hundred rounds of two dozen
    assert trust.weight > 0.2
    trust.learn(math.nan, 0)  # says nothing
    assert trust.weight > 0.2
    again = Trust()
    again.load_state_dict(trust.state_dict())
    for each in (trust, again):
        for _ in range(20):
            each.learn(-0.2, 24)
    assert trust.weight == again.weight == 0
    for _ in range(20):
        trust.learn(0.7, 1000)
    assert trust.weight == 1


def test_a_regressor_that_knows_nothing_leaves_the_choice_to_the_prior():
    """Tokens are worth noise: the kinds that the prior prefers stay, and predictions hardly count."""
    source = a_source()
    aim_at(source, torch.cat([source.references, source.references + 10]))
    run, shares = rounds_of(default(), Saturates([0.0, 0.0, 0.0, 0.0], noise=1.0), source)
    trusted = [record.metrics.get("trust", 0.0) for record in run.ledger.rounds]
    assert sum(trusted) / len(trusted) < 0.3
    assert shares[:, :2].sum(dim=1).mean() > 0.95


def hard_and_forgetful():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SelectionWarning)
        regressor = HashedRidgeRegressor(2**10, forgetting=0.0, damping=1.0)
        return RegressionSelector(regressor, probes=64, ratio=0.1, temperature=0.0, min_spearman=None)


def changes(shares):
    return (shares[1:] - shares[:-1]).abs().sum(dim=1) / 2


@pytest.mark.filterwarnings("ignore::liveselect.grammar.SelectionWarning")
def test_a_narrow_source_that_saturates_is_left_without_oscillation_and_a_hard_choice_is_caught():
    """Two kinds are worth most until they are learned: a hard choice without memory turns round in every round."""
    worth, saturation = [1.0, 0.9, 0.0, 0.0], 1.5
    source = a_source()
    aim_at(source, torch.cat([source.references, source.references + 10]))
    hard, of_hard = rounds_of(hard_and_forgetful(), Saturates(worth, saturation), source, watch=Watch(canaries=0))
    alarms = [alarm.kind for record in hard.ledger.rounds for alarm in record.alarms]
    assert "oscillation" in alarms
    again = a_source()
    aim_at(again, source.references)
    calm, of_calm = rounds_of(default(), Saturates(worth, saturation), again, watch=Watch(canaries=0))
    assert "oscillation" not in [alarm.kind for record in calm.ledger.rounds for alarm in record.alarms]
    assert changes(of_calm)[2:].mean() < 0.5 * changes(of_hard[:5]).mean()
    assert of_calm[2:, :2].sum(dim=1).min() > 0.8  # and it is left to no other kind than the reference's


def test_a_choice_that_turns_twice_counts_half_until_it_is_calm():
    source = a_source(candidates=400)
    groups = source.pool.groups
    plans = {kind: (groups == kind).nonzero().flatten()[:20] for kind in range(2)}
    steady, weights = Steadiness(), []
    for index, kind in enumerate([0, 1, 0, 1, 1, 1, 1, 1]):
        round_ = fake_context(source, index=index, trained=plans[kind]).round
        steady.look(round_, torch.empty(0).long(), torch.empty(0))
        weights.append(steady.weight)
    assert weights[:4] == [1.0, 1.0, 0.5, 0.25]
    assert weights[4:] == sorted(weights[4:])
    assert weights[-1] > 0.5
    saved = Steadiness()
    saved.load_state_dict(steady.state_dict())
    for each in (steady, saved):
        each.look(fake_context(source, index=8, trained=plans[0]).round, torch.empty(0).long(), torch.empty(0))
    assert saved.weight == steady.weight


def test_what_was_trained_on_is_probed_again_and_compared_with_random_candidates():
    source = a_source()
    run, _ = rounds_of(default(), Saturates([1.0, 0.0, 0.0, 0.0], saturation=2.0, noise=0.0), source, count=3)
    record = run.ledger.rounds[-1]
    measured, influence = torch.tensor(record.measured), torch.tensor(record.influence)
    before = run.ledger.rounds[-2]
    assert record.metrics["influence/trained"] < record.metrics["influence/random"] or before.chosen == BUDGET
    kinds = source.pool.groups[measured]
    assert record.metrics["influence/mean"] == pytest.approx(float(influence.mean()), rel=1e-5)
    assert len(kinds) == 24
    again = int(0.25 * 24)
    mean = (record.metrics["influence/trained"] * again + record.metrics["influence/random"] * (24 - again)) / 24
    assert mean == pytest.approx(float(influence.mean()), rel=1e-5)


def test_no_group_fills_more_of_a_plan_than_it_may():
    inner = RegressionSelector(
        TokenTableRegressor(2**12), probes=24, ratio=0.25, temperature=0.2, max_group_share=0.5, min_spearman=None
    )
    _, shares = rounds_of(inner, Saturates([1.0, 0.5, 0.0, 0.0]), a_source(), count=4)
    assert shares[1:].max() <= 0.5
    assert shares[1:, :2].sum(dim=1).min() > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 7}, "got 7"),
        ({"probes": 9.5}, "got 9.5"),
        ({"trained_share": 1.0}, "trained_share"),
        ({"max_group_share": 0.0}, "max_group_share"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegressionSelector(TokenTableRegressor(), **arguments)


def test_probes_below_one_are_a_share_of_the_budget():
    source = a_source(candidates=400)
    selector = RegressionSelector(TokenTableRegressor(2**12), probes=0.3)
    run = SelectionRun(selector, Saturates([1.0, 0.0, 0.0, 0.0]), UniformSelector(), 0, source)
    play(run, BUDGET)
    assert len(run.ledger.rounds[0].measured) == 12


def test_half_a_measured_run_goes_on_as_the_whole():
    def run_on(source, estimator):
        return SelectionRun(default(keep_general=0.1), estimator, UniformSelector(), 1, source)

    def context(source):
        return fake_context(source)

    source, estimator = a_source(), Saturates([1.0, 0.5, 0.0, 0.0])
    first = run_on(source, estimator)
    for _ in range(3):
        play(first, BUDGET, context(source))
    state = first.state_dict()
    expected = [play(first, BUDGET, context(source)).ids for _ in range(2)]
    other = a_source()
    resumed = run_on(other, Saturates([1.0, 0.5, 0.0, 0.0]))
    resumed.load_state_dict(state)
    for ids in expected:
        assert torch.equal(play(resumed, BUDGET, context(other)).ids, ids)
