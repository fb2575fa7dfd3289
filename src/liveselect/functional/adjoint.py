r"""The adjoint of training: how every step's gradient moves the sum of a later loss, for SGD and Adam and their kin.

Training is a discrete dynamical system: the optimizer maps parameters :math:`\theta_t`, moments and the gradient
:math:`g_t = \nabla L_t(\theta_t)` to those of step t + 1. With :math:`F = \sum_{t=1}^{T} J(\theta_t)` the reference
loss summed along the way, the *costate* :math:`\lambda_t = dF / d\theta_t` obeys

.. math:: \lambda_T = \nabla J(\theta_T), \qquad
          \lambda_t = \nabla J(\theta_t) + A_t^\top \lambda_{t+1} + \nabla^2 L_t(\theta_t) \, p_t

where :math:`A_t` is how the update depends on :math:`\theta_t` while the gradient is held (weight decay), and

.. math:: p_t = \left( \frac{\partial (\theta, m, v)_{t+1}}{\partial g_t} \right)^\top (\lambda, \mu, \nu)_{t+1}
              = \frac{dF}{dg_t}

is the *gradient costate*: an example that enters step t with weight :math:`\epsilon` changes :math:`g_t` by
:math:`\epsilon \nabla \ell` and F by :math:`\epsilon \, p_t \cdot \nabla \ell(\theta_t)`. For plain SGD
:math:`p_t = -\eta \lambda_{t+1}`: the costate stands at t + 1, gradient and Hessian at t.

Source: Gu et al. 2024, "Data Selection via Optimal Control", arXiv 2410.07064, for the plain SGD recursion. The
recursions of momentum, Adam, decay and clipping are the chain rule applied to ``torch.optim``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from liveselect.functional.updates import Clip, Moments, Pull, Rule, Update, Vector, Whole


@dataclass(frozen=True)
class State:
    """Training before a step.

    Attributes:
        parameters: by name.
        moments: of every parameter, in the order of its rule.
        counts: number of updates of each parameter so far.
    """

    parameters: Vector
    moments: dict[str, Moments]
    counts: dict[str, int]


@dataclass(frozen=True)
class Costate:
    """How F changes with the state: of parameters, and of every parameter's moments."""

    parameters: Vector
    moments: dict[str, Moments]


@dataclass(frozen=True)
class Transition:
    """One step of training: the state before it, the gradient before clipping, the state after it."""

    index: int
    before: State
    gradient: Vector
    after: State


@dataclass(frozen=True)
class Dynamics:
    """How training moves: the rule of every parameter, clipping, and a schedule.

    Attributes:
        rules: by parameter name.
        clip: applied to the gradient as a whole, or None.
        schedule: factor on the learning rates at each step of the unroll; 1 beyond its end, and where it is empty.
        whole: needed where states, gradients and costates are parts of those of the whole parameters.
    """

    rules: Mapping[str, Rule]
    clip: Clip | None = None
    schedule: Sequence[float] = field(default_factory=tuple)
    whole: Whole | None = None

    def step(self, state: State, gradient: Vector, index: int) -> State:
        """Return the state after step ``index`` (from 0) on the gradient before clipping."""
        gradient = gradient if self.clip is None else self.clip.apply(gradient)
        parameters: Vector = {}
        moments: dict[str, Moments] = {}
        for name, rule in self.rules.items():
            count, rate = state.counts[name] + 1, self._rate(rule, index)
            parameters[name], moments[name] = rule.step(
                state.parameters[name], gradient[name], state.moments[name], count, rate
            )
        return State(parameters, moments, {name: count + 1 for name, count in state.counts.items()})

    def pull_back(self, costate: Costate, transition: Transition) -> tuple[Vector, Costate]:
        r"""Return the gradient costate :math:`p_t`, and the costate before the step while the gradient is held.

        To the latter's parameters the caller adds :math:`\nabla J(\theta_t)` and the Hessian product of :math:`p_t`.
        """
        raw, after, before = transition.gradient, transition.after, transition.before
        gradient = raw if self.clip is None else self.clip.apply(raw)
        pulls: dict[str, Pull] = {}
        for name, rule in self.rules.items():
            rate = self._rate(rule, transition.index)
            update = Update(before.parameters[name], gradient[name], after.moments[name], after.counts[name], rate)
            pulls[name] = rule.pull_back(costate.parameters[name], costate.moments[name], update)
        toward = {name: pull.gradient for name, pull in pulls.items()}
        if self.clip is not None:
            toward = self.clip.pull_back(toward, raw)
        held = Costate(
            {name: pull.parameter for name, pull in pulls.items()},
            {name: pull.moments for name, pull in pulls.items()},
        )
        return toward, held

    def damp(self, toward: Vector, transition: Transition, floor: float) -> Vector:
        """Return a gradient costate with the coordinates damped that the optimizer divided by next to nothing.

        That is a denominator below ``floor`` times the root mean square in its parameter. The exact derivative in such
        a coordinate (the embedding of a rare token) holds for the smallest weights only: a real one fills the
        denominator itself.
        """
        after = transition.after
        found = {name: rule.denominator(after.moments[name], after.counts[name]) for name, rule in self.rules.items()}
        denominators = {name: value for name, value in found.items() if value is not None and floor}
        if not denominators:
            return dict(toward)
        sums = {
            name: torch.stack([value.square().sum(), value.new_tensor(value.numel())])
            for name, value in denominators.items()
        }
        damped = dict(toward)
        for name, (squares, count) in (self.whole(sums) if self.whole else sums).items():
            least = floor * (squares / count).sqrt()
            damped[name] = toward[name] * (denominators[name] / denominators[name].clamp(min=least))
        return damped

    def _rate(self, rule: Rule, index: int) -> float:
        return rule.rate * (self.schedule[index] if index < len(self.schedule) else 1.0)


def final_costate(reference_gradient: Vector, state: State) -> Costate:
    """Return the costate at the end: the gradient of J in the parameters, and zero in the moments."""
    nothing = {name: tuple(torch.zeros_like(value) for value in values) for name, values in state.moments.items()}
    return Costate(reference_gradient, nothing)


def walk_back(
    dynamics: Dynamics,
    costate: Costate,
    transitions: Iterable[Transition],
    reference_gradient: Callable[[State], Vector],
    hessian_product: Callable[[Transition, Vector], Vector],
) -> Iterator[tuple[Transition, Vector, Costate | None]]:
    r"""Yield each transition, latest first, with its gradient costate and the costate before it.

    Args:
        dynamics: of the training.
        costate: after the first transition given.
        transitions: from a later to an earlier one, without gaps.
        reference_gradient: the gradient of J at a state.
        hessian_product: the Hessian of the step's loss at the state before it, times a vector.

    Yields:
        transition, :math:`p_t`, and :math:`\lambda_t` with the costates of the moments; None instead of
        :math:`\lambda_0`, which no gradient needs.
    """
    for transition in transitions:
        toward, held = dynamics.pull_back(costate, transition)
        if transition.index == 0:
            yield transition, toward, None
            return
        curved = hessian_product(transition, toward)
        here = reference_gradient(transition.before)
        costate = Costate(
            {name: value + here[name] + curved[name] for name, value in held.parameters.items()}, held.moments
        )
        yield transition, toward, costate
