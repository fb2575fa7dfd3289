"""First-order influence against the exact probe in the limit, between its engines, and what it leaves of a run."""

import math

import pytest
import torch
from cases import Restless
from fakes import FakeSource, fake_context, random_source
from hand_flops import matrices, with_backward
from probing import (
    OPTIMIZERS,
    VOCAB,
    backward,
    candidate_batch,
    measure,
    restless_context,
    tiny_model,
    warm_context,
)
from scipy.stats import spearmanr
from torch import nn

from liveselect.functional.slopes import step_slope
from liveselect.grammar import NotMeasurableError
from liveselect.influence import FirstOrderInfluence
from liveselect.influence.step_sizes import typical_gradient
from liveselect.losses import causal_lm_loss
from liveselect.preserve import checksum, measuring

CLIPS = {
    "inactive": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e6) and None,
    "by norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05) and None,
    "by value": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3),
}


def first_order(context, batch, **settings):
    estimator = FirstOrderInfluence(**settings)
    context.fit(estimator)
    return context.score(estimator, batch)


def vanishing(context, rate=1e-9):
    """The context with steps so short that the reference loss is a line along them."""
    for group in context.optimizer.param_groups:
        group["lr"] = rate
    return context


def close(found, expected, share=1e-3):
    return float((found - expected).abs().max()) < share * float(expected.abs().max())


def seen_everything(optimizer, **kwargs):
    """A context whose moments are warm in every row of the embeddings."""
    context = warm_context(optimizer, **kwargs)
    context = context.but(clip_gradients=CLIPS["inactive"])
    for _ in range(3):
        context.optimizer.zero_grad()
        tokens = torch.arange(VOCAB).view(2, -1)
        backward(context, torch.cat([tokens, tokens.flip(1)]))  # nothing is learnt of the last token of a row
        context.optimizer.step()
    context.optimizer.zero_grad()
    return context


