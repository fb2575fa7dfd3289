"""Perplexity, reducible loss, loss drop, LESS and n-grams: what they return is what their papers say."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import Bigrams
from fakes import FakeSource, fake_context, planted_source, play, random_source
from unrolled_language_model import warm_context

from liveselect.functional.bands import band_edges
from liveselect.functional.features import adam_feature
from liveselect.functional.ngram_ratio import count_ngrams, log_ratio, mean_log_ratio
from liveselect.influence import (
    LESSInfluence,
    LossDropInfluence,
    NgramRatioInfluence,
    PerplexityInfluence,
    ReducibleLossInfluence,
)
from liveselect.preserve import checksum
from liveselect.regressors import HashedRidgeRegressor
from liveselect.rounds import SelectionRun
from liveselect.selectors import RegressionSelector, UniformSelector


def context(name="adamw"):
    source = random_source(candidates=30, length=8, vocab=50, rows=7)
    return fake_context(source, model=(model := Bigrams()), optimizer=warm(model, name), loss_fn=losses_of)


def warm(model, name):
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = kinds[name](model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(3))
    for _ in range(4):
        losses_of(model, {"input_ids": tokens}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def losses_of(model, batch):
    ids = batch["input_ids"]
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def scored(each, estimator, ids=None):
    metrics = each.fit(estimator)
    return each.score_ids(estimator, torch.arange(30) if ids is None else ids), metrics


def plain(each):
    with torch.no_grad():
        return losses_of(each.model, {"input_ids": each.source.tokens})


# ---- forwards only -----------------------------------------------------------------------------------------------


def test_perplexity_is_the_distance_from_its_band():
    each = context()
    losses = plain(each)
    low, high = band_edges(losses)
    inside = {
        "low": losses <= low,
        "middle": (losses >= low) & (losses <= high),
        "high": losses >= high,
    }
    for band, within in inside.items():
        scores, metrics = scored(each, PerplexityInfluence(band, sampled=30))
        assert metrics["perplexity_low_edge"] == pytest.approx(low, rel=1e-6)
        assert torch.equal(scores == 0, within)
        distance = {"low": losses - low, "high": high - losses}.get(band, torch.maximum(low - losses, losses - high))
        torch.testing.assert_close(scores, torch.where(within, 0.0, -distance))
    torch.testing.assert_close(scored(each, PerplexityInfluence(None))[0], -losses)


def test_perplexity_can_be_that_of_another_model():
    each, other = context(), Bigrams()
    scores, _ = scored(each, PerplexityInfluence(None, scorer=other))
    with torch.no_grad():
        torch.testing.assert_close(scores, -losses_of(other, {"input_ids": each.source.tokens}))


def trained_by_hand(each, steps, rate):
    """Return the losses of the candidates after full-batch AdamW on the reference set."""
    other = Bigrams()
    other.load_state_dict(each.model.state_dict())
    optimizer = torch.optim.AdamW(other.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        losses_of(other, {"input_ids": each.source.references}).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return losses_of(other, {"input_ids": each.source.tokens})


@pytest.mark.parametrize("kind", [LossDropInfluence, ReducibleLossInfluence])
def test_two_forwards_stand_around_a_training_on_the_reference_set_and_leave_no_trace(kind):
    each = context()
    before, after = plain(each), trained_by_hand(each, steps=5, rate=1e-2)
    state = checksum(each.model, each.optimizer)
    scores, metrics = scored(each, kind(steps=5, learning_rate=1e-2))
    expected = (before - after) / before if kind is LossDropInfluence else before - after
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert metrics["reference_loss_trained"] < metrics["reference_loss"]
    assert checksum(each.model, each.optimizer) == state


def test_reducible_loss_takes_a_model_that_is_given():
    each, other = context(), Bigrams()
    scores, _ = scored(each, ReducibleLossInfluence(reference_model=other))
    with torch.no_grad():
        expected = plain(each) - losses_of(other, {"input_ids": each.source.tokens})
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LossDropInfluence(steps=2, learning_rate=1e-2),
        lambda: ReducibleLossInfluence(steps=2, learning_rate=1e-2),
        lambda: LESSInfluence(dimensions=64),
        lambda: PerplexityInfluence(sampled=12),
    ],
)
def test_a_fit_can_be_kept_in_a_file_and_goes_on(make, tmp_path):
    each = context()
    first = make()
    expected, _ = scored(each, first)
    torch.save(first.fitted_state(), tmp_path / "fit.pt")
    second = make()
    second.load_fitted_state(torch.load(tmp_path / "fit.pt", weights_only=True))
    torch.testing.assert_close(each.score_ids(second, torch.arange(30)), expected)


def test_candidates_without_a_finite_loss_have_no_score():
    def broken(model, batch):
        return losses_of(model, batch).where(batch["id"] != 4, math.nan)

    each = context().but(loss_fn=broken)
    for estimator in (PerplexityInfluence(), LESSInfluence(dimensions=None)):
        scores, _ = scored(each, estimator)
        assert scores.isnan().nonzero().tolist() == [[4]]


# ---- LESS --------------------------------------------------------------------------------------------------------


def gradients(model, tokens):
    rows = []
    for row in tokens:
        loss = losses_of(model, {"input_ids": row[None]}).sum()
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    return rows


def units(rows):
    flat = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return flat / flat.norm(dim=1, keepdim=True)


def less_by_hand(model, optimizer, source, form="published"):
    toward = units(gradients(model, source.references)).mean(0)
    rows = []
    for row in gradients(model, source.tokens):
        made = []
        for parameter, gradient in zip(model.parameters(), row, strict=True):
            kept = optimizer.state.get(parameter)
            if kept and "exp_avg" in kept:
                steps = int(kept["step"]) if form == "optimizer" else None
                gradient = adam_feature(gradient, kept["exp_avg"], kept["exp_avg_sq"], (0.9, 0.999), 1e-8, steps)
            made.append(gradient)
        rows.append(made)
    return units(rows) @ toward


@pytest.mark.parametrize(("name", "form"), [("sgd", "published"), ("adamw", "published"), ("adamw", "optimizer")])
def test_less_is_the_cosine_of_a_candidates_step_with_the_reference_gradients(name, form):
    each = context(name)
    expected = less_by_hand(each.model, each.optimizer, each.source, form)
    scores, metrics = scored(each, LESSInfluence(dimensions=None, form=form))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert metrics["less_preconditioned"] == (name == "adamw")
    projected, _ = scored(each, LESSInfluence(dimensions=4096, form=form))
    assert (projected - expected).abs().max() < 4 / 4096**0.5


def test_less_adds_checkpoints_up_by_their_learning_rates(tmp_path):
    each, published = context(), (1.6877e-5, 1.2859e-5, 7.7030e-6, 2.5616e-6)
    expected, paths = torch.zeros(30), []
    for i, (rate, weight) in enumerate(zip(published, (0.421919, 0.321470, 0.192572, 0.064039), strict=True)):
        other = context()
        for group in other.optimizer.param_groups:
            group["lr"] = rate
        for _ in range(i):
            losses_of(other.model, {"input_ids": other.source.tokens}).mean().backward()
            other.optimizer.step()
            other.optimizer.zero_grad()
        state = {"state_dict": other.model.state_dict(), "optimizer_states": [other.optimizer.state_dict()]}
        paths.append(tmp_path / f"{i}.ckpt")
        torch.save(state, paths[-1])
        expected += weight * less_by_hand(other.model, other.optimizer, other.source)
    state = checksum(each.model, each.optimizer)
    scores, _ = scored(each, LESSInfluence(checkpoints=paths, dimensions=None))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-3)
    assert checksum(each.model, each.optimizer) == state


def test_less_takes_gradients_in_the_parameters_that_are_named():
    each = context("sgd")
    scores, metrics = scored(each, LESSInfluence(dimensions=None, include=("head.*",)))
    rows = [[row[-2], row[-1]] for row in gradients(each.model, each.source.tokens)]
    toward = units([[row[-2], row[-1]] for row in gradients(each.model, each.source.references)]).mean(0)
    torch.testing.assert_close(scores, units(rows) @ toward, atol=1e-5, rtol=1e-4)
    assert metrics["less_coordinates"] == 8 * 50 + 50
    with pytest.raises(ValueError, match="to fit a trained parameter"):
        each.fit(LESSInfluence(include=("nothing",)))


@pytest.mark.parametrize("projection", ["dense", "low_rank"])
def test_less_can_be_projected_as_published_or_to_low_rank(projection):
    each = context("sgd")
    expected = less_by_hand(each.model, each.optimizer, each.source)
    scores, metrics = scored(each, LESSInfluence(dimensions=600, projection=projection))
    assert metrics["less_dimensions"] <= 600
    assert (scores - expected).abs().max() < 4 / 600**0.5


def test_less_takes_the_best_of_the_subtasks_that_reference_examples_name(monkeypatch):
    each = context("sgd")
    source, subtask = each.source, torch.tensor([2, 0, 0, 2])
    toward = units(gradients(each.model, source.references))
    rows = units(gradients(each.model, source.tokens))
    by_subtask = torch.stack([rows @ toward[subtask == s].mean(0) for s in (0, 2)])
    plain_reference = type(source).reference

    def named(self):
        return ({**batch, "subtask": subtask[batch["id"]]} for batch in plain_reference(self))

    monkeypatch.setattr(type(source), "reference", named)
    scores, metrics = scored(each, LESSInfluence(dimensions=None))
    assert metrics["less_subtasks"] == 2
    torch.testing.assert_close(scores, by_subtask.amax(0), atol=1e-5, rtol=1e-4)
    scores, _ = scored(each, LESSInfluence(dimensions=None, over="mean"))
    torch.testing.assert_close(scores, by_subtask.mean(0), atol=1e-5, rtol=1e-4)


# ---- n-grams -----------------------------------------------------------------------------------------------------


def test_the_ratio_is_refreshed_against_what_was_trained_on():
    each = context()
    tokens = each.source.tokens
    reference, pool = count_ngrams(each.source.references, 2**12), count_ngrams(tokens, 2**12)
    table = log_ratio(reference, pool, 20.0)
    options = {"recent": 0.5, "smoothing": 20.0, "buckets": 2**12}
    torch.testing.assert_close(scored(each, NgramRatioInfluence(**options))[0], mean_log_ratio(tokens, None, table))
    trained = torch.tensor([3, 5, 8])
    scores, _ = scored(each.but(trained=trained), NgramRatioInfluence(**options))
    recent = log_ratio(reference, count_ngrams(tokens[trained], 2**12), 20.0)
    torch.testing.assert_close(scores, mean_log_ratio(tokens, None, table + 0.5 * recent))


def test_padding_without_a_mask_is_no_text():
    """Rows of a reference set of several lengths are padded, and only their labels say where."""
    short, padding = torch.full((4, 5), 7), torch.zeros(4, 3, dtype=torch.int64)
    tokens = torch.arange(80).view(10, 8) % 20
    padded = torch.cat([short, padding], dim=1)
    labels = padded.clone()
    labels[:, 5:] = -100
    labels[:, :2] = -100  # a prompt is text
    sources = FakeSource(tokens, short), FakeSource(tokens, padded, reference_labels=labels)
    found = [fake_context(source, model=Bigrams()) for source in sources]
    scores = [scored(each, NgramRatioInfluence(buckets=2**10), torch.arange(10))[0] for each in found]
    assert torch.equal(*scores)


# ---- live --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        LossDropInfluence(steps=8, learning_rate=1e-2),
        ReducibleLossInfluence(steps=8, learning_rate=1e-2),
        LESSInfluence(dimensions=256),
        NgramRatioInfluence(),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_round_of_any_of_them_finds_the_planted_candidates(estimator):
    source, planted = planted_source(candidates=300, share=0.2, length=12, vocab=50)
    each = warm_context("adamw", source=source)
    selector = RegressionSelector(HashedRidgeRegressor(buckets=256), probes=100, ratio=0.2, temperature=0.1)
    plan = play(SelectionRun(selector, estimator, UniformSelector(), 0, source), 40, each)
    assert planted[plan.ids].double().mean() > 0.5  # 2.5 times their share
