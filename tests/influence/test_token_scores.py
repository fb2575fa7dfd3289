"""Influence of single tokens: what autograd says of each token's loss, and what reaches a selector of it."""

import io

import pytest
import torch
from cases import Bigrams
from fakes import FakeSource, fake_context, random_source
from probing import candidate_batch, tiny_model, warm_context
from ranks import on_ranks
from torch.nn import functional as F

from liveselect.functional.differences import central_difference_dot
from liveselect.grammar import Around, InfluenceEstimator, Selection, Selector
from liveselect.influence import FirstOrderInfluence, KFACInfluence, OneStepInfluence
from liveselect.losses import causal_lm_loss, causal_lm_token_losses
from liveselect.measurement import Measurement
from liveselect.preserve import checksum, measuring
from liveselect.rehearsal import rehearse


def tokens_of(context, batch, **settings):
    estimator = FirstOrderInfluence(**settings)
    context.fit(estimator)
    with measuring(context.model, context.optimizer):
        found = estimator.score_tokens(context.live, batch)
    return estimator, found


def masked(context):
    """A batch with targets here and there, and a row without any."""
    batch = dict(candidate_batch(context, 4))
    labels = batch["labels"].clone()
    labels[0, 3:6] = -100
    labels[1, 5:] = -100
    labels[3] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("which", [candidate_batch, masked], ids=["all targets", "some targets"])
def test_token_losses_are_the_cross_entropies_and_their_mean_is_the_loss(which):
    context = warm_context()
    batch = which(context)
    with torch.no_grad():
        losses = causal_lm_token_losses(context.model, batch)
        logits = context.model(batch["input_ids"]).logits
        mean = causal_lm_loss(context.model, batch)
    targets = F.pad(batch["labels"][:, 1:], (1, 0), value=-100)
    every = F.cross_entropy(F.pad(logits[:, :-1], (0, 0, 1, 0)).mT, targets, reduction="none")
    assert torch.equal(losses.isnan(), targets == -100)
    assert torch.allclose(losses.nan_to_num(), every.where(targets != -100, 0.0).to(losses))
    assert torch.allclose(losses.nanmean(1).nan_to_num(), mean)


@pytest.mark.parametrize("engine", ["hooks", "central_difference", "forward_mode"])
def test_a_token_is_worth_the_product_of_its_own_gradient_with_the_direction(engine):
    source = random_source(candidates=32, length=12)
    context = warm_context(source=source, model=tiny_model())
    batch = masked(context)
    estimator, found = tokens_of(context, batch, engine=engine, difference=1e-6)
    direction, exact = estimator.direction(), 2e-4 if engine == "central_difference" else 1e-6
    with torch.enable_grad(), measuring(context.model, context.optimizer):
        losses = causal_lm_token_losses(context.model, batch)
        for i, t in ((0, 1), (0, 7), (1, 4), (2, 11)):
            names = list(direction)
            parameters = [context.model.get_parameter(name) for name in names]
            gradients = torch.autograd.grad(losses[i, t], parameters, retain_graph=True, allow_unused=True)
            expected = sum(
                float((direction[n] * g).sum()) for n, g in zip(names, gradients, strict=True) if g is not None
            )
            assert float(found[i, t]) == pytest.approx(expected, rel=exact, abs=1e-9)
    assert found[3].isnan().all()
    scored = context.score(estimator, batch)
    assert torch.allclose(found.nanmean(1)[:3].float(), scored[:3], rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("which", [candidate_batch, masked], ids=["all targets", "some targets"])
@pytest.mark.parametrize("make", [FirstOrderInfluence, lambda: KFACInfluence(factor_examples=8)], ids=["hooks", "kfac"])
def test_tokens_out_of_hooks_sum_to_the_candidate_and_are_the_limit_of_differences(make, which):
    context = warm_context(source=random_source(candidates=32, length=12), model=tiny_model())
    estimator, batch = make(), which(context)
    context.fit(estimator)
    with measuring(context.model, context.optimizer):
        found = estimator.score_tokens(context.live, batch)
        known = [i for i in range(len(found)) if not found[i].isnan().all()]
        direction = estimator.direction()
        errors = [
            float((of_differences(context, batch, direction, step) - found)[known].nan_to_num().abs().max())
            for step in (1e-2, 1e-3, 1e-4)
        ]
    scored = context.score(estimator, batch)
    counts = (~found.isnan()).sum(dim=1)
    torch.testing.assert_close(found.nansum(dim=1)[known].float(), (counts * scored)[known], rtol=1e-5, atol=1e-8)
    assert errors[1] < 0.05 * errors[0]  # the error of a difference falls with the square of its length
    assert errors[2] < 0.05 * errors[1]


def of_differences(context, batch, direction, step):
    return central_difference_dot(context.model, causal_lm_token_losses, batch, direction, step)


def test_a_model_without_a_second_derivative_is_measured_by_differences():
    context = warm_context(source=random_source(candidates=32, length=12), model=tiny_model())
    batch = candidate_batch(context)
    _, expected = tokens_of(context, batch, difference=1e-6)
    (norm,) = (module for name, module in context.model.named_modules() if name.endswith("final_layer_norm"))
    norm.register_forward_hook(lambda module, inputs, output: Once.apply(output))
    estimator, found = tokens_of(context, batch, difference=1e-6)
    assert not estimator._fitted.toward._second_order
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6, equal_nan=True)