@pytest.mark.parametrize("slope_over", ["zero", "candidates"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_exact_probe_in_the_limit_of_small_steps(optimizer, slope_over):
    context = seen_everything(optimizer).but(global_batch=1 << 17)
    batch = candidate_batch(context, 6)
    assert close(first_order(context, batch, slope_over=slope_over), measure(context, batch, "in_batch"))


@pytest.mark.parametrize("optimizer", ["sgd", "sgd with momentum and decay", "adamw"])
@pytest.mark.parametrize("clip", CLIPS)
def test_taking_each_candidates_step_is_the_exact_probe_in_the_limit_with_clipping_too(optimizer, clip):
    context = vanishing(warm_context(optimizer).but(clip_gradients=CLIPS[clip], global_batch=4), 1e-7)
    batch = candidate_batch(context, 6)
    for form in ("published", "in_batch"):
        assert close(first_order(context, batch, engine="optimizer_step", step=form), measure(context, batch, form))


def test_a_preconditioner_that_is_forgotten_or_cold_is_far_from_the_exact_probe():
    context = seen_everything("adamw").but(global_batch=1 << 17)
    batch = candidate_batch(context, 6)
    exact = measure(context, batch, "in_batch")
    forgotten = context.but(optimizer=torch.optim.SGD(context.model.parameters(), lr=2e-3))
    cold = context.but(optimizer=OPTIMIZERS["adamw"](context.model.parameters()))
    for other in (forgotten, cold):
        found = first_order(other, batch, slope_over="zero")
        assert not close(found / found.norm(), exact / exact.norm(), share=0.1)


def test_a_gradient_taken_before_the_zero_step_is_not_that_of_the_exact_probe():
    context = seen_everything("adamw").but(global_batch=1 << 17)
    batch = candidate_batch(context, 6)
    found = first_order(context, batch, gradient_at="current")
    assert not close(found, measure(context, batch, "in_batch"), share=0.01)
    for group in context.optimizer.param_groups:
        group["lr"] = 1e-6  # no way to go: both places are one
    assert close(found, first_order(context, batch), share=1e-4)


def test_products_leave_clipping_out_which_matters_where_it_is_active():
    context = warm_context("sgd").but(clip_gradients=CLIPS["by norm"], global_batch=4)
    context.optimizer.param_groups[0]["lr"] = 1e-6
    batch = candidate_batch(context, 6)
    exact = measure(context, batch, "in_batch")
    assert not close(first_order(context, batch), exact, share=0.01)
    assert close(first_order(context, batch, sampled=32), exact, share=0.3)  # but for the mean effect, which is in it
    barely = context.but(global_batch=1 << 10)  # no single example is as long as that many limits
    assert close(first_order(barely, batch), measure(barely, batch, "in_batch"))


@pytest.mark.parametrize("optimizer", ["sgd with momentum and decay", "adamw"])
def test_engines_agree(optimizer):
    context = warm_context(optimizer)
    batch = candidate_batch(context, 6)
    hooks = first_order(context, batch)
    assert close(first_order(context, batch, engine="forward_mode"), hooks, 1e-6)  # float32 is what comes back
    assert close(first_order(context, batch, engine="central_difference"), hooks, 1e-6)
    single = warm_context(optimizer, model=tiny_model(torch.float32))
    hooks = first_order(single, batch)
    assert close(first_order(single, batch, engine="forward_mode"), hooks, 1e-4)


@pytest.mark.parametrize("optimizer", ["sgd with momentum and decay", "adamw"])
def test_differences_in_float32_are_off_by_little_curvature_and_by_the_rounding_of_two_losses(optimizer):
    """Rounding depends on the order of sums, and so on the number of threads; what it can do to a difference does not.

    A loss that is off by three of its last places moves the difference of two by six, over twice the displacement.
    """
    single, double = (warm_context(optimizer, model=tiny_model(dtype)) for dtype in (torch.float32, torch.float64))
    batch = candidate_batch(single, 6)
    estimator = FirstOrderInfluence(engine="central_difference")
    single.fit(estimator)
    difference = estimator.fitted_state()["difference"]
    without_rounding = first_order(double, batch, engine="central_difference", difference=difference)
    assert close(without_rounding, first_order(double, batch), 3e-4)
    direction = estimator.direction()
    start = nn.utils.get_total_norm([p.detach() for n, p in single.model.named_parameters() if n in direction])
    displacement = difference * start / nn.utils.get_total_norm(direction.values())
    loss = single.loss_fn(single.model, batch).detach().max()
    rounding = 6 * torch.finfo(torch.float32).eps * loss / (2 * displacement)
    assert float((single.score(estimator, batch) - without_rounding).abs().max()) < float(rounding)
    assert float(rounding) < 2e-3 * float(without_rounding.abs().max())  # the displacement is long enough


def test_parameters_of_16_bits_are_displaced_far_enough_to_be_told_from_rounding():
    context = warm_context(model=tiny_model(torch.bfloat16))
    batch = candidate_batch(context, 32)
    hooks = first_order(context, batch)
    found = first_order(context, batch, engine="central_difference")
    near = first_order(context, batch, engine="central_difference", difference=1e-4)
    assert spearmanr(found, hooks).statistic > 0.95
    assert spearmanr(near, hooks).statistic < 0.9


def test_candidates_without_targets_cannot_tell_how_large_gradients_are():
    context = warm_context()
    source = context.source
    empty = FakeSource(source.tokens, source.references, labels=torch.full_like(source.tokens, -100))
    with pytest.raises(NotMeasurableError, match="none of 16 sampled candidates has a finite gradient other than zero"):
        context.but(source=empty).fit(FirstOrderInfluence())


def test_for_sgd_the_step_engine_gives_the_products_and_the_direction_is_the_reference_gradient():
    context = warm_context("sgd").but(clip_gradients=CLIPS["inactive"])
    batch = candidate_batch(context, 6)
    estimator = FirstOrderInfluence(gradient_at="current")
    fitted = context.fit(estimator)
    assert close(
        first_order(context, batch, engine="optimizer_step", gradient_at="current"), context.score(estimator, batch)
    )
    references = context.source.references
    loss = backward(context, references)
    assert fitted["reference_loss"] == pytest.approx(loss, rel=1e-12)
    for name, parameter in context.model.named_parameters():
        torch.testing.assert_close(estimator.direction()[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_optimizers_that_mix_coordinates_are_refused_for_products_and_taken_by_their_steps():
    context = warm_context()
    matrices = [parameter for parameter in context.model.parameters() if parameter.dim() == 2]
    context = context.but(optimizer=torch.optim.Muon(matrices, lr=1e-3), global_batch=1 << 10)
    backward(context, context.source.tokens[:8])
    context.optimizer.step()
    batch = candidate_batch(context, 3)
    with pytest.raises(TypeError, match=r'Muon takes in one coordinate.*engine="optimizer_step"'):
        context.fit(FirstOrderInfluence())
    assert close(first_order(context, batch, engine="optimizer_step"), measure(context, batch, "in_batch"), 0.01)


ENGINES = ["hooks", "central_difference", "forward_mode", "optimizer_step"]


@pytest.mark.parametrize("engine", ENGINES)
def test_measuring_leaves_a_run_bitwise_as_it_was_in_the_middle_of_accumulation(engine):
    context = restless_context()
    exclude = () if engine != "hooks" else ("norm.*",)
    backward(context, context.source.tokens[:4])
    gradients = {name: p.grad for name, p in context.model.named_parameters() if p.grad is not None}
    values = {name: gradient.clone() for name, gradient in gradients.items()}
    before, random_state = checksum(context.model, context.optimizer), torch.get_rng_state()
    modes = [module.training for module in context.model.modules()]
    first_order(context, candidate_batch(context), engine=engine, exclude=exclude)
    assert checksum(context.model, context.optimizer) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in context.model.modules()] == modes
    for name, parameter in context.model.named_parameters():
        assert parameter.grad is gradients.get(name)
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])


def test_schedulers_and_hooks_of_the_live_optimizer_do_not_see_the_measurement():
    context = warm_context()
    scheduler = torch.optim.lr_scheduler.LambdaLR(context.optimizer, lambda step: 1.0)  # wraps step
    steps = []
    context.optimizer.register_step_post_hook(lambda *arguments: steps.append(1))
    before = checksum(context.model, context.optimizer)
    first_order(context, candidate_batch(context))
    assert checksum(context.model, context.optimizer) == before
    assert not steps
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_influence_does_not_depend_on_the_order_or_company_of_candidates(engine):
    context = warm_context()
    estimator = FirstOrderInfluence(engine=engine)
    context.fit(estimator)
    batch = candidate_batch(context, 4)
    together = context.score(estimator, batch)
    alone = [context.score(estimator, {k: v[i : i + 1] for k, v in batch.items()}) for i in (2, 0, 3, 1)]
    torch.testing.assert_close(torch.cat(alone), together[[2, 0, 3, 1]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_candidate_whose_loss_is_not_finite_gets_nan_and_the_others_their_influence(engine, what):
    context = warm_context()
    loss_fn, bad = context.loss_fn, context.source.tokens[1]

    def poisoned(model, batch):
        factor = torch.ones(len(batch["input_ids"]), dtype=torch.float64)
        factor[(batch["input_ids"] == bad).all(dim=1)] = what
        return loss_fn(model, batch) * factor

    batch = candidate_batch(context, 3)
    settings = {"engine": engine, "slope_over": "zero"}
    expected = first_order(context.but(loss_fn=lambda model, batch: loss_fn(model, batch)), batch, **settings)
    found = first_order(context.but(loss_fn=poisoned), batch, **settings)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-7)


def test_a_layer_that_no_rule_covers_is_told_while_fitting_and_can_be_left_out_or_taken_by_another_engine():
    context = restless_context()
    with pytest.raises(ValueError, match=r"norm\.bias.*exclude.*central_difference"):
        context.fit(FirstOrderInfluence())
    batch = candidate_batch(context)
    without = first_order(context, batch, exclude=["norm.*"])
    forward = first_order(context, batch, exclude=["norm.*"], engine="forward_mode")
    assert close(forward, without, 1e-5)


def test_what_it_costs_is_charged():
    context = warm_context()
    first_order(context, candidate_batch(context, 3), sampled=5)
    model, flops = context.model, context.meter.flops
    # to a thousandth: sums with weights are products as well
    assert flops["reference gradient"] == pytest.approx(with_backward(model, 4, 12), rel=1e-3)
    assert flops["precondition"] == pytest.approx(with_backward(model, 5, 12), rel=1e-3)
    # a backward through activations only, which leaves out a third, and a product of each matrix with the direction
    activations = with_backward(model, 3, 12) - 2 * matrices(model) * 3 * 12
    assert flops["example gradients"] == pytest.approx(activations + 2 * matrices(model) * 3 * 12, rel=1e-2)
    assert not context.meter.uncounted


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "magic"},
        {"gradient_at": "there"},
        {"step": "half"},
        {"slope_over": "all"},
        {"reference_precision": "x"},
    ],
)
def test_unknown_settings_are_refused_with_those_that_exist(settings):
    with pytest.raises(ValueError, match=rf"expected {next(iter(settings))} to be one of \('"):
        FirstOrderInfluence(**settings)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="expected sampled of at least 1, got 0"):
        FirstOrderInfluence(sampled=0)
    with pytest.raises(ValueError, match="expected a positive difference, got 0"):
        FirstOrderInfluence(difference=0.0)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (
            lambda c: c.but(optimizer=torch.optim.LBFGS(c.model.parameters())),
            TypeError,
            "LBFGS.step needs a closure",
        ),
        (lambda c: c.optimizer.param_groups[0].update(lr=0.0) or c, ValueError, "positive learning rate"),
        (lambda c: c.optimizer.param_groups[0].update(lr=1e300) or c, ValueError, "after a step on zero gradients is"),
        (lambda c: c.model.requires_grad_(False) and c, ValueError, "parameters that require a gradient, got none"),
        (
            lambda c: c.but(loss_fn=lambda model, batch: c.loss_fn(model, batch).detach().requires_grad_()),
            ValueError,
            "does not change with any parameter",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(break_it, error, message):
    with pytest.raises(error, match=message):
        break_it(warm_context()).fit(FirstOrderInfluence(slope_over="zero"))


def test_a_pattern_that_fits_nothing_or_everything_is_refused():
    context = warm_context()
    with pytest.raises(ValueError, match=r"the pattern 'nothing' fits none of the parameters"):
        context.fit(FirstOrderInfluence(exclude=["nothing"]))
    with pytest.raises(ValueError, match="exclude less"):
        context.fit(FirstOrderInfluence(exclude=["*"]))


def test_scoring_before_fitting_is_refused():
    context = warm_context()
    with pytest.raises(RuntimeError, match="score was called before fit"):
        context.score(FirstOrderInfluence(), candidate_batch(context))
    assert FirstOrderInfluence().direction() is None


def test_a_fit_that_was_saved_measures_the_same_wherever_it_is_loaded():
    context, estimator, resumed = warm_context(), FirstOrderInfluence(), FirstOrderInfluence()
    context.fit(estimator)
    state = estimator.fitted_state()
    resumed.load_fitted_state(state)
    assert resumed.direction().keys() == estimator.direction().keys()
    batch = candidate_batch(context, 3)
    assert torch.equal(context.score(resumed, batch), context.score(estimator, batch))
    again = resumed.fitted_state()
    assert all(torch.equal(again["direction"][name], value) for name, value in state["direction"].items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fit_lasts_and_has_a_direction_but_for_the_engine_that_takes_steps(engine):
    context, estimator = warm_context(), FirstOrderInfluence(engine=engine)
    context.fit(estimator)
    takes_steps = engine == "optimizer_step"
    assert estimator.fit_lasts is estimator.has_direction is not takes_steps
    assert (estimator.direction() is None) is (estimator.fitted_state() is None) is takes_steps


@pytest.mark.parametrize("gradient_at", ["zero_step", "current"])
def test_a_fit_in_parts_is_the_fit_at_once_where_the_model_stands_still(gradient_at):
    def estimator():
        return FirstOrderInfluence("central_difference", gradient_at, slope_over="reference", reference_rows=3)

    def ahead(context, part):
        with measuring(context.model, context.optimizer):
            return part.fit_ahead(context.live, context.round, 2)

    context, whole, parts, resumed = warm_context(), estimator(), estimator(), estimator()
    metrics = context.fit(whole)
    assert ahead(context, parts)
    resumed.load_state_dict(parts.state_dict())
    assert [ahead(context, parts) for _ in range(2)] == [True, False]  # the fit of the other takes the third row
    for each in (parts, resumed):
        assert context.fit(each) == pytest.approx(metrics)
        assert not each.state_dict()
        for name, value in whole.direction().items():
            torch.testing.assert_close(each.direction()[name], value)
    ahead(context, parts)
    later = context.but(index=context.round.index + 1)
    assert later.fit(parts)["reference_examples"] == 3.0  # what was taken for another round does not count


# ---- the slope of a step ---------------------------------------------------------------------------------------------


def test_the_slope_of_adam_is_its_formula_and_saturates_where_the_moments_are_empty():
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameter.grad = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)
    optimizer.step()
    slope = step_slope(optimizer, parameter, torch.full((3,), 1e-6, dtype=torch.float64))
    second = 0.95 * optimizer.state[parameter]["exp_avg_sq"] + 0.05 * 1e-12
    expected = -0.1 * (0.1 / (1 - 0.9**2)) / ((second / (1 - 0.95**2)).sqrt() + 1e-8)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)
    wide = step_slope(optimizer, parameter, torch.full((3,), 1.0, dtype=torch.float64))
    assert abs(wide[2]) < 1e-3 * abs(slope[2])


