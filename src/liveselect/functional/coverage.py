"""Which layers hide the gradients of single examples: all of them at once, from one forward."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from liveselect.functional.gradients import sort_layers
from liveselect.functional.layer_pass import LossFn, T, count_rows, find_missed, make_anchor
from liveselect.functional.taps import LayerError, tapped

_NAMES_SHOWN = 12


@dataclass(frozen=True)
class Hidden:
    """A layer whose part in the gradients of single examples cannot be seen.

    Attributes:
        module: its name.
        kind: its class.
        why: what it does, in a few words.
        parameters: its parameters that were asked for.
    """

    module: str
    kind: str
    why: str
    parameters: tuple[str, ...]


def hidden_layers(model: nn.Module, loss_fn: LossFn[T], batch: T, names: Iterable[str]) -> list[Hidden]:
    """Return the layers that hide what the parameters ``names`` do to the losses of a batch.

    Costs one forward. The model is left without hooks, and compiled models run eagerly.

    Args:
        model: in the mode in which gradients are wanted.
        loss_fn: per-example losses.
        batch: a few rows; more than one, because one alone does not show which dimension counts examples.
        names: of parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plan, uncovered = sort_layers(model, {name: parameters[name].detach() for name in names})
    plan = replace(plan, observers=dict.fromkeys(plan.observers, lambda inputs, delta: None))
    errors: list[Exception] = []
    rows = count_rows(batch)
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        anchor = make_anchor(parameters.values(), rows)
        with tapped(model, plan.observers, anchor, rows, errors.append) as log:
            loss = loss_fn(model, batch).sum()
            unobserved, missed = find_missed(plan, loss, log)
    kinds = {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}
    held: dict[str, list[str]] = {}
    for name, holders in plan.holders.items():
        for holder in holders:
            held.setdefault(holder, []).append(name)
    found = [
        Hidden(name, kinds[name], "holds other layers, or mixes the examples of a batch", tuple(own))
        for name, own in uncovered
    ]
    for error in errors:
        if isinstance(error, LayerError):
            found.append(
                Hidden(error.module, kinds[error.module], f"maps {error.got}", tuple(held.get(error.module, ())))
            )
        else:
            raise error
    for name in unobserved:
        why = "ran without gradients: use activation checkpointing with use_reentrant=False"
        found.append(Hidden(name, kinds[name], why, tuple(held.get(name, ()))))
    without = {name for _, own in uncovered for name in own}
    for name in (each for each in missed if each not in without):
        holder = plan.holders[name][0]
        found.append(Hidden(holder, kinds[holder], f"the loss uses {name.rpartition('.')[2]} past it", (name,)))
    return list(dict.fromkeys(found))  # a layer may be called several times


def described(hidden: Iterable[Hidden]) -> str:
    """Return the layers in words, those of all blocks of a model as one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in hidden:
        key = (_pattern(each.module), each.kind, each.why)
        groups.setdefault(key, []).append(each.module)
    texts = []
    for (pattern, kind, why), names in groups.items():
        texts.append(f"{names[0] if len(set(names)) == 1 else pattern} ({kind}) {why}")
    return "; ".join(texts[:_NAMES_SHOWN]) + ("; ..." if len(texts) > _NAMES_SHOWN else "")


def patterns(names: Iterable[str]) -> list[str]:
    """Return patterns for names, as in a shell, with one for those that differ in the numbers of blocks only."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(_pattern(name), set()).add(name)
    return sorted(next(iter(found)) if len(found) == 1 else pattern for pattern, found in groups.items())


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
