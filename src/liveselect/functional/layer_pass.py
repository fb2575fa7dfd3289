"""One forward, and one backward through activations only, with chosen layers under observation."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from liveselect.functional.sharding import whole_twins
from liveselect.functional.taps import CallObserver, HiddenError, Observer, TapLog, missed_uses, tapped

T = TypeVar("T")

LossFn = Callable[[nn.Module, T], Tensor]
"""Maps a model and a batch to ``(B,)`` losses, one for each example."""


@dataclass(frozen=True)
class LayerPlan:
    """Which layers are observed, and the parameters to cover with them.

    Attributes:
        observers: by module name.
        parameters: the parameters to cover, by name.
        holders: for each parameter name, the observed modules that hold it; tied weights have several.
        opaque: parameters of layers that may read them several times in one call.
        model: holds the parameters; needed to recognise those of a sharded model in a graph.
        replayed: observers of whole calls, by module name.
        instead: observers that take the place of others where a call has several tensors.
    """

    observers: Mapping[str, Observer]
    parameters: Mapping[str, nn.Parameter]
    holders: Mapping[str, tuple[str, ...]]
    opaque: frozenset[str] = frozenset()
    model: nn.Module | None = None
    replayed: Mapping[str, CallObserver] = field(default_factory=dict)
    instead: Mapping[str, CallObserver] = field(default_factory=dict)


def backward_through_layers(
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    plan: LayerPlan,
    weights: Tensor | None = None,
    check: bool = True,
    seen: Callable[[TapLog], None] | None = None,
) -> Tensor:
    """Show input and output gradient of every call of the plan's layers to their observers.

    The gradients are those of the sum of the examples' losses, each times its weight. None of a parameter is formed,
    and no ``.grad`` is read or written. Compiled models run eagerly; the model is left without hooks.

    Args:
        model: in the mode (train, eval) in which gradients are wanted.
        loss_fn: per-example losses; examples must not influence each other.
        batch: a mapping of tensors with one row per example.
        plan: the layers to observe.
        weights: ``(B,)``; None is ones.
        check: look through the graph of the loss for uses of the plan's parameters that no layer saw.
        seen: called with what the taps saw in the forward.

    Returns:
        ``(B,)``, the sum of the observers' results.

    Raises:
        ValueError: as :func:`check_coverage`, and when shapes do not fit.
    """
    rows = count_rows(batch)
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        anchor = make_anchor(plan.parameters.values(), rows)
        with tapped(model, plan.observers, anchor, rows, None, plan.replayed, plan.instead) as log:
            losses = loss_fn(model, batch)
            if losses.shape != (rows,):
                raise ValueError(f"expected loss_fn to return ({rows},) losses, one per row, got {tuple(losses.shape)}")
            total = losses.sum() if weights is None else losses @ weights.to(losses)
            if check:
                check_coverage(plan, total, log)
            if seen is not None:
                seen(log)
            if not total.requires_grad:
                return torch.zeros_like(anchor)
            (products,) = torch.autograd.grad(total, [anchor], allow_unused=True)
    return torch.zeros_like(anchor) if products is None else products


def check_coverage(plan: LayerPlan, loss: Tensor, log: TapLog) -> None:
    """Raise HiddenError when ``loss`` depends on parameters of the plan in ways that its taps did not see.

    That happens where layers ran without gradients only (reentrant checkpointing), or weights were used without a call
    of their layer; the latter are found in the graph of the loss, in a few milliseconds.
    """
    unobserved, missed = find_missed(plan, loss, log)
    if unobserved:
        raise HiddenError(
            f"modules {unobserved} ran without gradients, so their examples' gradients were not seen: use activation "
            "checkpointing with use_reentrant=False, and compute the loss outside of torch.no_grad"
        )
    if missed:
        raise HiddenError(
            f"the loss uses parameters {missed} past the layers that hold them (a functional call, a fused kernel), "
            "where their examples' gradients cannot be seen: leave them out (exclude=[...]), or measure with "
            'engine="central_difference"'
        )


def find_missed(plan: LayerPlan, loss: Tensor, log: TapLog) -> tuple[list[str], list[str]]:
    """Return the modules that ran without gradients only, and the parameters that ``loss`` uses past their layers."""
    calls: Counter[str] = Counter()
    for name, modules in plan.holders.items():
        seen = sum(log.calls[module] for module in modules)
        calls[name] = 1 << 30 if name in plan.opaque and seen else seen  # any number of reads in one call is fine
    twins = {} if plan.model is None else whole_twins(plan.model)
    missed = missed_uses(loss, plan.parameters, calls, twins) if loss.requires_grad else {}
    return sorted(log.unseen - set(log.calls)), sorted(missed)


def count_rows(batch: object) -> int:
    """Return B, the number of examples in a batch: the length of ``input_ids``, else of the first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    if isinstance(batch, Mapping):
        batch = (batch.get("input_ids"), *batch.values())
    for value in batch if isinstance(batch, Iterable) else ():
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
    raise ValueError(f"expected a batch that holds tensors with one row per example, got a {type(batch).__name__}")


def make_anchor(parameters: Iterable[Tensor], rows: int, positions: int | None = None) -> Tensor:
    """Return the zeros ``(B,)`` whose gradient observers add to; float32 or finer, where the parameters live.

    With ``positions`` they are ``(B, positions)``, for observers that return as many numbers for each example.
    """
    first = next(iter(parameters))
    dtype = torch.promote_types(first.dtype, torch.float32)
    shape = (rows,) if positions is None else (rows, positions)
    return torch.zeros(shape, dtype=dtype, device=first.device, requires_grad=True)