class OwnAdam(torch.optim.Adam):
    """Takes Adam's steps, under a name of which no formula is known."""


class OwnAdamW(torch.optim.AdamW):
    """The same of AdamW."""


@pytest.mark.parametrize(
    ("known", "unknown", "settings"),
    [
        (torch.optim.AdamW, OwnAdamW, {"weight_decay": 0.1}),
        (torch.optim.AdamW, OwnAdamW, {"maximize": True, "eps": 1e-3}),
        (torch.optim.AdamW, OwnAdamW, {"amsgrad": True}),
        (torch.optim.Adam, OwnAdam, {"betas": (0.5, 0.99)}),
        (torch.optim.Adam, OwnAdam, {"weight_decay": 0.3}),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_the_slope_by_a_formula_is_that_of_the_steps_themselves(known, unknown, settings, steps):
    slopes = []
    for kind in (known, unknown):
        parameter = nn.Parameter(torch.linspace(-2.0, 2.0, 9))
        optimizer = kind([parameter], lr=0.01, **settings)
        for step in range(steps):
            parameter.grad = torch.linspace(-1.0, 3.0, 9) ** 3 * (1 + step)
            optimizer.step()
        slopes.append(step_slope(optimizer, parameter, torch.logspace(-6.0, 2.0, 9)).double())
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=0)


def test_the_slope_reads_the_live_optimizer_and_changes_nothing_in_it():
    context = warm_context("adamw without foreach")
    before = checksum(context.model, context.optimizer)
    for parameter in context.model.parameters():
        step_slope(context.optimizer, parameter, torch.ones_like(parameter))
    assert checksum(context.model, context.optimizer) == before


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (8, 2)])
@pytest.mark.parametrize("steps", [0, 2])
def test_orthogonalised_steps_have_no_slopes_before_the_first_step_either(shape, steps):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = torch.optim.Muon([weight], lr=0.1)
    for _ in range(steps):
        weight.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    with pytest.raises(TypeError, match=r'depends on the gradients of others.*engine="optimizer_step"'):
        step_slope(optimizer, weight, torch.rand(shape, generator=generator) + 0.1)


