"""The token table: what it learns is what shrunken means by hand say, and one row tells what dozens of rows tell."""

import io
import itertools
from collections import defaultdict

import pytest
import torch
from fakes import FakeSource, fake_context, random_source

from liveselect.functional.correlation import spearman
from liveselect.regressors import HashedRidgeRegressor, TokenTableRegressor

VOCAB, WIDTH = 60, 24


def a_source(candidates=400, seed=0):
    """Random tokens, each of which is worth something, and what each is worth with some noise, ``(n, T)``."""
    source = random_source(candidates=candidates, length=WIDTH, vocab=VOCAB, seed=seed)
    generator = torch.Generator().manual_seed(17)
    worth = torch.randn(VOCAB, generator=generator)[source.tokens]
    tokens = worth + 0.5 * torch.randn(worth.shape, generator=torch.Generator().manual_seed(seed + 1))
    tokens[:, 0] = torch.nan
    return source, tokens


def predictions(regressor, source):
    context = fake_context(source)
    return torch.cat([regressor.predict(context.round, batch) for batch in context.round.batches(context.candidates)])


def by_hand(source, ids, labels, shrinkage):
    """Return the mean over each row's tokens of pair means backing off to token means backing off to zero."""
    singles, pairs = defaultdict(list), defaultdict(list)
    for i, row in zip(ids, labels, strict=True):
        tokens = source.tokens[i].tolist()
        for t, pair in enumerate(itertools.pairwise(tokens), start=1):
            singles[pair[1]].append(float(row[t]))
            pairs[pair].append(float(row[t]))

    def value(pair):
        single = sum(singles[pair[1]]) / (len(singles[pair[1]]) + shrinkage)
        return (sum(pairs[pair]) + shrinkage * single) / (len(pairs[pair]) + shrinkage)

    rows = [[value(pair) for pair in itertools.pairwise(row)] for row in source.tokens.tolist()]
    return torch.tensor([sum(row) / len(row) for row in rows])


def standardised(tokens):
    labels = tokens.double() - tokens.double().nanmean()
    return labels / labels.nanmean(dim=1).std(correction=0)


def test_predictions_are_the_shrunken_means_that_one_computes_by_hand():
    source, tokens = a_source(candidates=60)
    ids = torch.arange(0, 60, 3)
    regressor = TokenTableRegressor(2**20, shrinkage=5.0, clip=0.0)
    regressor.fit_tokens(fake_context(source).round, ids, tokens[ids].nanmean(1), tokens[ids])
    expected = by_hand(source, ids.tolist(), standardised(tokens[ids]), 5.0)
    assert torch.allclose(predictions(regressor, source), expected, atol=1e-5)


def test_sixteen_rows_of_tokens_tell_more_than_sixteen_rows_tell_a_ridge():
    source, tokens = a_source()
    truth, ids = tokens.nanmean(1), torch.arange(16)
    found = {}
    for regressor in (TokenTableRegressor(), HashedRidgeRegressor()):
        regressor.fit_tokens(fake_context(source).round, ids, truth[ids], tokens[ids])
        found[type(regressor)] = spearman(predictions(regressor, source)[16:], truth[16:])
    assert found[TokenTableRegressor] > 0.6
    assert found[TokenTableRegressor] > found[HashedRidgeRegressor] + 0.2


def test_without_tokens_it_learns_from_rows():
    source, tokens = a_source()
    truth, ids = tokens.nanmean(1), torch.arange(300)
    regressor = TokenTableRegressor()
    metrics = regressor.fit(fake_context(source).round, ids, truth[ids])
    assert spearman(predictions(regressor, source)[300:], truth[300:]) > 0.4
    assert metrics["spearman"] > 0.2


def test_a_few_tokens_beyond_all_measure_do_not_spoil_it():
    source, tokens = a_source()
    truth, ids = tokens.nanmean(1), torch.arange(64)
    spoilt = tokens[ids].clone()
    spoilt[::7, 5] = 1e6
    regressor = TokenTableRegressor()
    regressor.fit_tokens(fake_context(source).round, ids, spoilt.nanmean(1), spoilt)
    assert spearman(predictions(regressor, source)[64:], truth[64:]) > 0.6


def test_what_it_says_of_held_out_rows_is_what_tables_without_them_predict():
    source, tokens = a_source(candidates=40)
    ids, context = torch.arange(40), fake_context(source)
    regressor = TokenTableRegressor(clip=0.0)
    metrics = regressor.fit_tokens(context.round, ids, tokens.nanmean(1), tokens)
    folds = torch.randperm(40, generator=context.round.generator("regressor/folds")) % 5
    labels, found = standardised(tokens), torch.zeros(40)
    rows = labels.nanmean(1)
    for fold in range(5):
        inside = folds == fold
        fold_found = by_hand(source, ids[~inside].tolist(), labels[~inside], regressor.shrinkage)[inside].float()
        found[inside] = fold_found - fold_found.mean()
        rows[inside] -= rows[inside].mean()
    assert metrics["spearman"] == pytest.approx(spearman(found, rows), abs=1e-6)
    best = found.argsort(descending=True)[:8]
    assert metrics["top_fifth"] == pytest.approx(float(rows[best].mean()), abs=1e-5)
    assert metrics["held_out"] == 40