class Once(torch.autograd.Function):
    """The identity, which can be differentiated once."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_measuring_tokens_leaves_the_run_as_it_was():
    context = warm_context()
    before = checksum(context.model, context.optimizer)
    tokens_of(context, candidate_batch(context))
    assert checksum(context.model, context.optimizer) == before


def test_where_tokens_are_not_known_there_are_none():
    context = warm_context()
    batch = candidate_batch(context)
    assert tokens_of(context, batch, engine="optimizer_step")[1] is None
    own = context.but(loss_fn=lambda model, batch: causal_lm_loss(model, batch))
    assert tokens_of(own, batch)[1] is None
    assert OneStepInfluence().score_tokens(context.live, batch) is None


class Listens(Selector):
    """Asks for candidates in two questions, and keeps what it is told."""

    needs_estimator = True
    learns_tokens = True

    def __init__(self):
        self.heard, self.asked = [], 0

    def propose(self, round):
        self.asked += 1
        return round.candidates[7 * (self.asked - 1) : 7 * self.asked] if self.asked < 3 else torch.empty(0).long()

    def observe_tokens(self, ids, tokens):
        self.heard.append((ids.tolist(), tokens))

    def observe(self, ids, influence):
        self.heard[-1] += (influence,)

    def select(self, round, budget):
        return Selection(round.candidates[:budget])

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


class Numbers(InfluenceEstimator):
    """Calls id + column / 100 a token's influence; rows of odd ids have none in column 2."""

    def score(self, model, batch):
        return batch["id"].float()

    def score_tokens(self, model, batch):
        columns = torch.arange(batch["input_ids"].shape[1])
        tokens = batch["id"][:, None] + columns / 100
        tokens[batch["id"] % 2 == 1, 2] = torch.nan
        return tokens


def a_context():
    source = random_source(candidates=30, length=6, rows=3)
    model = Bigrams()
    return fake_context(source, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def measured(selector, estimator=None, limit=None):
    context = a_context()
    measurement = Measurement(estimator or Numbers(), selector)
    measurement.advance(context.live, context.round, limit)
    return measurement


def expected_tokens(ids):
    return Numbers().score_tokens(None, {"id": torch.tensor(ids), "input_ids": torch.zeros(len(ids), 6)})


def test_a_selector_that_learns_from_tokens_gets_them_before_their_means():
    selector = Listens()
    measured(selector)
    for (ids, tokens, influence), first in zip(selector.heard, (0, 7), strict=True):
        assert ids == list(range(first, first + 7))
        assert torch.equal(tokens.nan_to_num(-1), expected_tokens(ids).nan_to_num(-1))
        assert torch.allclose(influence, tokens.nanmean(1))


def test_wrappers_pass_them_on_and_others_are_given_none():
    class Deaf(Listens):
        learns_tokens = False

        def observe(self, ids, influence):
            self.heard.append((ids.tolist(), influence))

    inner = Listens()
    measured(Around(Around(inner)))
    assert len(inner.heard[0]) == 3
    deaf = Deaf()
    measured(Around(deaf))
    assert deaf.heard[0][1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_measurement_that_is_saved_in_the_middle_of_a_question_keeps_its_tokens():
    first = Listens()
    measurement = measured(first, limit=4)
    file = io.BytesIO()
    torch.save(measurement.state_dict(), file)
    file.seek(0)
    context, second = a_context(), Listens()
    again = Measurement(Numbers(), second)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.advance(context.live, context.round)
    whole = Listens()
    measured(whole)
    for one, other in zip(second.heard, whole.heard, strict=True):
        assert torch.equal(one[1].nan_to_num(-1), other[1].nan_to_num(-1))


def _heard(_: int) -> list:
    selector = Listens()
    measured(selector)
    return [(ids, tokens.nan_to_num(-1).tolist(), influence.tolist()) for ids, tokens, influence in selector.heard]


def test_two_ranks_share_the_candidates_and_hear_the_same():
    one = _heard(0)
    assert on_ranks(_heard, 2, 0) == [one, one]


def test_tokens_of_another_shape_are_refused_in_a_round_and_in_the_rehearsal():
    class Wrong(Numbers):
        def score_tokens(self, model, batch):
            return batch["id"].float()

    with pytest.raises(ValueError, match=r"one influence for each token of 3 candidates, \(3, 6\)"):
        measured(Listens(), Wrong())
    source = FakeSource(random_source(candidates=30, length=6).tokens)
    context = warm_context(source=source)
    with pytest.raises(ValueError, match="score_tokens to return None, or one influence for each token"):
        rehearse(Listens(), Wrong(), context.live, context.round, 4)
