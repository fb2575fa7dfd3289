import io

import pytest
import torch
from fakes import FakeSource, fake_context, planted_source, random_source

from liveselect.regressors import HashedRidgeRegressor


def fitted(m=200, noise=0.3, seed=0, **kwargs):
    source, planted = planted_source(candidates=400, seed=seed, **kwargs)
    context = fake_context(source, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)  # not the one that planted: it would draw the planted first
    ids = torch.randperm(400, generator=generator)[:m]
    influence = planted[ids].float() + noise * torch.randn(m, generator=generator)
    regressor = HashedRidgeRegressor(2**10)
    return regressor, context, regressor.fit(context.round, ids, influence)


def predictions(regressor, context, ids=None):
    ids = context.candidates if ids is None else ids
    return torch.cat([regressor.predict(context.round, batch) for batch in context.round.batches(ids)])


def test_the_reported_spearman_is_what_fresh_candidates_give():
    regressor, _, metrics = fitted(m=200)
    source, planted = planted_source(candidates=4000, seed=99)
    noise = 0.3 * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    fresh = predictions(regressor, fake_context(source))
    ranks = [x.argsort().argsort().double() for x in (fresh, planted.float() + noise)]
    outside = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    assert outside > 0.2
    assert abs(metrics["spearman"] - outside) < 0.15


def test_nothing_to_learn_is_reported_as_no_correlation_on_average():
    spearman = []
    for seed in range(40):
        source = random_source(candidates=64, seed=seed)
        influence = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        context = fake_context(source, seed=seed)
        spearman.append(HashedRidgeRegressor(2**8).fit(context.round, torch.arange(64), influence))
    values = torch.tensor([metrics["spearman"] for metrics in spearman])
    assert values.mean().abs() < 3.5 * values.std() / len(values) ** 0.5


def test_predictions_are_standardised_and_turn_round_with_the_sign():
    source, planted = planted_source(candidates=400)
    context, influence = fake_context(source), planted.float()
    found = {}
    for factor in (1.0, -1.0, 1000.0):
        regressor = HashedRidgeRegressor(2**12)
        regressor.fit(context.round, torch.arange(400), factor * influence + 7.0)
        found[factor] = predictions(regressor, context)
    assert abs(float(found[1.0].mean())) < 1e-3
    assert 0.5 < float(found[1.0].std()) <= 1.0
    assert torch.allclose(found[1.0], -found[-1.0], atol=1e-4)
    assert torch.allclose(found[1.0], found[1000.0], atol=1e-4)


def test_a_prediction_does_not_depend_on_the_other_rows_of_its_batch():
    regressor, context, _ = fitted()
    alone = torch.cat([predictions(regressor, context, torch.tensor([i])) for i in range(20)])
    assert torch.allclose(predictions(regressor, context, torch.arange(20)), alone, atol=1e-6)


def test_padding_behind_the_attention_mask_is_not_seen():
    tokens = random_source(candidates=16).tokens
    padded = torch.cat([tokens, torch.zeros(16, 5, dtype=torch.int64)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(16, 5, dtype=torch.int64)], dim=1)
    influence, found = torch.arange(16.0), []
    for source in (FakeSource(tokens), FakeSource(padded, mask=mask)):
        regressor = HashedRidgeRegressor(2**8)
        regressor.fit(fake_context(source).round, torch.arange(16), influence)
        found.append(predictions(regressor, fake_context(source)))
    assert torch.allclose(*found, atol=1e-6)


def test_repeated_measurements_count_as_their_mean():
    source = random_source(candidates=16)
    influence, found = torch.randn(16, generator=torch.Generator().manual_seed(0)), []
    for ids, values in [
        (torch.arange(16), influence),
        (
            torch.cat([torch.arange(16), torch.tensor([3, 3])]),
            torch.cat([influence, influence[3] + torch.tensor([-1.0, 1.0])]),
        ),
    ]:
        regressor = HashedRidgeRegressor(2**8)
        regressor.fit(fake_context(source).round, ids, values)
        found.append(predictions(regressor, fake_context(source)))
    assert torch.allclose(*found, atol=1e-5)


def test_the_order_of_the_measurements_does_not_matter():
    source, order = random_source(candidates=32), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    influence, found = torch.randn(32, generator=torch.Generator().manual_seed(1)), []
    for ids in (torch.arange(32), order):
        regressor = HashedRidgeRegressor(2**8)
        regressor.fit(fake_context(source).round, ids, influence[ids])
        found.append(predictions(regressor, fake_context(source)))
    assert torch.equal(*found)


def test_more_candidates_than_buckets_are_fitted_too():
    source, planted = planted_source(candidates=600)
    regressor = HashedRidgeRegressor(2**8)
    metrics = regressor.fit(fake_context(source).round, torch.arange(600), planted.float())
    assert metrics["spearman"] > 0.3
    assert metrics["r2"] > 0.3


def test_equal_influence_predicts_zero_and_admits_to_know_nothing():
    source, regressor = random_source(candidates=16), HashedRidgeRegressor(2**8)
    metrics = regressor.fit(fake_context(source).round, torch.arange(16), torch.full((16,), 0.25))
    assert metrics["spearman"] != metrics["spearman"]
    assert predictions(regressor, fake_context(source)).tolist() == [0.0] * 16


def test_what_cannot_be_learned_from_is_refused_with_the_reason():
    source, regressor = random_source(candidates=16), HashedRidgeRegressor(2**8)
    context = fake_context(source)
    influence = torch.arange(16.0)
    influence[[3, 5]] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(ValueError, match="got 2 of 16 that are not"):
        regressor.fit(context.round, torch.arange(16), influence)
    with pytest.raises(ValueError, match="at least 8 distinct measured candidates to learn from, got 7"):
        regressor.fit(context.round, torch.arange(8) % 7, torch.arange(8.0))
    with pytest.raises(ValueError, match=r"expected ids \(m,\)"):
        regressor.fit(context.round, torch.arange(9), torch.arange(8.0))
    with pytest.raises(RuntimeError, match="before fit"):
        predictions(regressor, context)
    with pytest.raises(ValueError, match="power of two"):
        HashedRidgeRegressor(1000)


def test_a_saved_regressor_predicts_bit_for_bit_alike():
    regressor, context, _ = fitted()
    file = io.BytesIO()
    torch.save(regressor.state_dict(), file)
    file.seek(0)
    restored = HashedRidgeRegressor(2**10)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(predictions(restored, context), predictions(regressor, context))
    with pytest.raises(ValueError, match="1024 buckets, this one has 2048"):
        HashedRidgeRegressor(2**11).load_state_dict(regressor.state_dict())


def test_an_unfitted_regressor_can_be_saved_and_restored():
    restored = HashedRidgeRegressor(2**8)
    restored.load_state_dict(HashedRidgeRegressor(2**8).state_dict())
    with pytest.raises(RuntimeError, match="before fit"):
        predictions(restored, fake_context(random_source()))


def test_fit_and_predict_leave_the_random_state_and_the_default_type_alone():
    torch.rand(7)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        source = random_source(candidates=32)
        regressor = HashedRidgeRegressor(2**8)
        regressor.fit(fake_context(source).round, torch.arange(32), (source.tokens < 20).float().sum(dim=1))
        assert predictions(regressor, fake_context(source)).dtype == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
