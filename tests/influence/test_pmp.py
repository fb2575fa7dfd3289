"""Influence on the future against autograd through the unrolled training of a small language model, in float64."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fakes import planted_source, random_source
from probing import CLIP, VOCAB, clip, mean_loss
from ranks import on_ranks
from scipy.stats import spearmanr
from torch.nn.attention import SDPBackend, sdpa_kernel
from unrolled import SETTINGS, guarded_sqrt, written_out
from unrolled_language_model import BATCH, CANDIDATES, RATE, TRAINED, warm_context

from liveselect.functional import differences
from liveselect.influence.pmp import PMPInfluence, unroll
from liveselect.influence.pmp.unroll import unrolled_ids

STEPS = 5
TOLERANCE = 1e-10
SCHEDULE = tuple(1.0 + 0.5 * math.sin(step) for step in range(STEPS))


def example_losses(model, parameters, tokens):
    with sdpa_kernel(SDPBackend.MATH):
        logits = torch.func.functional_call(model, parameters, (tokens,)).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(dim=1)


def moments_of(context, parameter):
    kept = context.optimizer.state.get(parameter, {})
    return tuple(kept[name].clone() for name in ("momentum_buffer", "exp_avg", "exp_avg_sq") if name in kept)


def through_the_unroll(context, name, ids, scored=range(STEPS), schedule=SCHEDULE, limit=CLIP, cold=False):
    """- dF / d epsilon / eta of the first candidates by autograd, (CANDIDATES,)."""
    model = context.model.eval()
    tokens = context.source.tokens
    epsilon = torch.zeros(CANDIDATES, dtype=torch.float64, requires_grad=True)
    live = dict(model.named_parameters())
    parameters = {key: value.detach().clone().requires_grad_() for key, value in live.items()}
    moments = {key: () if cold else moments_of(context, value) for key, value in live.items()}
    problem = SimpleNamespace(name=name, limit=limit, count=TRAINED, rate=lambda step: RATE * schedule[step])
    total = 0.0
    for step, rows in enumerate(ids):
        loss = example_losses(model, parameters, tokens[rows]).mean()
        if step in scored:
            loss = loss + example_losses(model, parameters, tokens[:CANDIDATES]) @ epsilon
        gradients = torch.autograd.grad(loss, parameters.values(), create_graph=True)
        gradient = dict(zip(parameters, gradients, strict=True))
        parameters, moments = written_out(problem, parameters, gradient, moments, step, guarded_sqrt)
        total = total + example_losses(model, parameters, context.source.references).mean()
    return -torch.autograd.grad(total, epsilon)[0] / RATE


def influence(context, **settings):
    exact = {"hessian": "double_backward", "denominator_floor": 0.0, "schedule": SCHEDULE}
    estimator = PMPInfluence(**{**exact, "steps": STEPS, "score_every": 1, "batch_size": BATCH, **settings})
    context.fit(estimator)
    return context.score_ids(estimator, torch.arange(CANDIDATES))


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_influence_is_the_gradient_through_unrolled_training_by_the_live_optimizer(name):
    context = warm_context(name)
    expected = through_the_unroll(context, name, unrolled_ids(context.round, STEPS, BATCH))
    assert relative_error(influence(context), expected) < TOLERANCE


def test_scored_steps_are_those_in_which_the_candidate_takes_part():
    context = warm_context()
    ids = unrolled_ids(context.round, STEPS, BATCH)
    expected = through_the_unroll(context, "adamw", ids, scored=(0, 2, 4))
    assert relative_error(influence(context, score_every=2), expected) < TOLERANCE


def test_the_published_form_unrolls_plain_sgd_whatever_the_run_trains_with():
    context = warm_context("adamw")
    ids = unrolled_ids(context.round, STEPS, BATCH)
    expected = through_the_unroll(context, "sgd", ids, limit=None, cold=True)
    assert relative_error(influence(context, dynamics="sgd", learning_rate=RATE), expected) < TOLERANCE


def test_tied_weights_and_unequal_batches_of_the_source_change_nothing():
    source = random_source(candidates=40, length=8, vocab=VOCAB, rows=3)
    context = warm_context(source=source, model={"tie_word_embeddings": True})
    expected = through_the_unroll(context, "adamw", unrolled_ids(context.round, STEPS, BATCH))
    assert relative_error(influence(context, hessian_rows=2), expected) < TOLERANCE


def test_with_one_step_influence_is_the_dot_product_with_the_reference_gradient_after_it():
    context = warm_context("sgd", clipped=False)
    (rows,) = unrolled_ids(context.round, 1, BATCH)
    found = influence(context, steps=1, schedule=())
    stepped = copy.deepcopy(context.model).eval()
    gradients = [gradient_at(context.model, tokens[None]) for tokens in context.source.tokens[:CANDIDATES]]
    for parameter, gradient in zip(
        stepped.parameters(), gradient_at(context.model, context.source.tokens[rows]), strict=True
    ):
        parameter.data -= RATE * gradient
    after = gradient_at(stepped, context.source.references)
    expected = torch.stack([sum((a * b).sum() for a, b in zip(after, own, strict=True)) for own in gradients])
    assert relative_error(found, expected) < TOLERANCE


def gradient_at(model, tokens):
    return torch.autograd.grad(mean_loss(model, tokens), list(model.parameters()))


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
def test_the_unroll_ends_where_training_on_these_batches_ends(name):
    context = warm_context(name)
    estimator = PMPInfluence(steps=STEPS, batch_size=BATCH)
    metrics = context.fit(estimator)
    model, optimizer = copy.deepcopy((context.model, context.optimizer))
    model.eval()
    for rows in unrolled_ids(context.round, STEPS, BATCH):
        optimizer.zero_grad()
        mean_loss(model, context.source.tokens[rows]).backward()
        clip(list(model.parameters()))
        optimizer.step()
    expected = mean_loss(model, context.source.references).item()
    assert metrics["reference_loss_unrolled"] == pytest.approx(expected, rel=1e-12)
    assert metrics["reference_loss"] == pytest.approx(mean_loss(context.model, context.source.references).item())
    assert metrics["unroll_learning_rate"] == RATE


def test_repeating_steps_between_kept_states_changes_no_bit():
    context = warm_context()
    whole = influence(context, steps=7, schedule=(), snapshot_every=7)
    for every in (1, 2, 3, 4):
        assert torch.equal(influence(context, steps=7, schedule=(), snapshot_every=every), whole)


@pytest.mark.parametrize("every", [1, 3])
def test_nor_does_it_where_differences_had_to_go_less_far(monkeypatch, every):
    context = warm_context()
    exact = influence(context)
    monkeypatch.setitem(differences.DISPLACEMENT_SHARES, torch.float64, 0.05)  # much too far
    whole = influence(context, hessian="central_difference", snapshot_every=STEPS)
    assert relative_error(whole, exact) < 1e-2
    assert torch.equal(influence(context, hessian="central_difference", snapshot_every=every), whole)


def test_central_differences_agree_with_exact_products_and_curvature():
    context = warm_context()
    exact = influence(context)
    assert relative_error(influence(context, hessian="central_difference"), exact) < 1e-6
    assert relative_error(influence(context, products="central_difference"), exact) < 1e-4


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_in_single_precision_differences_are_right_to_a_hundredth(name):
    context = warm_context(name, model={"dtype": torch.float32})
    exact = influence(context)
    assert relative_error(influence(context, hessian="central_difference"), exact) < 1e-2
    assert relative_error(influence(context, products="central_difference"), exact) < 1e-2


def test_products_as_training_computes_them_rank_alike():
    context = warm_context(model={"dtype": torch.float32})
    context = context.but(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    ids = torch.arange(32)

    def scores(**settings):
        estimator = PMPInfluence(steps=2, score_every=1, batch_size=BATCH, **settings)
        context.fit(estimator)
        return context.score_ids(estimator, ids)

    exact = scores()
    assert torch.equal(scores(product_precision="float32"), exact)  # autocast is switched off
    for products in ("exact", "central_difference"):
        short = scores(products=products, product_precision="training")
        assert not torch.equal(short, exact)
        assert spearmanr(short, exact).statistic > 0.95


def _influence_on_this_rank(batch_size):
    return influence(warm_context(), batch_size=batch_size)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "batch_size"), [(2, BATCH), (3, 1)])
def test_ranks_that_share_the_unroll_find_what_one_finds(ranks, batch_size):
    found = on_ranks(_influence_on_this_rank, ranks, batch_size)
    alone = influence(warm_context(), batch_size=batch_size)
    for values in found:
        assert torch.equal(values, found[0])
        assert relative_error(values, alone) < TOLERANCE


def test_leaving_curvature_out_would_be_seen(monkeypatch):
    context = warm_context("sgd")
    exact = influence(context)
    nothing = {name: torch.zeros_like(value) for name, value in context.model.named_parameters()}
    monkeypatch.setattr(unroll.Unroll, "_curved", lambda *arguments: nothing)
    assert relative_error(influence(context), exact) > 1e-2


def test_a_batch_is_scored_as_its_candidates_are_one_by_one():
    context = warm_context()
    estimator = PMPInfluence(steps=3, score_every=2, batch_size=BATCH)
    context.fit(estimator)
    ids = torch.tensor([5, 0, 3, 9])
    together = context.score_ids(estimator, ids)
    (batch,) = context.round.batches(ids)
    alone = torch.cat([context.score(estimator, row) for i in ids for row in context.round.batches(i[None])])
    assert context.score(estimator, batch).dtype == alone.dtype == torch.float32
    torch.testing.assert_close(alone.double(), together, rtol=1e-6, atol=0)
    torch.testing.assert_close(context.score(estimator, batch).double(), together, rtol=1e-6, atol=0)


def test_another_learning_rate_is_that_of_an_optimizer_which_has_it():
    found = influence(warm_context(), learning_rate=RATE / 4)
    context = warm_context()
    context.optimizer.param_groups[0]["lr"] = RATE / 4
    torch.testing.assert_close(found, influence(context), rtol=1e-10, atol=0)


def test_a_group_that_is_held_still_takes_part_like_frozen_parameters():
    def context_of(held):
        context = warm_context("adamw", clipped=False)
        still, moving = [], []
        for name, parameter in context.model.named_parameters():
            (still if "embed" in name else moving).append(parameter)
        context.optimizer.param_groups[0]["params"] = moving
        if held == "group":
            context.optimizer.add_param_group({**context.optimizer.param_groups[0], "params": still, "lr": 0.0})
        else:
            for parameter in still:
                parameter.requires_grad_(False)
        return context

    torch.testing.assert_close(influence(context_of("group")), influence(context_of("frozen")), rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", ["tokens", "examples"])
def test_the_reference_loss_is_a_mean_over_tokens_or_over_examples_that_leaves_masked_tokens_out(weighting):
    source = random_source(candidates=40, length=8, vocab=VOCAB)
    source.reference_labels = source.references.clone()
    source.reference_labels[0, :6] = source.reference_labels[1, :3] = -100
    context = warm_context("sgd", clipped=False, source=source)
    found = influence(context, steps=1, schedule=(), reference_weighting=weighting)
    stepped = copy.deepcopy(context.model).eval()
    (rows,) = unrolled_ids(context.round, 1, BATCH)
    for parameter, gradient in zip(stepped.parameters(), gradient_at(context.model, source.tokens[rows]), strict=True):
        parameter.data -= RATE * gradient
    losses = F.cross_entropy(
        stepped(source.references).logits[:, :-1].transpose(1, 2), source.reference_labels[:, 1:], reduction="none"
    )
    counts = (source.reference_labels[:, 1:] != -100).sum(dim=1)
    loss = losses.sum() / counts.sum() if weighting == "tokens" else (losses.sum(dim=1) / counts).mean()
    after = torch.autograd.grad(loss, list(stepped.parameters()))
    gradients = [gradient_at(context.model, tokens[None]) for tokens in source.tokens[:CANDIDATES]]
    expected = torch.stack([sum((a * b).sum() for a, b in zip(after, own, strict=True)) for own in gradients])
    assert relative_error(found, expected) < TOLERANCE


def effect_of_training_on(context, candidate, ids, weight):
    """How much the summed reference loss falls when a candidate joins every step, by training twice."""

    def summed_loss(joins):
        model, optimizer = copy.deepcopy((context.model, context.optimizer))
        total = 0.0
        for rows in ids:
            optimizer.zero_grad()
            loss = mean_loss(model, context.source.tokens[rows])
            if joins:
                loss = loss + weight * mean_loss(model, context.source.tokens[candidate][None])
            loss.backward()
            clip(list(model.parameters()))
            optimizer.step()
            with torch.no_grad():
                total += float(mean_loss(model, context.source.references))
        return total

    return (summed_loss(False) - summed_loss(True)) / weight


@pytest.mark.long
def test_influence_foretells_what_training_on_a_candidate_does_also_where_tokens_are_new():
    source = random_source(candidates=40, length=8, vocab=VOCAB)
    source.tokens[16:] %= 35  # the model was trained on the last ones: tokens from 35 on are new to it
    context = warm_context("adamw", source=source)
    context.model.eval()
    context = context.but(candidates=torch.arange(16, 40))
    context.optimizer.param_groups[0]["lr"] = RATE / 4  # a step of this one's size is not the question here
    ids = unrolled_ids(context.round, 4, BATCH)
    truth = [effect_of_training_on(context, candidate, ids, 1 / BATCH) for candidate in range(16)]

    def agreement(floor):
        estimator = PMPInfluence(steps=4, score_every=1, batch_size=BATCH, denominator_floor=floor)
        context.fit(estimator)
        return spearmanr(context.score_ids(estimator, torch.arange(16)), truth).statistic

    assert agreement(0.3) > 0.8
    assert agreement(0.0) < 0.4  # the derivative at weight zero, exact, and of little use


@pytest.mark.parametrize("dynamics", ["live", "sgd"])
def test_candidates_that_look_like_the_reference_come_out_on_top(dynamics):
    source, planted = planted_source(candidates=60, share=0.3, length=16, vocab=VOCAB)
    context = warm_context(source=source)
    estimator = PMPInfluence(steps=6, score_every=2, batch_size=8, dynamics=dynamics)
    context.fit(estimator)
    scores = context.score_ids(estimator, torch.arange(60))
    top = scores.topk(int(planted.sum())).indices
    assert planted[top].double().mean() > 0.8
    assert scores[planted].mean() > 0 > scores[~planted].mean()
