import pytest
import torch

from liveselect.functional.ridge import fit_ridge


def problem(m, d, seed=0, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(m, d, generator=generator, dtype=torch.float64)
    truth = torch.randn(d, generator=generator, dtype=torch.float64)
    targets = features @ truth + noise * d**0.5 * torch.randn(m, generator=generator, dtype=torch.float64)
    return features, 3.0 + targets


def solve(features, targets, penalty):
    """Weights and intercept by least squares on the augmented problem, the intercept not penalised."""
    m, d = features.shape
    rows = torch.cat([features, torch.ones(m, 1, dtype=torch.float64)], dim=1)
    ridge = torch.diag(torch.tensor([penalty**0.5] * d + [0.0], dtype=torch.float64))
    full = torch.linalg.lstsq(torch.cat([rows, ridge]), torch.cat([targets, torch.zeros(d + 1, dtype=torch.float64)]))
    return full.solution[:d], full.solution[d]


def scale(features):
    return float((features - features.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize(("m", "d"), [(12, 30), (40, 7), (9, 9)])
def test_weights_and_held_out_predictions_are_those_of_explicit_refits(m, d):
    features, targets = problem(m, d)
    folds = torch.arange(m) % 4
    penalty = 0.25
    found = fit_ridge(features.clone(), targets, folds, torch.tensor([penalty]))
    weights, intercept = solve(features, targets, penalty * scale(features))
    assert torch.allclose(found.weights, weights, rtol=1e-9, atol=1e-10)
    assert found.intercept == pytest.approx(float(intercept), rel=1e-9)
    for fold in range(4):
        out = folds == fold
        weights, intercept = solve(features[~out], targets[~out], penalty * scale(features))
        assert torch.allclose(found.held_out[out], features[out] @ weights + intercept, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("m", "d"), [(24, 60), (80, 10)])
def test_the_penalty_of_lowest_held_out_error_is_chosen(m, d):
    features, targets = problem(m, d, seed=1, noise=2.0)
    folds = torch.arange(m) % 6
    penalties = torch.logspace(-4, 4, 9, dtype=torch.float64)
    found = fit_ridge(features.clone(), targets, folds, penalties)

    def error(penalty):
        missed = 0.0
        for fold in range(6):
            out = folds == fold
            weights, intercept = solve(features[~out], targets[~out], penalty * scale(features))
            missed += float((features[out] @ weights + intercept - targets[out]).square().sum())
        return missed

    errors = {penalty: error(penalty) for penalty in penalties.tolist()}
    assert found.penalty == min(errors, key=errors.get)
    assert 0 < list(errors).index(found.penalty) < 8  # an end of the grid would be chosen by broken code too


def test_a_held_out_prediction_does_not_see_its_own_fold():
    features, targets = problem(30, 50)
    folds, penalties = torch.arange(30) % 5, torch.tensor([1.0])
    before = fit_ridge(features.clone(), targets, folds, penalties).held_out
    changed = targets.clone()
    changed[folds == 2] += 100 * torch.arange(6)
    after = fit_ridge(features.clone(), changed, folds, penalties).held_out
    assert torch.allclose(before[folds == 2], after[folds == 2], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before[folds != 2], after[folds != 2])


def test_float32_features_lose_no_more_than_their_own_precision():
    features, targets = problem(40, 100)
    folds, penalties = torch.arange(40) % 5, torch.tensor([0.1])
    exact = fit_ridge(features.clone(), targets, folds, penalties)
    found = fit_ridge(features.float(), targets, folds, penalties)
    assert found.weights.dtype == torch.float32
    assert torch.allclose(found.weights.double(), exact.weights, atol=1e-5 * float(exact.weights.abs().max()))


def test_features_that_never_vary_predict_the_mean():
    targets = torch.arange(8.0)
    found = fit_ridge(torch.ones(8, 3), targets, torch.arange(8) % 2, torch.tensor([1.0]))
    assert found.weights.tolist() == [0, 0, 0]
    assert found.intercept == pytest.approx(3.5)