def test_where_there_is_nothing_to_learn_the_rank_correlation_is_zero_on_average():
    found = []
    for seed in range(60):
        source, tokens = a_source(candidates=24, seed=seed)
        noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1000 + seed))
        metrics = TokenTableRegressor().fit_tokens(
            fake_context(source).round, torch.arange(24), noise.nanmean(1), noise
        )
        found.append(metrics["spearman"])
    assert abs(torch.tensor(found).mean()) < 3 / (23 * 60) ** 0.5  # a random order has the variance 1 / (n - 1)


def test_a_round_that_passed_counts_less_by_the_forgetting_and_none_with_zero():
    source, tokens = a_source(candidates=64)
    ids = torch.arange(32)
    for forgetting, expected in ((0.8, 0.8**3), (0.0, 0.0)):
        regressor = TokenTableRegressor(forgetting=forgetting)
        for index in (0, 3):
            regressor.fit_tokens(fake_context(source, index=index).round, ids, tokens[ids].nanmean(1), tokens[ids])
        weight = regressor.state_dict()["weights"][0].sum()
        assert float(weight) == pytest.approx((1 + expected) * 32 * (WIDTH - 1))
        assert regressor.remembers == (forgetting > 0)


def test_tokens_that_carry_no_loss_are_neither_learned_from_nor_predicted():
    source, tokens = a_source(candidates=32)
    padded = torch.nn.functional.pad(source.tokens, (0, 6), value=3)
    labels = padded.clone()
    labels[:, WIDTH:] = -100
    longer = FakeSource(padded, labels=labels)
    ids = torch.arange(32)
    found = []
    for one in (source, longer):
        regressor = TokenTableRegressor()
        regressor.fit_tokens(fake_context(one).round, ids, tokens.nanmean(1), tokens)
        found.append(predictions(regressor, one))
    assert torch.allclose(*found, atol=1e-6)


def test_rows_without_tokens_of_their_own_are_learned_from_as_wholes():
    source, tokens = a_source()
    truth = tokens.nanmean(1)
    known = torch.full_like(tokens, torch.nan)
    known[:4] = tokens[:4]
    few, more = TokenTableRegressor(), TokenTableRegressor()
    few.fit_tokens(fake_context(source).round, torch.arange(8), truth[:8], known[:8])
    more.fit_tokens(fake_context(source).round, torch.arange(300), truth[:300], known[:300])
    scores = [spearman(predictions(each, source)[300:], truth[300:]) for each in (few, more)]
    assert scores[1] > scores[0]


def test_a_saved_table_predicts_and_goes_on_bit_for_bit_alike():
    source, tokens = a_source(candidates=64)
    truth = tokens.nanmean(1)
    regressor = TokenTableRegressor(2**12)
    regressor.fit_tokens(fake_context(source).round, torch.arange(32), truth[:32], tokens[:32])
    file = io.BytesIO()
    torch.save(regressor.state_dict(), file)
    file.seek(0)
    restored = TokenTableRegressor(2**12)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(predictions(restored, source), predictions(regressor, source))
    for each in (regressor, restored):
        each.fit_tokens(fake_context(source, index=1).round, torch.arange(32, 64), truth[32:], tokens[32:])
    assert torch.equal(predictions(restored, source), predictions(regressor, source))
    with pytest.raises(ValueError, match="4096 buckets, this one has 8192"):
        TokenTableRegressor(2**13).load_state_dict(regressor.state_dict())
    unfitted = TokenTableRegressor(2**12)
    unfitted.load_state_dict(TokenTableRegressor(2**12).state_dict())
    with pytest.raises(RuntimeError, match="before fit"):
        predictions(unfitted, source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": 1000}, "power of two"),
        ({"shrinkage": 0.0}, "shrinkage above 0"),
        ({"forgetting": 1.1}, "got 1.1"),
        ({"clip": 0.5}, "below 0.5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenTableRegressor(**arguments)


def test_what_cannot_be_learned_from_is_refused():
    source, tokens = a_source(candidates=16)
    regressor, round_ = TokenTableRegressor(), fake_context(source).round
    with pytest.raises(ValueError, match=r"expected tokens \(16, T\)"):
        regressor.fit_tokens(round_, torch.arange(16), torch.arange(16.0), tokens[:8])
    with pytest.raises(ValueError, match="at least 8 distinct"):
        regressor.fit_tokens(round_, torch.arange(4), torch.arange(4.0), tokens[:4])
