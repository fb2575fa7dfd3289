"""Products of single examples' gradients with one direction in parameter space: exact, and without forming them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Generic

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveselect.functional.layer_pass import (
    LayerPlan,
    LossFn,
    T,
    backward_through_layers,
    check_coverage,
    count_rows,
    make_anchor,
)
from liveselect.functional.layers import Dot, Rule, any_dot, row_dot, rule_for
from liveselect.functional.taps import Observer, tapped

Gather = Callable[[Tensor], Tensor]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def example_dot(
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    direction: Mapping[str, Tensor | None],
    check: bool = True,
    whole: Gather = _as_it_is,
) -> Tensor:
    r"""Return the exact inner product of every example's gradient with one direction, ``(B,)``.

    Entry i is :math:`\langle \nabla_\theta \ell_i, V \rangle` for the loss :math:`\ell_i` that ``loss_fn`` gives the
    example, in units of the loss when the direction has those of the parameters. It costs one forward, one backward
    through activations only, and one product of forward size; no gradient of a parameter is formed, and no ``.grad`` is
    read or written. Works with activation checkpointing (``use_reentrant=False``), autocast and every attention kernel;
    compiled models run eagerly. The model is left without hooks, also after an exception.

    Args:
        model: in the mode (train, eval) in which the gradient is wanted.
        loss_fn: per-example losses; examples must not influence each other.
        batch: a mapping of tensors with one row per example, ``input_ids`` among them or first.
        direction: for each parameter that takes part a tensor of its shape; those missing or None are left out.
        check: look through the graph of the loss for uses of parameters that no layer saw; a few milliseconds.
        whole: gathers a tensor of the direction that ranks hold in parts, each time that a layer needs it.

    Raises:
        ValueError: the direction names parameters that the model lacks, that no rule covers, or that the loss uses
            past their layers; shapes do not fit; or a layer ran without gradients (reentrant checkpointing).

    Source: the product of layer inputs and output gradients is that of Goodfellow 2015, arXiv 1510.01799; its use for
    data selection during training that of Wang et al. 2024, arXiv 2406.11011.
    """
    return backward_through_layers(model, loss_fn, batch, plan_products(model, direction, whole), check=check)


_LOST = 0.02
"""Of a row's products, beyond rounding in 16 bits."""


def token_dots(
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    direction: Mapping[str, Tensor | None],
    check: bool = True,
    whole: Gather = _as_it_is,
) -> Tensor:
    r"""Return the exact inner product of the gradient of every token's loss with one direction, ``(B, T)``.

    The product of a weighted sum of losses is linear in the weights, and its derivative in them are the products of
    the single ones. So after :func:`example_dot` one more backward is taken, through the first: some five forwards in
    all. Attention runs in plain operations, since fused kernels have no second derivative.

    Args:
        model: as above.
        loss_fn: losses of all tokens, ``(B, T)``, NaN where none is taken.
        batch: as above.
        direction: as above.
        check: as above.
        whole: as above.

    Raises:
        ValueError: as above.
        RuntimeError: an operation has no second derivative.
    """
    plan, rows = plan_products(model, direction, whole), count_rows(batch)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        anchor = make_anchor(plan.parameters.values(), rows)
        with tapped(model, plan.observers, anchor, rows) as log:
            losses = loss_fn(model, batch)
            missing = losses.detach().isnan()
            weights = torch.ones_like(losses, requires_grad=True)
            total = (losses.masked_fill(missing, 0.0) * weights).sum()
            if check:
                check_coverage(plan, total, log)
            seen = _gradient(total, anchor, create_graph=True)
            found = torch.zeros_like(losses) if seen is None else _gradient(seen.sum(), weights)
    found = torch.zeros_like(losses) if found is None else found
    if check and seen is not None:
        _check_sums(found.detach(), seen.detach())
    return found.detach().masked_fill(missing, torch.nan)