class Listing(torch.optim.SGD):
    """Keeps its scale in a list, and doubles it at each step."""

    def step(self, closure=None):
        (weight,) = self.param_groups[0]["params"]
        scales = self.state[weight].setdefault("scales", [torch.eye(2)])
        weight -= scales[0] @ weight.grad
        scales[0].mul_(2)


@torch.no_grad()
def test_matrices_in_lists_of_the_state_are_copied():
    weight = nn.Parameter(torch.ones(2, 1))
    optimizer = Listing([weight])
    optimizer.state[weight] = {"scales": [torch.eye(2)]}
    assert step_slope(optimizer, weight, torch.ones(2, 1)).flatten().tolist() == [-1.0, -1.0]
    assert optimizer.state[weight]["scales"][0].equal(torch.eye(2))


class Holding(torch.optim.Optimizer):
    """Steps by optimizers that it holds, as a pair of Muon and AdamW in one class does."""

    def __init__(self, parameters, keep):
        inner = torch.optim.AdamW(parameters, lr=0.1)
        self.held = keep(inner)
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        held = self.held.values() if isinstance(self.held, dict) else self.held
        for each in held if isinstance(self.held, (dict, list)) else [self.held]:
            each.step()


@pytest.mark.parametrize("keep", [lambda o: o, lambda o: [o], lambda o: {"a": o}], ids=["one", "list", "dict"])
def test_an_optimizer_that_steps_by_others_is_refused_and_moves_nothing(keep):
    weight = nn.Parameter(torch.ones(3))
    optimizer = Holding([weight], keep)
    weight.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"Holding takes its steps by other optimizers.*engine="):
        step_slope(optimizer, weight, torch.ones(3))
    assert weight.tolist() == [1.0] * 3


