"""The costate recursion against autograd through all of training, closed forms and limits, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from unrolled import RATE, SETTINGS, Problem, gradient_of, hessian_product, our_rule, torch_optimizer

from liveselect.functional.adjoint import Dynamics, State, Transition, final_costate, walk_back
from liveselect.functional.updates import AdamRule, ClipNorm, ClipValue, SGDRule, inner, norm

TOLERANCE = 1e-12
LIMIT = 0.2


def relative_error(found, expected):
    """Of norms: wrong indices barely change the angle."""
    return float((found - expected).norm() / expected.norm())


def sinusoidal(steps):
    return tuple(1.0 + 0.5 * math.sin(step) for step in range(steps))


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("limit", [None, LIMIT], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_adjoint_is_the_gradient_through_unrolled_training(name, limit, warm):
    problem = Problem(name, steps=7, limit=limit, warm=warm, schedule=sinusoidal(7))
    assert relative_error(problem.scores(), problem.exact_scores()) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_the_adjoint_is_exact_for_one_step_and_for_thirty(name, steps):
    problem = Problem(name, steps=steps, limit=LIMIT, warm=True, schedule=sinusoidal(steps))
    assert relative_error(problem.scores(), problem.exact_scores()) < TOLERANCE


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_clipping_was_active_in_these_problems_at_some_steps_and_not_at_others(name):
    lengths = [float(norm(transition.gradient)) for transition in Problem(name, steps=30, limit=LIMIT).forward()]
    assert min(lengths) < LIMIT < lengths[0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_candidates_that_enter_some_steps_only_have_the_influence_of_those_steps(name):
    problem = Problem(name, steps=8, warm=True, scored=(0, 3, 6))
    assert relative_error(problem.scores(), problem.exact_scores()) < TOLERANCE


def test_float32_agrees_to_its_precision():
    problem = Problem("adamw", steps=7, limit=LIMIT, warm=True, dtype=torch.float32)
    exact = replace(problem, dtype=torch.float64).exact_scores()
    assert relative_error(problem.scores().double(), exact) < 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_the_rules_step_as_torch_does(name):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = torch_optimizer(name, parameters)
    rule = our_rule(name)
    names = [str(index) for index in range(len(values))]
    dynamics = Dynamics(dict.fromkeys(names, rule), ClipNorm(2.0))
    zeros = {n: tuple(torch.zeros_like(v) for _ in range(rule.moments)) for n, v in zip(names, values, strict=True)}
    state = State(dict(zip(names, values, strict=True)), zeros, dict.fromkeys(names, 0))
    for step in range(4):
        gradient = {n: torch.randn(4, 3, generator=generator, dtype=torch.float64) for n in names}
        for name_, parameter in zip(names, parameters, strict=True):
            parameter.grad = gradient[name_].clone()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        state = dynamics.step(state, gradient, step)
        for name_, parameter in zip(names, parameters, strict=True):
            torch.testing.assert_close(state.parameters[name_], parameter.detach(), rtol=1e-14, atol=1e-15)


# ---- wrong recursions -------------------------------------------------------------------------------------------


def sgd_scores(problem, variant):
    """The recursion of plain SGD in flat vectors, right or wrong in one place."""
    transitions = problem.forward()
    states = [t.before for t in transitions] + [transitions[-1].after]
    length = len(states) - 1

    def flat(vector):
        return torch.cat([value.flatten() for value in vector.values()])

    def unflat(vector):
        shapes = {name: value.shape for name, value in problem.start.items()}
        parts = vector.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}

    def grad_j(t):
        return flat(problem.reference_gradient(states[t]))

    def curved(t, at, vector):
        function = lambda parameters: problem.train_loss(parameters, t)  # noqa: E731
        return flat(hessian_product(function, states[at].parameters, unflat(vector)))

    def scored(t, vector):
        return RATE * problem.products(transitions[t], unflat(vector))

    costate = torch.zeros_like(flat(problem.start)) if variant == "no boundary" else grad_j(length)
    total = 0.0
    for t in reversed(range(length)):
        if variant == "J too early":
            costate = (0 if t == length - 1 else costate) + grad_j(t)
            total = total + scored(t, costate)
            costate = costate - RATE * curved(t, t, costate)
            continue
        if variant != "costate at t":
            total = total + scored(t, costate)
        at = t + 1 if variant == "Hessian at t + 1" else t
        costate = costate + grad_j(t) - RATE * curved(t, at, costate)
        if variant == "costate at t":
            total = total + scored(t, costate)
    return total


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("variant", ["costate at t", "no boundary", "Hessian at t + 1", "J too early"])
def test_recursions_with_a_wrong_index_are_told_apart(variant, steps):
    problem = Problem("sgd", steps=steps)
    exact = problem.exact_scores()
    assert relative_error(sgd_scores(problem, "right"), exact) < TOLERANCE
    if variant == "Hessian at t + 1" and steps == 1:
        return  # the Hessian of the first step takes part in nothing
    assert relative_error(sgd_scores(problem, variant), exact) > 1e-3


def test_an_adam_run_scored_with_the_recursion_of_sgd_comes_out_differently():
    adam, sgd = Problem("adam", steps=7), Problem("sgd", steps=7)
    assert relative_error(sgd.scores() / sgd.scores().norm(), adam.scores() / adam.scores().norm()) > 0.1


# ---- closed forms and limits ------------------------------------------------------------------------------------


def test_a_quadratic_in_one_dimension_gives_the_numbers_of_a_hand_calculation():
    x, gamma, rate, steps = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.5, 0.5]).double(), 0.1, 3
    theta, states = torch.zeros(1).double(), []
    for _ in range(steps):
        states.append(theta)
        theta = theta - rate * (gamma * (theta - x)).sum()  # 0, 0.2, 0.38, 0.542
    transitions = [
        Transition(
            index,
            State({"theta": before}, {"theta": ()}, {"theta": 0}),
            {"theta": (gamma * (before - x)).sum().view(1)},
            State({"theta": after}, {"theta": ()}, {"theta": 0}),
        )
        for index, (before, after) in enumerate(zip(states, [*states[1:], theta], strict=True))
    ]
    walk = list(
        walk_back(
            Dynamics({"theta": SGDRule(rate)}),
            final_costate({"theta": theta - 1}, transitions[-1].after),
            reversed(transitions),
            lambda state: {"theta": state.parameters["theta"] - 1},
            lambda transition, vector: {"theta": gamma.sum() * vector["theta"]},
        )
    )
    directions = {step.index: float(toward["theta"]) for step, toward, _ in walk}
    assert directions == pytest.approx({2: 0.0458, 1: 0.10322, 0: 0.172898})
    assert float(walk[0][2].parameters["theta"]) == pytest.approx(-1.0322)
    assert walk[-1][2] is None
    scores = [sum(-directions[t] * float(states[t] - point) / rate for t in range(steps)) for point in x]
    assert scores == pytest.approx([2.8387, 9.27706], rel=1e-5)


def test_with_quadratic_losses_the_costate_has_its_closed_form():
    rate, curvature, steps, start, goal = 0.3, 0.7, 6, 2.0, 0.5
    theta = [start]
    for _ in range(steps):
        theta.append(theta[-1] - rate * curvature * theta[-1])
    expected = [None] * steps + [theta[-1] - goal]
    for t in reversed(range(1, steps)):
        expected[t] = (1 - rate * curvature) * expected[t + 1] + (theta[t] - goal)

    def state(t):
        return State({"w": torch.tensor([theta[t]], dtype=torch.float64)}, {"w": ()}, {"w": 0})

    transitions = [
        Transition(t, state(t), {"w": curvature * state(t).parameters["w"]}, state(t + 1)) for t in range(steps)
    ]
    walk = walk_back(
        Dynamics({"w": SGDRule(rate)}),
        final_costate({"w": torch.tensor([expected[-1]], dtype=torch.float64)}, transitions[-1].after),
        reversed(transitions),
        lambda here: {"w": here.parameters["w"] - goal},
        lambda transition, vector: {"w": curvature * vector["w"]},
    )
    found = {step.index: costate for step, _, costate in walk}
    for t in range(1, steps):
        assert float(found[t].parameters["w"]) == pytest.approx(expected[t], rel=1e-12)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_only_a_cold_adam_is_indifferent_to_the_scale_of_its_data_weights(name):
    # Adam's step does not change when all gradients double: F is homogeneous of degree 0 in the weights
    problem = Problem(name, steps=7)
    problem.gamma = problem.gamma[:1].expand(7, -1)
    weighted = problem.gamma[0] * problem.scores()
    share = float(weighted.sum().abs() / weighted.abs().sum())
    assert share < 1e-6 if name == "adam" else share > 1e-3


def test_coordinates_that_never_had_a_gradient_stay_finite_where_autograd_does_not():
    problem = Problem("adamw", steps=5)
    problem.x[:, 0] = 0.0  # the weights of the first feature never get a gradient
    problem.reference_x[:, 0] = 0.0
    assert problem.exact_scores().isnan().all()
    scores = problem.scores()
    assert scores.isfinite().all()
    without = Problem("adamw", steps=5)
    without.x, without.reference_x = without.x[:, 1:], without.reference_x[:, 1:]
    without.start["inner"] = without.start["inner"][:, 1:]
    without.moments["inner"] = tuple(value[:, 1:] for value in without.moments["inner"])
    assert relative_error(scores, without.exact_scores()) < TOLERANCE


def test_a_norm_that_is_not_reached_changes_nothing():
    loose, free = Problem("adamw", limit=1e9), Problem("adamw")
    assert torch.equal(loose.scores(), free.scores())


def test_cutting_values_is_pulled_back_as_autograd_does():
    gradient = {"w": torch.tensor([-3.0, -0.5, 0.2, 4.0]).double()}
    costate = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]).double()}
    clip = ClipValue(1.0)
    expected = gradient_of(lambda g: inner(clip.apply(g), costate), gradient)
    assert torch.equal(clip.pull_back(costate, gradient)["w"], expected["w"])
    limited = [torch.nn.Parameter(gradient["w"].clone())]
    limited[0].grad = gradient["w"].clone()
    torch.nn.utils.clip_grad_value_(limited, 1.0)
    assert torch.equal(clip.apply(gradient)["w"], limited[0].grad)


def test_adam_on_the_scalar_quadratic_follows_torch_and_its_influences_cancel():
    x, gamma = torch.tensor([1.0, 3.0]).double(), torch.tensor([0.5, 0.5]).double()
    rule = AdamRule(0.1, 0.9, 0.99, 1e-8, 0.0)
    dynamics = Dynamics({"theta": rule})
    zero = torch.zeros(1).double()
    state, transitions = State({"theta": zero}, {"theta": (zero, zero)}, {"theta": 0}), []
    for index in range(3):
        gradient = {"theta": (gamma * (state.parameters["theta"] - x)).sum().view(1)}
        after = dynamics.step(state, gradient, index)
        transitions.append(Transition(index, state, gradient, after))
        state = after
    end = state.parameters["theta"]
    walk = walk_back(
        dynamics,
        final_costate({"theta": end - 1}, state),
        reversed(transitions),
        lambda here: {"theta": here.parameters["theta"] - 1},
        lambda transition, vector: {"theta": gamma.sum() * vector["theta"]},
    )
    derivative = sum(toward["theta"] * (step.before.parameters["theta"] - x) for step, toward, _ in walk)
    # the published hand calculation: what one point gains the other loses
    assert derivative.tolist() == pytest.approx([3.34823832e-4, -3.34828496e-4], rel=1e-6)