def _check_sums(tokens: Tensor, rows: Tensor) -> None:
    """Raise RuntimeError unless the products of tokens ``(B, T)`` add up to those of their rows ``(B,)``.

    Autograd does not say so when an operation can be differentiated once only: what passes through it is left out.
    """
    error, size = (tokens.sum(dim=1) - rows).abs(), tokens.abs().sum(dim=1) + rows.abs()
    if not bool((error <= _LOST * size).all()):
        raise RuntimeError("products of tokens do not add up to those of their rows: a second derivative is missing")


def _gradient(value: Tensor, of: Tensor, create_graph: bool = False) -> Tensor | None:
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, [of], create_graph=create_graph, allow_unused=True)[0]


def plan_products(
    model: nn.Module, direction: Mapping[str, Tensor | None], whole: Gather = _as_it_is, dot: Dot = row_dot
) -> LayerPlan:
    """Find for every parameter of the direction the layers that hold it, and their rules, which sum as ``dot`` does.

    ``whole`` as above.

    Raises:
        ValueError: unknown names, shapes that do not fit, or parameters that no rule covers.
    """
    plan, uncovered = sort_layers(model, direction, whole, dot)
    if uncovered:
        names = sorted({name for _, own in uncovered for name in own})
        raise ValueError(
            f"no rule gives the gradients of single examples for parameters {names}: their modules hold other layers, "
            "or mix the examples of a batch. Leave them out (exclude=[...]), or measure with "
            'engine="central_difference"'
        )
    return plan


def sort_layers(
    model: nn.Module, direction: Mapping[str, Tensor | None], whole: Gather = _as_it_is, dot: Dot = row_dot
) -> tuple[LayerPlan, list[tuple[str, list[str]]]]:
    """Return the layers that have rules as a plan, and the others with their parameters."""
    parameters, values = match_direction(model, direction)
    observers: dict[str, Observer] = {}
    holders: dict[str, list[str]] = {name: [] for name in parameters}
    opaque: set[str] = set()
    uncovered: list[tuple[str, list[str]]] = []
    for module_name, module, own in _owners(model, parameters):
        rule = rule_for(module)
        if rule is None:
            uncovered.append((module_name, list(own.values())))
            continue
        moves = {its_name: values[name] for its_name, name in own.items()}
        observers[module_name] = _bind(rule, module, moves, whole, dot)
        for name in own.values():
            holders[name].append(module_name)
        if rule is any_dot:
            opaque.update(own.values())
    plan = LayerPlan(observers, parameters, {n: tuple(h) for n, h in holders.items()}, frozenset(opaque), model)
    return plan, uncovered


def forward_mode_dot(model: nn.Module, loss_fn: LossFn[T], batch: T, direction: Mapping[str, Tensor | None]) -> Tensor:
    """Return the products of :func:`example_dot` by forward-mode AD, ``(B,)``: exact, any architecture, no backward.

    Attention runs in plain operations, since fused kernels have no forward-mode rule. Arguments are those of
    :func:`example_dot`; any parameter may take part.
    """
    parameters, values = match_direction(model, direction)
    primals = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    tangents = {f"model.{name}": values[name].to(parameter.dtype) for name, parameter in parameters.items()}
    holder = _LossOf(model, loss_fn)

    def evaluate(primals: dict[str, Tensor]) -> Tensor:
        losses: Tensor = torch.func.functional_call(holder, primals, (batch,))
        return losses

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        product: Tensor = torch.func.jvp(evaluate, (primals,), (tangents,))[1]
    return product


