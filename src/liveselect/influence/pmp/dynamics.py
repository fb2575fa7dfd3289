"""Reads how the live run trains: optimizer, moments and clipping, as rules with an adjoint."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liveselect.functional.adjoint import Dynamics, State
from liveselect.functional.updates import (
    AdamRule,
    Clip,
    ClipNorm,
    ClipValue,
    Moments,
    Rule,
    SGDRule,
    Vector,
    norm,
)
from liveselect.grammar import LiveModel

Parameters = Mapping[str, nn.Parameter]
"""The parameters that move, by name; the live tensors."""

_MOMENT_NAMES = {SGDRule: ("momentum_buffer",), AdamRule: ("exp_avg", "exp_avg_sq")}


def moving_parameters(model: LiveModel) -> dict[str, nn.Parameter]:
    """Return the parameters that both the model and the optimizer hold, and that are trained, by name.

    Raises:
        ValueError: there is none.
        TypeError: some are kept in 16 bits, in which a costate is lost in rounding.
    """
    model.view.reshard()  # a forward before may have left whole parameters in place of the optimizer's
    trained = {id(parameter) for group in model.optimizer.param_groups for parameter in group["params"]}
    found = {
        name: parameter
        for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and id(parameter) in trained
    }
    if not found:
        raise ValueError("expected an optimizer over trainable parameters of the model, got none: unfreeze some")
    short = sorted(name for name, parameter in found.items() if parameter.dtype.itemsize < 4)
    if short:
        raise TypeError(
            f"expected parameters in float32 or float64, got 16 bits in {short[:3]}{'...' if short[3:] else ''}: train "
            'with precision="bf16-mixed", which keeps the parameters in float32'
        )
    return found


def live_dynamics(model: LiveModel, parameters: Parameters, schedule: Sequence[float] = ()) -> Dynamics:
    """Return how the live optimizer moves the parameters, with the clipping that training does.

    Raises:
        TypeError: the optimizer is another than ``torch.optim``'s SGD, Adam and AdamW, or has settings whose adjoint is
            not written here; or clipping is neither by norm nor by value.
    """
    optimizer = model.optimizer
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise TypeError(
            f"expected torch.optim's SGD, Adam or AdamW, got {type(optimizer).__name__}, whose adjoint is not known: "
            'unroll plain SGD, as published, with dynamics="sgd"'
        )
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    rules = {name: _rule(optimizer, group_of[id(parameter)]) for name, parameter in parameters.items()}
    return Dynamics(rules, find_clip(model, parameters), tuple(schedule), model.view.adding_up(parameters))


def sgd_dynamics(model: LiveModel, parameters: Parameters, rate: float, schedule: Sequence[float] = ()) -> Dynamics:
    """Return plain SGD: no momentum, decay or clipping."""
    rules = dict.fromkeys(parameters, SGDRule(rate))
    return Dynamics(rules, None, tuple(schedule), model.view.adding_up(parameters))


def live_state(model: LiveModel, live: Parameters, dynamics: Dynamics) -> State:
    """Return copies of the live parameters, of the moments that the dynamics' rules know, and the counts of updates.

    Moments that the optimizer has not made yet are zero. Where ranks hold parts, these are of this rank's.
    """
    local = model.view.local
    parameters: Vector = {}
    moments: dict[str, Moments] = {}
    counts: dict[str, int] = {}
    for name, parameter in live.items():
        rule = dynamics.rules[name]
        kept = model.optimizer.state.get(parameter, {})
        names = _MOMENT_NAMES[type(rule)][: rule.moments]
        warm = all(isinstance(kept.get(moment), Tensor) for moment in names)
        parameters[name] = local(parameter).clone()
        moments[name] = tuple(
            local(kept[moment]).clone() if warm else torch.zeros_like(local(parameter)) for moment in names
        )
        counts[name] = int(kept.get("step", 1)) if warm else 0
    return State(parameters, moments, counts)


def find_clip(model: LiveModel, parameters: Parameters) -> Clip | None:
    """Return the rule of the model's ``clip_gradients``, found by clipping two gradients that are surely too long.

    Raises:
        TypeError: it neither scales the whole gradient to a norm nor cuts its values.
    """
    short, long = (_clip_of(model, parameters, size) for size in (1e4, 3e5))
    if short is None and long is None:
        return None
    if short is not None and type(short) is type(long) and math.isclose(short.limit, long.limit, rel_tol=1e-4):
        return long
    raise TypeError(
        f"clipping acts as {short} on one gradient and as {long} on a longer one: expected clipping to a fixed "
        'norm or value, whose adjoint is known. Unroll plain SGD, as published, with dynamics="sgd"'
    )


def _clip_of(model: LiveModel, parameters: Parameters, size: float) -> ClipNorm | ClipValue | None:
    view, whole = model.view, model.view.adding_up(parameters)
    given: Vector = {}
    for name, parameter in parameters.items():
        part = view.local(parameter)
        ramp = torch.linspace(-size, size, part.numel(), dtype=part.dtype, device=part.device)
        given[name] = ramp.view(part.shape)
    for name, gradient in view.spread({name: ramp.clone() for name, ramp in given.items()}, parameters).items():
        parameters[name].grad = gradient
    model.clip_gradients(list(parameters.values()))
    clipped: Vector = {}
    for name, parameter in parameters.items():
        clipped[name] = torch.zeros_like(given[name]) if parameter.grad is None else view.local(parameter.grad)
        parameter.grad = None

    def is_clipped_to(expected: Vector) -> bool:
        same = all(torch.allclose(clipped[name], expected[name], rtol=1e-4) for name in clipped)
        return not view.any(not same)

    if is_clipped_to(given):
        return None
    length, limit = norm(given, whole), norm(clipped, whole)
    if is_clipped_to({name: value * (limit / length) for name, value in given.items()}):
        return ClipNorm(float(limit) * (1 + 1e-6 / float(length)), whole)
    largest = max(float(value.abs().max()) for value in clipped.values() if value.numel())
    largest = max(view.gather(largest)[0])
    if is_clipped_to({name: value.clamp(-largest, largest) for name, value in given.items()}):
        return ClipValue(largest)
    raise TypeError(
        "expected gradients clipped to a norm or a value, as the Trainer does, found something else: "
        'unroll plain SGD, as published, with dynamics="sgd"'
    )


def _rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule:
    odd = [name for name in ("amsgrad", "maximize") if group.get(name)]
    if odd:
        raise TypeError(
            f"the adjoint of {type(optimizer).__name__} with {', '.join(odd)} is not known: train without, or unroll "
            'plain SGD, as published, with dynamics="sgd"'
        )
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(optimizer, torch.optim.SGD):
        return SGDRule(rate, float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]), decay)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
    return AdamRule(rate, beta1, beta2, float(group["eps"]), decay, decoupled)
