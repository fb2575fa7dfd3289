"""Finds for the parameters of a direction the layers that show what they do to single examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from liveselect.functional.layer_pass import LayerPlan
from liveselect.functional.layers import Dot, Move, Rule, any_dot, replayed_dot, row_dot, rule_for
from liveselect.functional.taps import Call, CallObserver, Observer

Gather = Callable[[Tensor], Tensor]


@dataclass
class Known:
    """What was found out about the layers of a model by looking at it run.

    Attributes:
        levels: by the pattern of a parameter's name, how many modules above its own one shows what it does.
        backwards: patterns of modules whose products have to come from their own backward.
        verified: patterns of modules whose products were compared with gradients that autograd forms.
    """

    levels: dict[str, int] = field(default_factory=dict)
    backwards: set[str] = field(default_factory=set)
    verified: set[str] = field(default_factory=set)

    def copy(self) -> "Known":
        """Return the same, to be added to by itself."""
        return Known(dict(self.levels), set(self.backwards), set(self.verified))


_KNOWN: "WeakKeyDictionary[nn.Module, Known]" = WeakKeyDictionary()


def known_of(model: nn.Module) -> Known:
    """Return what is known of a model, to read and to add to."""
    return _KNOWN.setdefault(model, Known())


def pattern(name: str) -> str:
    """Return a name with a star for the number of each block, as in a shell."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def as_it_is(tensor: Tensor) -> Tensor:
    """Return a tensor that is whole already."""
    return tensor


def sort_layers(
    model: nn.Module,
    direction: Mapping[str, Tensor | None],
    whole: Gather = as_it_is,
    dot: Dot = row_dot,
    known: Known | None = None,
) -> tuple[LayerPlan, list[tuple[str, list[str]]]]:
    """Return the layers that have rules as a plan, and the others with their parameters.

    A parameter whose own module hides what it does is observed at one above it, which computes once more, as far above
    as is ``known``.
    """
    parameters, values = match_direction(model, direction)
    known = known_of(model) if known is None else known
    levels = known.levels

    def replay(place: str, module: nn.Module, moves: Sequence[Move]) -> CallObserver:
        return partial(_replay, module, moves, whole, dot, pattern(place) in known.backwards)

    observers: dict[str, Observer] = {}
    instead: dict[str, CallObserver] = {}
    moves: dict[str, list[Move]] = {}
    holders: dict[str, list[str]] = {name: [] for name in parameters}
    opaque: set[str] = set()
    uncovered: list[tuple[str, list[str]]] = []
    for module_name, module, own in _owners(model, parameters):
        rule = rule_for(module)
        if rule is None:
            uncovered.append((module_name, list(own.values())))
            continue
        raised = {name for name in own.values() if levels.get(pattern(name))}
        left = {local: values[name] for local, name in own.items() if name not in raised}
        simple = rule is not any_dot or not _holds_layers(module)
        for local, name in own.items():
            place = above(module_name, levels[pattern(name)]) if name in raised else module_name
            holders[name].append(place)
            if name in raised or not simple:
                moves.setdefault(place, []).append(Move(module, local, values[name]))
            if name in raised or rule is any_dot:
                opaque.add(name)
        if left and simple:
            observers[module_name] = _bind(rule, module, left, whole, dot)
            if rule is any_dot:
                own_moves = [Move(module, local, value) for local, value in left.items()]
                instead[module_name] = replay(module_name, module, own_moves)
    modules = dict(model.named_modules(remove_duplicate=False))
    replayed = {place: replay(place, modules[place], these) for place, these in moves.items()}
    where = {name: tuple(dict.fromkeys(found)) for name, found in holders.items()}
    return LayerPlan(observers, parameters, where, frozenset(opaque), model, replayed, instead), uncovered


def above(module: str, levels: int) -> str:
    """Return the name of the module that stands ``levels`` above a named one; "" for the whole model."""
    return ".".join(module.split(".")[:-levels])


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
) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
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


def _holds_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _bind(rule: Rule, module: nn.Module, direction: Mapping[str, Tensor], whole: Gather, dot: Dot) -> Observer:
    def observe(inputs: Tensor, delta: Tensor) -> Tensor:
        return rule(module, inputs, delta, {name: whole(value) for name, value in direction.items()}, dot)

    return observe


def _replay(
    module: nn.Module,
    moves: Sequence[Move],
    whole: Gather,
    dot: Dot,
    backwards: bool,
    call: Call,
    deltas: tuple[Tensor | None, ...],
) -> Tensor:
    gathered = [Move(move.module, move.name, whole(move.value)) for move in moves]
    return replayed_dot(module, call, deltas, gathered, dot, backwards)
