"""Products of single examples' gradients with one direction in parameter space: exact, and without forming them."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveselect.functional.coverage import described, hidden_layers
from liveselect.functional.layer_pass import (
    LayerPlan,
    LossFn,
    T,
    backward_through_layers,
    check_coverage,
    count_rows,
    make_anchor,
)
from liveselect.functional.layer_plans import Gather, as_it_is, known_of, match_direction, pattern, sort_layers
from liveselect.functional.layers import Dot, row_dot
from liveselect.functional.sharding import is_sharded
from liveselect.functional.taps import WAY_OUT, HiddenError, TapLog, tapped

R = TypeVar("R")


def example_dot(
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    direction: Mapping[str, Tensor | None],
    check: bool = True,
    whole: Gather = as_it_is,
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

    def products() -> Tensor:
        plan = plan_products(model, direction, whole)
        return backward_through_layers(
            model, loss_fn, batch, plan, None, check, partial(require_known, model) if check else None
        )

    return _with_a_second_look(model, loss_fn, batch, direction, products)


_LOST = 0.02
"""Of a row's products, beyond rounding in 16 bits."""


def token_dots(
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    direction: Mapping[str, Tensor | None],
    check: bool = True,
    whole: Gather = as_it_is,
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

    def products() -> Tensor:
        return _token_dots(model, loss_fn, batch, plan_products(model, direction, whole), check)

    return _with_a_second_look(model, loss_fn, batch, direction, products)


def _token_dots(model: nn.Module, loss_fn: LossFn[T], batch: T, plan: LayerPlan, check: bool) -> Tensor:
    rows = count_rows(batch)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        anchor = make_anchor(plan.parameters.values(), rows)
        with tapped(model, plan.observers, anchor, rows, None, plan.replayed, plan.instead) as log:
            losses = loss_fn(model, batch)
            missing = losses.detach().isnan()
            weights = torch.ones_like(losses, requires_grad=True)
            total = (losses.masked_fill(missing, 0.0) * weights).sum()
            if check:
                check_coverage(plan, total, log)
                require_known(model, log)
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


def _with_a_second_look(
    model: nn.Module, loss_fn: LossFn[T], batch: T, direction: Mapping[str, Tensor | None], products: Callable[[], R]
) -> R:
    """Return what ``products`` does, if need be after finding out where layers that hide theirs can be seen.

    Raises:
        HiddenError: some cannot be seen anywhere.
    """
    try:
        return products()
    except HiddenError:
        if is_sharded(model):
            raise
        names = [name for name, value in direction.items() if value is not None]

        def losses(model: nn.Module, batch: T) -> Tensor:
            found = loss_fn(model, batch)
            return found if found.dim() == 1 else found.nan_to_num(0.0).flatten(1).sum(dim=1)

        hidden = hidden_layers(model, losses, batch, names)
        if hidden:
            raise HiddenError(
                f"the gradients of single examples cannot be seen in these layers: {described(hidden)}: {WAY_OUT}"
            ) from None
    return products()


def require_known(model: nn.Module, log: TapLog) -> None:
    """Raise HiddenError where calls are out of the ordinary and were never compared with what autograd finds."""
    new = {pattern(name) for name in log.unusual} - known_of(model).verified
    if new:
        raise HiddenError(f"the products of {sorted(new)} were not compared with gradients that autograd forms")


def plan_products(
    model: nn.Module, direction: Mapping[str, Tensor | None], whole: Gather = as_it_is, dot: Dot = row_dot
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
            f"no rule gives the gradients of single examples for parameters {names}: their modules mix the "
            "examples of a batch, or hold their parameters twice. Leave them out (exclude=[...]), or measure with "
            'engine="central_difference"'
        )
    return plan


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


class _LossOf(nn.Module, Generic[T]):
    """Holds the model, so that ``functional_call`` can exchange its parameters while ``loss_fn`` is at work."""

    def __init__(self, model: nn.Module, loss_fn: LossFn[T]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: T) -> Tensor:
        return self.loss_fn(self.model, batch)
