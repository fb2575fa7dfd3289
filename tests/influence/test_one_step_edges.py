"""What the one-step probe says of candidates and runs that cannot be measured, and what it charges."""

import pytest
import torch
from cases import Restless
from fakes import FakeSource, fake_context, random_source
from hand_flops import forward, with_backward
from probing import VOCAB, candidate_batch, measure, warm_context
from torch import nn

from liveselect.influence import OneStepInfluence


def test_a_candidate_whose_loss_is_not_finite_gets_nan_and_the_others_their_influence():
    context = warm_context()
    loss_fn = context.loss_fn

    def poisoned(model, batch):
        losses = loss_fn(model, batch)
        return losses * float("nan") if batch.get("id", torch.tensor([-1])).tolist() == [1] else losses

    batch = candidate_batch(context, 3)
    expected = measure(context.but(loss_fn=lambda model, batch: loss_fn(model, batch)), batch)
    found = measure(context.but(loss_fn=poisoned), batch)
    assert found[1].isnan()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_a_gradient_that_overflows_gives_nan_and_does_not_spoil_the_next_candidate():
    context = warm_context()
    loss_fn = context.loss_fn

    def steep(model, batch):
        losses = loss_fn(model, batch)
        if batch.get("id", torch.tensor([-1])).tolist() == [1]:
            weight = next(model.parameters()).flatten()[0]
            losses = losses + (weight - weight.detach()).clamp(min=0) ** 0.5  # value 0, slope infinite
        return losses

    found = measure(context.but(loss_fn=steep), candidate_batch(context, 3))
    assert found[1].isnan()
    assert found[[0, 2]].isfinite().all()


def test_flops_and_seconds_are_charged_to_the_parts_of_a_probe():
    context = warm_context()
    measure(context, candidate_batch(context, 3))
    assert {"snapshot", "probe step", "reference pass", "restore"} <= set(context.meter.seconds)
    assert context.meter.flops["probe step"] == with_backward(context.model, 3, 12)
    assert context.meter.flops["reference pass"] == (2 + 3) * forward(context.model, 4, 12)
    assert not context.meter.uncounted


def test_a_learning_rate_of_zero_is_refused_with_what_to_do():
    context = warm_context()
    context.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match=r"positive learning rate.*begin measuring after the first step"):
        context.fit(OneStepInfluence())


def test_with_several_groups_the_unit_is_the_largest_learning_rate():
    context = warm_context()
    parameters = list(context.model.parameters())
    groups = [{"params": parameters[:3], "lr": 1e-4}, {"params": parameters[3:], "lr": 1e-3}]
    fitted = context.but(optimizer=torch.optim.AdamW(groups)).fit(OneStepInfluence())
    assert fitted["probe_learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (
            lambda c: c.but(optimizer=torch.optim.LBFGS(c.model.parameters())),
            TypeError,
            "LBFGS.step needs a closure.*AdamW, SGD",
        ),
        (
            lambda c: c.but(loss_fn=lambda model, batch: torch.full((4,), float("inf"))),
            ValueError,
            "reference loss before any step is inf.*may have diverged",
        ),
        (
            lambda c: c.but(source=FakeSource(c.source.tokens, reference_labels=c.source.tokens[:4] * 0 - 100)),
            ValueError,
            "no token of the reference set carries loss",
        ),
        (lambda c: c.model.requires_grad_(False) and c, ValueError, "parameters that require a gradient, got none"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(break_it, error, message):
    with pytest.raises(error, match=message):
        break_it(warm_context()).fit(OneStepInfluence())


def test_a_zero_gradient_step_that_overshoots_is_refused():
    context = warm_context()
    context.optimizer.param_groups[0]["lr"] = 1e300
    with pytest.raises(ValueError, match=r"after a step on zero gradients is .*lower the learning rate"):
        context.fit(OneStepInfluence())


def test_sparse_gradients_are_refused_naming_the_module():
    model = Restless().double()
    model.embedding = nn.Embedding(VOCAB, 16, sparse=True)
    context = fake_context(random_source(vocab=VOCAB), model=model)
    with pytest.raises(TypeError, match=r"\['embedding'\] make sparse gradients.*sparse=False"):
        context.fit(OneStepInfluence())


def test_a_loss_without_gradients_is_refused():
    context = warm_context()
    loss_fn = context.loss_fn
    with pytest.raises(ValueError, match="does not depend on any parameter that is trained"):
        measure(context.but(loss_fn=lambda model, batch: loss_fn(model, batch).detach()), candidate_batch(context))


def test_scoring_before_fitting_is_refused():
    context = warm_context()
    with pytest.raises(RuntimeError, match="score was called before fit"):
        context.score(OneStepInfluence(), candidate_batch(context))


@pytest.mark.parametrize("settings", [{"step": "half"}, {"reference_precision": "bf16"}])
def test_unknown_settings_are_refused_with_those_that_exist(settings):
    with pytest.raises(ValueError, match=rf"expected {next(iter(settings))} to be one of \('"):
        OneStepInfluence(**settings)