def test_typical_sizes_of_a_rare_row_are_those_of_the_texts_that_hold_it():
    source = random_source(candidates=12, length=8, vocab=VOCAB)
    source.tokens[:, :] = 1
    source.tokens[3, 2] = 7  # one text in twelve
    context = fake_context(source, model=(model := Restless().double().eval()))
    context = context.but(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    model.head = nn.Linear(16, VOCAB, bias=False).double()  # untied: only inputs reach the embedding
    sizes, kept = typical_gradient(context.live, context.round, [model.embedding.weight], divisor=2, examples=12)
    loss = causal_lm_loss(model, {"input_ids": source.tokens[3:4]}).sum()
    (gradient,) = torch.autograd.grad(loss, model.embedding.weight)
    torch.testing.assert_close(sizes[0][7], gradient[7].abs() / 2)
    assert kept == 1.0
    assert bool((sizes[0] > 0).all())


def test_over_the_reference_gradient_adams_slope_is_its_bounded_step():
    context = warm_context("adamw")
    estimator = FirstOrderInfluence(slope_over="reference", gradient_at="current")
    context.fit(estimator)
    state, group = context.optimizer.state, context.optimizer.param_groups[0]
    (b1, b2), eps = group["betas"], group["eps"]
    reference = next(iter(context.source.reference()))
    loss = causal_lm_loss(context.model.eval(), reference).mean()
    for name, parameter in context.model.named_parameters():
        (gradient,) = torch.autograd.grad(loss, [parameter], retain_graph=True)
        after = float(state[parameter]["step"]) + 1
        second = b2 * state[parameter]["exp_avg_sq"] + (1 - b2) * gradient**2
        expected = (1 - b1) / (1 - b1**after) * gradient / ((second / (1 - b2**after)).sqrt() + eps)
        assert torch.allclose(estimator.direction()[name], expected, rtol=1e-6, atol=1e-9)
        assert float(expected.abs().max()) <= (1 - b1) / (1 - b1**after) * ((1 - b2**after) / (1 - b2)) ** 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd with momentum and decay"])
def test_contrast_subtracts_the_mean_of_the_last_gradients(optimizer):
    """With the derivative of plain SGD in its place, what contrast takes away is that mean times the slope."""
    context = warm_context(optimizer)
    found = {}
    for contrast in (0.0, 1.0, 0.5):
        estimator = FirstOrderInfluence(slope_over="candidates", contrast=contrast)
        context.fit(estimator)
        found[contrast] = estimator.direction()
    for name in found[0.0]:
        whole, half = found[0.0][name] - found[1.0][name], found[0.0][name] - found[0.5][name]
        assert torch.allclose(half, whole / 2, rtol=1e-4, atol=1e-9)
    # the direction without contrast is the slope times the reference gradient, so the ratio of the two is free of it
    group = context.optimizer.param_groups[0]
    name, parameter = next(iter(context.model.named_parameters()))
    state = context.optimizer.state[parameter]
    if optimizer == "adamw":
        mean = state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
    else:
        mean = state["momentum_buffer"] * (1 - group["momentum"])
    gradient = zero_step_gradient(context, parameter)
    ratio = (found[0.0][name] - found[1.0][name]) * gradient
    assert torch.allclose(ratio, found[0.0][name] * mean, rtol=1e-4, atol=1e-9)


def zero_step_gradient(context, parameter):
    """The reference gradient after a step on zero gradients, by taking that step."""
    kept = [p.detach().clone() for p in context.model.parameters()]
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in context.optimizer.state.items()}
    for each in context.model.parameters():
        each.grad = torch.zeros_like(each)
    context.optimizer.step()
    loss = causal_lm_loss(context.model.eval(), next(iter(context.source.reference()))).mean()
    (gradient,) = torch.autograd.grad(loss, [parameter])
    with torch.no_grad():
        for each, value in zip(context.model.parameters(), kept, strict=True):
            each.copy_(value)
            each.grad = None
    context.optimizer.state.update(state)
    return gradient


