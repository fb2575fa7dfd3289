"""The one-step probe against brute force, closed forms and limits."""

import copy
from functools import partial

import pytest
import torch
from fakes import fake_context, planted_source
from probing import (
    OPTIMIZERS,
    VOCAB,
    RegressionSource,
    candidate_batch,
    mean_loss,
    measure,
    regression_context,
    restless_context,
    tiny_model,
    warm_context,
)
from torch import nn

from liveselect.influence import OneStepInfluence
from liveselect.influence.reference import ReferencePass


def stepped_copy(context, tokens, divisor=1, fresh_optimizer=None):
    """A deep copy of model and optimizer after one step on ``tokens (1, T)``, or on zeros when it is None."""
    model, optimizer = copy.deepcopy((context.model, context.optimizer))
    if fresh_optimizer is not None:
        optimizer = fresh_optimizer(model.parameters())
    model.eval()
    if tokens is not None:
        (mean_loss(model, tokens) / divisor).backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    context.live.clip_gradients(list(model.parameters()))
    optimizer.step()
    return model


def brute_force(context, tokens, divisor=1, **kwargs):
    loss = [
        mean_loss(stepped_copy(context, row, divisor, **kwargs), context.source.references).item()
        for row in [None, *tokens.split(1)]
    ]
    return torch.tensor([divisor * (loss[0] - after) / context.optimizer.param_groups[0]["lr"] for after in loss[1:]])


@pytest.mark.parametrize("step", ["published", "in_batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_influence_is_what_stepping_a_deep_copy_gives(optimizer, step):
    context = warm_context(optimizer).but(global_batch=8)
    batch = candidate_batch(context)
    expected = brute_force(context, batch["input_ids"], divisor=8 if step == "in_batch" else 1)
    torch.testing.assert_close(measure(context, batch, step), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_after_the_step_equals_that_of_a_deep_copy_to_the_last_bit(dtype):
    context = warm_context(model=tiny_model(dtype))
    batch = candidate_batch(context)
    reference = ReferencePass.load(context.live, context.round)
    loss = [
        reference.loss(context.but(model=stepped_copy(context, row)).live)
        for row in [None, *batch["input_ids"].split(1)]
    ]
    expected = torch.tensor([(loss[0] - after) / 2e-3 for after in loss[1:]], dtype=torch.float64).float()
    assert torch.equal(measure(context, batch), expected)


def test_a_probe_that_forgets_the_moments_gives_something_else():
    context = warm_context("adamw")
    batch = candidate_batch(context, 16)
    measured = measure(context, batch)
    forgetful = brute_force(context, batch["input_ids"], fresh_optimizer=OPTIMIZERS["adamw"])
    assert (measured - forgetful).abs().mean() > measured.abs().mean()


def reference_gradient(context, model=None):
    model = context.model if model is None else model
    loss = mean_loss(model, context.source.references)
    return torch.autograd.grad(loss, list(model.parameters()))


def dot(first, second):
    return sum((a * b).sum() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("step", ["published", "in_batch"])
def test_as_the_learning_rate_of_sgd_vanishes_influence_becomes_the_dot_product_of_gradients(step):
    context = warm_context("sgd").but(clip_gradients=lambda parameters: None, global_batch=8)
    batch = candidate_batch(context)
    toward = reference_gradient(context)
    products = [
        dot(toward, torch.autograd.grad(mean_loss(context.model, row), list(context.model.parameters())))
        for row in batch["input_ids"].split(1)
    ]
    errors = []
    for rate in (1e-3, 1e-4, 1e-5):
        context.optimizer.param_groups[0]["lr"] = rate
        errors.append((measure(context, batch, step) - torch.tensor(products)).abs().max())
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)  # first order: the error falls with the rate
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)
    assert errors[2] < 1e-2 * max(product.abs() for product in products)


def test_as_the_learning_rate_of_adam_vanishes_influence_becomes_a_dot_product_with_the_change_of_its_direction():
    context = warm_context(partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), eps=1e-3))
    context = context.but(clip_gradients=lambda parameters: None)
    context.optimizer.param_groups[0]["lr"] = 1e-7
    batch = candidate_batch(context)

    def direction(parameter, gradient):
        state = context.optimizer.state[parameter]
        step = state["step"] + 1
        first = (0.9 * state["exp_avg"] + 0.1 * gradient) / (1 - 0.9**step)
        second = (0.95 * state["exp_avg_sq"] + 0.05 * gradient**2) / (1 - 0.95**step)
        return first / (second.sqrt() + 1e-3)

    parameters = list(context.model.parameters())
    expected = []
    for row in batch["input_ids"].split(1):
        gradient = torch.autograd.grad(mean_loss(context.model, row), parameters)
        change = [direction(p, g) - direction(p, 0) for p, g in zip(parameters, gradient, strict=True)]
        expected.append(dot(reference_gradient(context), change))
    torch.testing.assert_close(measure(context, batch), torch.tensor(expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "zero_step", "after"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0.125, 0.045),
        # cold Adam moves by the learning rate, decay by lr * 0.1: 1 -> 0.99 on zeros, 1 -> 0.89 on the candidate
        (partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1), 0.49**2 / 2, 0.39**2 / 2),
    ],
)
def test_a_scalar_problem_done_by_hand(optimizer, zero_step, after):
    context = regression_context([1.0], [[2.0]], [1.0], [[1.0]], [0.5], optimizer)
    estimator = OneStepInfluence()
    fitted = context.fit(estimator)
    influence = context.score(estimator, candidate_batch(context, 1)).item()
    assert fitted["reference_loss"] == pytest.approx(0.125, abs=1e-15)
    assert fitted["reference_loss_zero_step"] == pytest.approx(zero_step, abs=1e-15)
    assert influence == pytest.approx((zero_step - after) / 0.1, rel=1e-6)


