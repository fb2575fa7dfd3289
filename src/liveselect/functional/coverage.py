"""Which layers hide the gradients of single examples, and where what they do can be seen instead."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from liveselect.functional.layer_pass import LayerPlan, LossFn, T, count_rows, find_missed, make_anchor
from liveselect.functional.layer_plans import Known, above, known_of, pattern, sort_layers
from liveselect.functional.sharding import is_sharded
from liveselect.functional.taps import LayerError, TapLog, tapped

_NAMES_SHOWN = 12
_MAX_LOOKS = 64  # deeper than any model nests its modules
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}  # parts of a model may compute in a shorter format than it has
_TOLERANCE_16_BIT = 0.1
_ROWS_COMPARED = 2  # of which the second shows whether gradients of rows are kept apart
_MIXES = "mixes the examples of a batch, or holds its parameters twice"
_OTHER_PRODUCTS = "gives other products than those of its gradients"
_WITHOUT_GRADIENTS = "ran without gradients: use activation checkpointing with use_reentrant=False"


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


def hidden_layers(
    model: nn.Module, loss_fn: LossFn[T], batch: T, names: Iterable[str], replays: bool = True
) -> list[Hidden]:
    """Return the layers that hide what the parameters ``names`` do to the losses of a batch.

    Layers that take or return several tensors, whose rows are tokens, or that are observed from above because they hide
    it themselves, are compared with gradients that autograd forms for each example. What was found is remembered for
    this model. Costs one forward for models of plain layers, some more for others. The model is left without hooks, and
    compiled models run eagerly.

    Args:
        model: in the mode in which gradients are wanted.
        loss_fn: per-example losses.
        batch: a few rows; more than one, because one alone does not show which dimension counts examples.
        names: of parameters.
        replays: whether a layer may be seen as it computes once more; False asks for input and output of each.
    """
    names = list(names)
    known = known_of(model).copy() if replays else Known()
    can_rise = replays and not is_sharded(model)
    reasons: dict[str, Hidden] = {}
    for _ in range(_MAX_LOOKS):
        hidden, log = _look(model, loss_fn, batch, names, known, replays)
        if not hidden and {pattern(name) for name in log.unusual} - known.verified:
            hidden = _compare(model, loss_fn, batch, names, known, replays)
            if not hidden:
                known.verified |= {pattern(name) for name in log.unusual}
        for each in hidden:
            for name in each.parameters:
                reasons.setdefault(name, each)
        if not hidden or not can_rise or not _rise(model, hidden, known):
            break
    if not hidden and replays:
        kept = known_of(model)
        kept.levels.update(known.levels)
        kept.backwards |= known.backwards
        kept.verified |= known.verified
    if not hidden:
        return []
    left = dict.fromkeys(name for each in hidden for name in each.parameters)
    return list(dict.fromkeys(reasons[name] for name in left if name in reasons)) or hidden


def _look(
    model: nn.Module, loss_fn: LossFn[T], batch: T, names: Iterable[str], known: Known, replays: bool
) -> tuple[list[Hidden], TapLog]:
    """Return the layers that hide what they do, as far as one forward shows it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plan, uncovered = sort_layers(model, {name: parameters[name].detach() for name in names}, known=known)

    def nothing(*seen: object) -> None:
        return None

    plan = replace(
        plan,
        observers=dict.fromkeys(plan.observers, nothing),
        replayed=dict.fromkeys(plan.replayed, nothing) if replays else {},
        instead=dict.fromkeys(plan.instead, nothing) if replays else {},
    )
    errors: list[Exception] = []
    rows = count_rows(batch)
    anchor = make_anchor(parameters.values(), rows)
    taps = tapped(model, plan.observers, anchor, rows, errors.append, plan.replayed, plan.instead)
    with _passes(anchor.device), taps as log:
        loss = loss_fn(model, batch).sum()
        unobserved, missed = find_missed(plan, loss, log)
    kinds, held = _kinds(model), _held(plan)
    found = [Hidden(name, kinds[name], _MIXES, tuple(own)) for name, own in uncovered]
    for error in errors:
        if not isinstance(error, LayerError):
            raise error
        found.append(Hidden(error.module, kinds[error.module], f"maps {error.got}", tuple(held.get(error.module, ()))))
    found += [Hidden(name, kinds[name], _WITHOUT_GRADIENTS, tuple(held.get(name, ()))) for name in unobserved]
    without = {name for _, own in uncovered for name in own}
    for name in (each for each in missed if each not in without):
        holder = plan.holders[name][0]
        found.append(Hidden(holder, kinds[holder], f"the loss uses {name.rpartition('.')[2]} past it", (name,)))
    return list(dict.fromkeys(found)), log  # a layer may be called several times


