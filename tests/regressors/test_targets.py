"""What regressors learn from: ranks, and what earlier rounds have said."""

import pytest
import torch
from fakes import fake_context, planted_source
from scipy.stats import norm, rankdata
from tiny_encoder import tiny_regressor

from liveselect.functional.correlation import rank_normal
from liveselect.functional.ridge import fit_ridge
from liveselect.regressors import HashedRidgeRegressor
from liveselect.regressors.targets import Memory, Targets, held_out_metrics, robust_targets


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_rank_normal_values_are_the_normal_quantiles_of_mean_ranks():
    values = torch.tensor([3.0, -1.0, 3.0, 1e9, 0.0, 3.0])
    expected = norm.ppf((rankdata(values.numpy()) - 0.5) / 6)
    assert rank_normal(values).tolist() == pytest.approx(expected.tolist())
    assert rank_normal(torch.ones(4)).tolist() == [0.0] * 4


def test_robust_targets_do_not_change_with_any_growing_function_and_have_unit_variance():
    values = torch.randn(50, generator=seeded(0))
    found = robust_targets(values)
    assert torch.allclose(found, robust_targets(values.exp() ** 9))
    assert found.mean().abs() < 1e-12
    assert float(found.std(correction=0)) == pytest.approx(1.0)
    assert not robust_targets(torch.ones(9)).any()


def test_an_example_that_counts_twice_is_as_good_as_two_in_one_fold():
    features, targets = torch.randn(30, 7, generator=seeded(1)).double(), torch.randn(30, generator=seeded(2))
    folds, penalties = torch.arange(30) % 5, torch.logspace(-2, 2, 5).double()
    twice = torch.cat([torch.arange(30), torch.arange(10)])
    weights = torch.where(torch.arange(30) < 10, 2.0, 1.0)
    repeated = fit_ridge(features[twice].clone(), targets[twice], folds[twice], penalties)
    # a penalty is a multiple of a mean over examples, which the two have 30 and 40 of
    weighted = fit_ridge(features.clone(), targets, folds, penalties * 30 / 40, weights)
    assert weighted.penalty == pytest.approx(repeated.penalty * 30 / 40)
    assert torch.allclose(weighted.weights, repeated.weights)
    assert weighted.intercept == pytest.approx(repeated.intercept)
    assert torch.allclose(weighted.held_out, repeated.held_out[:30])


def test_memory_fades_by_the_round_and_forgets_at_last():
    memory = Memory(keep=0.5)
    first = memory.with_earlier(0, Targets(torch.arange(4), torch.arange(4.0).double()))
    assert first.weights.tolist() == [1.0] * 4
    second = memory.with_earlier(2, Targets(torch.tensor([1, 9]), torch.tensor([7.0, 8.0]).double()))
    assert second.ids.tolist() == [1, 9, 0, 2, 3]  # what was measured again counts with its last measurement
    assert second.targets.tolist() == [7.0, 8.0, 0.0, 2.0, 3.0]
    assert second.weights.tolist() == [1.0, 1.0, 0.25, 0.25, 0.25]
    assert second.fresh == 2
    assert memory.with_earlier(20, Targets(torch.tensor([5]), torch.ones(1).double())).ids.tolist() == [5]
    again = Memory(keep=0.5)
    again.load_state_dict(memory.state_dict())
    some = Targets(torch.tensor([6]), torch.ones(1).double())
    for one, other in zip(memory.with_earlier(21, some), again.with_earlier(21, some), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_a_round_that_is_fitted_again_does_not_remember_itself():
    memory = Memory()
    for _ in range(2):
        found = memory.with_earlier(3, Targets(torch.arange(4), torch.arange(4.0).double()))
    assert len(found.ids) == 4


def test_the_top_fifth_is_what_a_choice_by_prediction_would_get():
    predicted, targets = torch.arange(10.0), torch.tensor([0.0] * 8 + [1.0, 3.0])
    metrics = held_out_metrics(predicted, targets)
    assert metrics["top_fifth"] == pytest.approx(2.0 - 0.4)
    assert metrics["held_out"] == 10


def predictions(regressor, context):
    return torch.cat([regressor.predict(context.round, batch) for batch in context.round.batches(context.candidates)])


def test_a_damped_fit_moves_predictions_by_its_share_of_the_way():
    source, planted = planted_source(candidates=200)
    found = {}
    for damping in (1.0, 0.25):
        regressor = HashedRidgeRegressor(2**10, forgetting=0.0, damping=damping)
        regressor.fit(fake_context(source).round, torch.arange(200), planted.float())
        before = predictions(regressor, fake_context(source))
        regressor.fit(fake_context(source, index=1).round, torch.arange(200), -planted.float())
        found[damping] = before, predictions(regressor, fake_context(source))
    before, whole = found[1.0]
    assert torch.equal(found[0.25][0], before)  # the first fit has nothing to move from
    assert torch.allclose(found[0.25][1], before + 0.25 * (whole - before), atol=1e-5)


def test_a_ridge_that_remembers_turns_slower_than_one_that_forgets():
    source, planted = planted_source(candidates=200)
    half, other = torch.arange(100), torch.arange(100, 200)
    found = {}
    for forgetting in (0.0, 0.8):
        regressor = HashedRidgeRegressor(2**10, forgetting=forgetting, damping=1.0)
        regressor.fit(fake_context(source).round, half, planted[half].float())
        metrics = regressor.fit(fake_context(source, index=1).round, other, -planted[other].float())
        found[forgetting] = float(predictions(regressor, fake_context(source))[planted].mean())
        assert metrics["held_out"] == 100
        assert metrics["remembered"] == (100 if forgetting else 0)
    assert found[0.0] < found[0.8]


def test_influence_with_heavy_tails_is_learned_from_by_its_ranks():
    source, planted = planted_source(candidates=400)
    influence = planted.float() + 0.3 * torch.randn(400, generator=seeded(3))
    influence[torch.randperm(400, generator=seeded(4))[:4]] = 1e4 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = {}
    for targets in ("rank_normal", "standardized"):
        regressor = HashedRidgeRegressor(2**10, targets=targets)
        regressor.fit(fake_context(source).round, torch.arange(200), influence[:200])
        found = predictions(regressor, fake_context(source))[200:]
        scores[targets] = float(found[planted[200:]].mean() - found[~planted[200:]].mean()) / float(found.std())
    assert scores["rank_normal"] > 1.5
    assert scores["rank_normal"] > scores["standardized"] + 0.5


def test_an_encoder_remembers_and_is_damped_too():
    source, planted = planted_source(candidates=100, share=0.5)
    first = tiny_regressor(epochs=1, damping=0.25)
    first.fit(fake_context(source).round, torch.arange(40), planted[:40].float())
    before = {name: value.clone() for name, value in first.state_dict()["weights"].items()}
    moved = {}
    for damping in (1.0, 0.25):
        regressor = tiny_regressor(epochs=1, damping=damping)
        regressor.load_state_dict(first.state_dict())
        metrics = regressor.fit(fake_context(source, index=1).round, torch.arange(40, 80), planted[40:80].float())
        assert metrics["remembered"] == 40
        moved[damping] = regressor.state_dict()["weights"]
    for name, start in before.items():
        if start.is_floating_point():
            expected = start + 0.25 * (moved[1.0][name] - start)
            assert torch.allclose(moved[0.25][name], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "raw"}, "targets to be one of"),
        ({"damping": 0.0}, "damping"),
        ({"forgetting": -0.1}, "stays, in 0..1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    for kind in (HashedRidgeRegressor, tiny_regressor):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)