def mean_loss_and_gradient(
    model: nn.Module, loss_fn: LossFn[T], batches: Iterable[T], weights: Iterable[Tensor] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Return the weighted mean loss over all examples, and its gradient in every trainable parameter.

    Gradients are accumulated in float32, or float64 for parameters of that type; ``.grad`` is neither read nor
    written. Parameters that the loss does not reach have zero gradients.

    Args:
        model: in the mode in which the gradient is wanted.
        loss_fn: per-example losses.
        batches: passed to ``loss_fn`` one after the other.
        weights: for each batch ``(B,)``. The numbers of target tokens make the mean one over tokens; None counts every
            example once.

    Raises:
        ValueError: no trainable parameter, or the weights sum to zero.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("expected a model with trainable parameters, got none: unfreeze some")
    sums = {
        name: torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for name, parameter in parameters.items()
    }
    total_loss = total_weight = 0.0
    given = iter(weights) if weights is not None else None
    for batch in batches:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            losses = loss_fn(model, batch)
            weight = torch.ones_like(losses) if given is None else next(given).to(losses)
            weighted = losses @ weight
            gradients = torch.autograd.grad(weighted, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:
                total.add_(gradient)
        total_loss += float(weighted.detach())
        total_weight += float(weight.sum(dtype=torch.float64))
    if not total_weight > 0:
        raise ValueError(f"expected weights with a positive sum for a mean gradient, got a sum of {total_weight}")
    return total_loss / total_weight, {name: total / total_weight for name, total in sums.items()}


def mean_gradient(
    model: nn.Module, loss_fn: LossFn[T], batches: Iterable[T], weights: Iterable[Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the gradient half of :func:`mean_loss_and_gradient`."""
    return mean_loss_and_gradient(model, loss_fn, batches, weights)[1]


def match_direction(
    model: nn.Module, direction: Mapping[str, Tensor | None]
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Return the parameters that a direction moves, and the direction's tensors on their devices, both by name.

    Raises:
        TypeError: the direction is no mapping of names to tensors.
        ValueError: unknown names, shapes that do not fit, one tied parameter twice, or none.
    """
    given: object = direction
    if not isinstance(given, Mapping):
        raise TypeError(f"expected a direction as a mapping of parameter names to tensors, got {type(given).__name__}")
    known = dict(model.named_parameters(remove_duplicate=False))
    unknown = sorted(map(str, set(direction) - set(known)))
    if unknown:
        raise ValueError(f"the direction names parameters that the model does not have: {unknown}")
    parameters: dict[str, nn.Parameter] = {}
    values: dict[str, Tensor] = {}
    for name, value in direction.items():
        if value is None:
            continue
        its_value: object = value
        if not isinstance(its_value, Tensor):
            raise TypeError(f"expected a direction's {name!r} to be a tensor, got {type(its_value).__name__}")
        parameter = known[name]
        if value.shape != parameter.shape:
            raise ValueError(
                f"expected a direction of shape {tuple(parameter.shape)} for {name!r}, got {tuple(value.shape)}"
            )
        parameters[name] = parameter
        values[name] = value.detach().to(parameter.device)
    if not parameters:
        raise ValueError("expected a direction in at least one parameter, got none")
    if len({id(parameter) for parameter in parameters.values()}) < len(parameters):
        raise ValueError(
            "the direction names one tied parameter twice: give it once, under the name of model.named_parameters()"
        )
    return parameters, values


def _owners(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterable[tuple[str, nn.Module, dict[str, str]]]:
    """Yield (module name, module, {its own name: full name}) for every module that holds one of the parameters."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for module_name, module in model.named_modules():
        own = {
            local: names[id(parameter)]
            for local, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names
        }
        if own:
            yield module_name, module, own


def _bind(rule: Rule, module: nn.Module, direction: Mapping[str, Tensor], whole: Gather, dot: Dot) -> Observer:
    def observe(inputs: Tensor, delta: Tensor) -> Tensor:
        return rule(module, inputs, delta, {name: whole(value) for name, value in direction.items()}, dot)

    return observe


class _LossOf(nn.Module, Generic[T]):
    """Holds the model, so that ``functional_call`` can exchange its parameters while ``loss_fn`` is at work."""

    def __init__(self, model: nn.Module, loss_fn: LossFn[T]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: T) -> Tensor:
        return self.loss_fn(self.model, batch)