def _compare(
    model: nn.Module, loss_fn: LossFn[T], batch: T, names: Iterable[str], known: Known, replays: bool
) -> list[Hidden]:
    """Return the layers whose products with a gradient are not those of gradients that autograd forms.

    The direction is the gradient of the first row, so that its own product cannot vanish.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    parameters = {name: every[name] for name in names if every[name].requires_grad}
    rows = count_rows(batch)
    compared = min(rows, _ROWS_COMPARED)
    device = next(iter(every.values())).device
    with _passes(device):
        losses = loss_fn(model, batch)
        gradients = [
            torch.autograd.grad(
                losses[row], list(parameters.values()), retain_graph=row + 1 < compared, allow_unused=True
            )
            for row in range(compared)
        ]
    tolerance = _tolerance(parameters.values(), losses.device)
    by_row = [
        {name: gradient for name, gradient in zip(parameters, row, strict=True) if gradient is not None}
        for row in gradients
    ]
    if not by_row[0]:
        return []
    plan, _ = sort_layers(model, by_row[0], known=known)
    plan = plan if replays else replace(plan, replayed={}, instead={})
    products: dict[str, Tensor] = {}
    errors: list[Exception] = []

    def note(name: str, observe: Callable[..., Tensor | None], *seen: object) -> Tensor | None:
        found = observe(*seen)
        if found is not None:
            products[name] = products.get(name, torch.zeros_like(found)) + found.detach()
        return found

    def noted(observers: Mapping[str, Callable[..., Tensor | None]]) -> dict[str, Callable[..., Tensor | None]]:
        return {name: partial(note, name, observe) for name, observe in observers.items()}

    with _passes(device):
        anchor = make_anchor(parameters.values(), rows)
        looks = noted(plan.observers), noted(plan.replayed), noted(plan.instead)
        with tapped(model, looks[0], anchor, rows, errors.append, looks[1], looks[2]) as log:
            total = loss_fn(model, batch).sum()
            torch.autograd.grad(total, [anchor], allow_unused=True)
    kinds, held = _kinds(model), _held(plan)
    found = []
    for error in errors:
        if not isinstance(error, LayerError):
            raise error
        found.append(Hidden(error.module, kinds[error.module], f"maps {error.got}", tuple(held.get(error.module, ()))))
    if found:
        return list(dict.fromkeys(found))
    for modules, own in _groups(plan):
        seen = sum((products[name] for name in modules if name in products), torch.zeros_like(anchor.detach()))
        if not _fits(seen, by_row, own, tolerance):
            odd = [name for name in modules if name in log.unusual] or modules
            found += [Hidden(name, kinds[name], _OTHER_PRODUCTS, tuple(own)) for name in odd]
    return found


@contextmanager
def _passes(device: torch.device) -> Iterator[None]:
    """Open a block for a forward and a backward that draw the random numbers of any other such block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _fits(seen: Tensor, by_row: list[dict[str, Tensor]], names: Iterable[str], tolerance: float) -> bool:
    """Return whether products ``(B,)`` with the gradient of the first row are those of the gradients of all rows."""
    for row, gradient in enumerate(by_row):
        product = square = first = 0.0
        for name in (each for each in names if each in by_row[0]):
            one = by_row[0][name].double()
            other = gradient[name].double() if name in gradient else torch.zeros_like(one)
            product += float((one * other).sum())
            square += float(other.square().sum())
            first += float(one.square().sum())
        size = (first * max(square, first)) ** 0.5
        if abs(float(seen[row]) - product) > tolerance * size:
            return False
    return True


def _tolerance(parameters: Iterable[Tensor], device: torch.device) -> float:
    if torch.is_autocast_enabled(device.type):
        return _TOLERANCE_16_BIT
    return max(_TOLERANCE.get(parameter.dtype, _TOLERANCE_16_BIT) for parameter in parameters)


def _rise(model: nn.Module, hidden: Iterable[Hidden], known: Known) -> bool:
    """Let what hides be seen from farther above, in all blocks of a model alike; returns whether all of it may."""
    modules = dict(model.named_modules(remove_duplicate=False))
    homes = {
        f"{module}.{local}" if module else local: module
        for module, part in modules.items()
        for local, parameter in part._parameters.items()
        if parameter is not None
    }
    risen: set[str] = set()
    for each in hidden:
        if each.why in (_WITHOUT_GRADIENTS, _MIXES) or not each.parameters:
            return False
        place = pattern(each.module)
        if each.why == _OTHER_PRODUCTS and place not in known.backwards:
            known.backwards.add(place)  # a part may be under no_grad, which only backward knows
            continue
        for name in each.parameters:
            if pattern(name) in risen:
                continue
            risen.add(pattern(name))
            home = homes[name]
            level = known.levels.get(pattern(name), 0)
            depth = len(home.split(".")) if home else 0
            while level < depth:
                level += 1
                if _is_called(modules[above(home, level)]):
                    break
            else:
                return False
            known.levels[pattern(name)] = level
    return True


def _is_called(module: nn.Module) -> bool:
    return getattr(module.forward, "__name__", "") != "_forward_unimplemented"


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)}


def _held(plan: LayerPlan) -> dict[str, list[str]]:
    """Return the parameters that each observed module shows."""
    held: dict[str, list[str]] = {}
    for name, holders in plan.holders.items():
        for holder in holders:
            held.setdefault(holder, []).append(name)
    return held


def _groups(plan: LayerPlan) -> list[tuple[list[str], list[str]]]:
    """Return modules with their parameters, those together that share some: tied weights have one gradient."""
    groups: list[tuple[set[str], set[str]]] = []
    for name, holders in plan.holders.items():
        modules, own = set(holders), {name}
        apart = []
        for group in groups:
            if group[0] & modules:
                modules |= group[0]
                own |= group[1]
            else:
                apart.append(group)
        groups = [*apart, (modules, own)]
    return [(sorted(modules), sorted(own)) for modules, own in groups]


def described(hidden: Iterable[Hidden]) -> str:
    """Return the layers in words, those of all blocks of a model as one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in hidden:
        key = (pattern(each.module), each.kind, each.why)
        groups.setdefault(key, []).append(each.module)
    texts = []
    for (shape, kind, why), names in groups.items():
        texts.append(f"{names[0] if len(set(names)) == 1 else shape} ({kind}) {why}")
    return "; ".join(texts[:_NAMES_SHOWN]) + ("; ..." if len(texts) > _NAMES_SHOWN else "")


def patterns(names: Iterable[str]) -> list[str]:
    """Return patterns for names, as in a shell, with one for those that differ in the numbers of blocks only."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), set()).add(name)
    return sorted(next(iter(found)) if len(found) == 1 else shape for shape, found in groups.items())