@pytest.mark.parametrize(("step", "divisor"), [("published", 1), ("in_batch", 4)])
def test_for_linear_regression_influence_is_the_quadratic_form_exactly(step, divisor):
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, y, reference_x, reference_y = draw(6, 5), draw(6), draw(9, 5), draw(9)
    context = regression_context([0.3] * 5, x, y, reference_x, reference_y, partial(torch.optim.SGD, lr=0.1))
    weights = context.model.weights.detach()
    gradients = (x @ weights - y)[:, None] * x
    toward = (reference_x @ weights - reference_y) @ reference_x / 9
    curvature = torch.einsum("bi,ij,bj->b", gradients, reference_x.T @ reference_x / 9, gradients)
    expected = gradients @ toward - 0.1 / 2 * curvature / divisor
    torch.testing.assert_close(
        measure(context, candidate_batch(context, 6), step), expected.float(), rtol=1e-6, atol=1e-7
    )


def test_influence_does_not_depend_on_the_order_or_company_of_candidates():
    context = warm_context()
    estimator = OneStepInfluence()
    context.fit(estimator)
    batch = candidate_batch(context, 6)
    together = context.score(estimator, batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = context.score(estimator, {key: value[order] for key, value in batch.items()})
    alone = [context.score(estimator, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(6)]
    assert torch.equal(permuted, together[order])
    assert torch.equal(torch.cat(alone), together)


def test_tied_embeddings_dropout_and_unused_parameters_agree_with_brute_force():
    context = restless_context()
    batch = candidate_batch(context)
    rows = batch["input_ids"]

    def reference_after(tokens):
        model, optimizer = copy.deepcopy((context.model, context.optimizer))
        model.eval()
        if tokens is not None:
            mean_loss(model, tokens).backward()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return mean_loss(model, context.source.references).item()

    expected = [(reference_after(None) - reference_after(row)) / 1e-2 for row in rows.split(1)]
    torch.testing.assert_close(measure(context, batch), torch.tensor(expected), rtol=1e-6, atol=1e-9)


def test_a_candidate_that_leaves_a_parameter_untouched_still_carries_its_momentum():
    class TwoWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.second = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def loss(model, batch):
        if len(batch["x"]) == 1 and batch["x"].item() == 0:
            return (model.first * 0).reshape(1)  # zero slope in one parameter, the other is not touched
        return (model.first + model.second).expand(len(batch["x"]))

    model = TwoWays()
    source = RegressionSource(torch.tensor([1.0, 0.0]), *(torch.ones(2) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (model.first + model.second).backward()
    optimizer.step()
    context = fake_context(source, model=model, optimizer=optimizer, loss_fn=loss)
    touching, untouching = measure(context, candidate_batch(context, 2)).tolist()
    assert touching == pytest.approx(2)  # a gradient of 1 in each of two parameters, the reference slope too
    assert untouching == 0  # exactly the zero-gradient step, with nothing left of the candidate before


@pytest.mark.parametrize("step", ["published", "in_batch"])
def test_text_like_the_reference_has_more_influence_than_noise(step):
    source, planted = planted_source(candidates=48, share=0.5, length=16, vocab=VOCAB)
    context = warm_context(source=source)
    influence = measure(context, candidate_batch(context, 48), step)
    better = influence[planted][:, None] > influence[~planted]
    assert better.float().mean() > 0.95


def test_sixteen_bits_in_the_reference_pass_drown_the_differences_that_float32_keeps():
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    single = warm_context(model=tiny_model(torch.float32))
    double = single.but(model=(pair := copy.deepcopy((single.model, single.optimizer)))[0].double())
    double = double.but(optimizer=pair[1])
    for state in pair[1].state.values():
        state.update({key: value.double() for key, value in state.items() if key != "step"})
    batch = candidate_batch(single, 12)
    truth = measure(double, batch)
    single = single.but(autocast=autocast)
    error = {
        precision: (measure(single, batch, reference_precision=precision) - truth).abs().mean()
        for precision in ("float32", "training")
    }
    assert error["training"] > 20 * error["float32"]


def test_an_autocast_that_is_already_open_does_not_serve_weights_from_before_the_step():
    context = warm_context(model=tiny_model(torch.float32)).but(autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    batch = candidate_batch(context)
    expected = measure(context, batch, reference_precision="training")
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(context, batch, reference_precision="training")
    assert torch.equal(found, expected)
    assert (expected != 0).all()