def test_an_optimizer_without_moments_is_told_that_there_is_nothing_to_subtract():
    with pytest.raises(TypeError, match="keeps no mean of the last gradients"):
        warm_context("adagrad").fit(FirstOrderInfluence(contrast=1.0))


def test_reference_rows_come_in_turn_and_all_of_them_do():
    source = random_source(candidates=32, length=12, vocab=VOCAB)
    source.references = torch.randint(0, VOCAB, (10, 12), generator=torch.Generator().manual_seed(3))
    source.reference_labels, source.rows = source.references, 4
    context = warm_context(source=source)
    whole = context.fit(FirstOrderInfluence())
    losses = []
    for index in range(5):
        estimator = FirstOrderInfluence(reference_rows=4)
        metrics = context.but(index=index).fit(estimator)
        assert metrics["reference_examples"] == 4
        losses.append(metrics["reference_loss_zero_step"])
    # five rounds of four rows go twice through ten rows of equal length
    assert sum(losses) / 5 == pytest.approx(whole["reference_loss_zero_step"], rel=1e-6)
    assert len({round(loss, 9) for loss in losses}) > 2
    few = context.but(budget=1000).fit(FirstOrderInfluence(reference_rows=9, reference_share=0.0085))
    assert few["reference_examples"] == 8
    assert (
        context.but(budget=10**6).fit(FirstOrderInfluence(reference_rows=9, reference_share=0.01))["reference_examples"]
        == 9
    )


def test_the_standard_error_of_the_reference_loss_is_that_of_its_rows():
    context = warm_context()
    metrics = context.fit(FirstOrderInfluence(gradient_at="current"))
    with torch.no_grad():
        losses = causal_lm_loss(context.model.eval(), next(iter(context.source.reference())))
    expected = float(losses.std(correction=0)) / len(losses) ** 0.5
    assert metrics["reference_loss_error"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrast": -1.0}, "of at least 0, got -1.0"),
        ({"contrast": 1.0, "engine": "optimizer_step"}, "no moment is subtracted"),
        ({"reference_rows": 0}, "at least 1"),
        ({"reference_share": 0.0}, "positive reference_share"),
    ],
)
def test_options_of_the_direction_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FirstOrderInfluence(**arguments)
