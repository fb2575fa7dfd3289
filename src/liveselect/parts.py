"""Parts as they are passed in, saved and restored: what is none is refused, and nothing is lost on the way."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from liveselect.grammar import (
    Around,
    InfluenceEstimator,
    InfluenceRegressor,
    LiveModel,
    Part,
    Round,
    Selector,
    State,
)

P = TypeVar("P")

_CLOSE = 0.82
"""Similarity of names, 0..1, from which one is taken for a misspelling of the other."""

_FORMER: Mapping[str, str] = {
    "overhear": "observe_step",
    "check_pool": "check",
    "measures": "needs_estimator",
    "once_a_round": "spreadable",
}
"""Names of version 0.1, and what they are called now."""

_PAIRS = (("state_dict", "load_state_dict"), ("fitted_state", "load_fitted_state"))

_SAVED_AS_THEY_ARE = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    Tensor,
    torch.dtype,
    torch.device,
    torch.Size,
)
"""What a checkpoint holds and ``torch.load(weights_only=True)`` reads, beside dicts, lists and tuples."""


def check_part(part: P, kind: type, argument: str) -> P:
    """Return ``part`` if it is a ``kind`` whose members are spelt and callable as the grammar declares them.

    Args:
        part: what was passed in.
        kind: :class:`~liveselect.grammar.Selector`, or another base class of the grammar.
        argument: name of the argument, for messages.

    Raises:
        TypeError: it is none; it has a public method or value whose name is close to a declared one; a method that
            cannot be called as the engine calls it; or a flag that is neither True nor False.
    """
    if isinstance(part, type) and issubclass(part, kind):
        raise TypeError(
            f"expected {argument} to be an object, got the class {part.__name__}: pass {part.__name__}(...)"
        )
    if not isinstance(part, kind):
        raise TypeError(
            f"expected {argument} to inherit from liveselect.grammar.{kind.__name__}, got {_described(part)}"
            f"{_nearest_class(part, kind)}"
        )
    declared = {name for base in kind.__mro__ for name in vars(base) if not name.startswith("_")}
    for owner in _own_classes(part):
        for name, member in vars(owner).items():
            if not name.startswith("_") and name not in declared:
                _refuse_misspelling(owner, kind, name, declared, is_method=callable(member))
    for name, value in vars(part).items():
        if not name.startswith("_") and name not in declared and isinstance(value, bool):
            _refuse_misspelling(type(part), kind, name, declared, is_method=False)
    for name in sorted(declared):
        _check_member(part, kind, name)
    _check_state(part, declared)
    if isinstance(part, Around):
        check_part(vars(part).get("selector"), Selector, f"the selector inside {type(part).__name__}")
    return part


def _overrides(part: object, name: str) -> bool:
    """Return whether a part has its own method in place of the grammar's default."""
    return any(name in vars(owner) for owner in type(part).__mro__ if owner.__module__ != Part.__module__)


def _check_state(part: object, declared: set[str]) -> None:
    """Raise TypeError for a part that checkpoints would hold in half."""
    for save, load in _PAIRS:
        if save in declared and _overrides(part, save) != _overrides(part, load):
            raise TypeError(
                f"{type(part).__name__} has only one of {save} and {load}, so a resumed run could not restore it: "
                "write both"
            )
    if isinstance(part, InfluenceEstimator) and part.fit_lasts and not _overrides(part, "fitted_state"):
        raise TypeError(
            f"{type(part).__name__} says fit_lasts, but its fit is in no checkpoint, so a resumed run would measure "
            "with another one: write fitted_state and load_fitted_state too"
        )


def save_part(part: Part | None, state: State | None = None) -> State | None:
    """Return the class and the state of a part as tensors and builtins; ``state`` in place of its present one."""
    if part is None:
        return None
    name = type(part).__name__
    return {"class": name, "state": as_builtins(part.state_dict() if state is None else state, f"{name}.state_dict()")}


def restore_part(part: Part | None, saved: State | None, role: str) -> None:
    """Load what :func:`save_part` returned.

    Raises:
        ValueError: it was another class of part, and one of the two remembers something.
    """
    found, expected = None if part is None else type(part).__name__, None if saved is None else saved["class"]
    if found != expected:
        if (saved is not None and saved["state"]) or (part is not None and part.state_dict()):
            raise ValueError(
                f"the checkpoint holds the state of the {role} {expected}, but this run uses {found}: resume with the "
                f"{role} that the run began with, or start a new run"
            )
    elif part is not None and saved is not None:
        part.load_state_dict(saved["state"])


def check_keys(state: State, expected: set[str], what: str) -> None:
    """Raise ValueError unless a state has just the ``expected`` keys."""
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"the {what} of the checkpoint lacks {missing}: it was damaged, or written by another version")
    if unknown := sorted(state.keys() - expected):
        raise ValueError(f"the {what} of the checkpoint holds {unknown}, which this version does not know")


def as_builtins(value: object, place: str) -> Any:
    """Return a state with NumPy's numbers and arrays as Python's and tensors.

    Args:
        value: the state, or a part of it.
        place: where it stands, for messages.

    Raises:
        TypeError: it holds what makes a checkpoint unloadable.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {as_builtins(key, place): as_builtins(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        items = [as_builtins(item, f"{place}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, _SAVED_AS_THEY_ARE):
        return value
    raise TypeError(
        f"{place} holds a {type(value).__name__}, which no checkpoint can restore: save numbers, strings, tensors, and "
        "lists, tuples and dicts of them"
    )


def fit_metrics(estimator: InfluenceEstimator, model: LiveModel, round: Round) -> dict[str, float]:
    """Fit an estimator, and return what it reports; raise TypeError when that is no mapping."""
    metrics: object = estimator.fit(model, round)
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"expected {type(estimator).__name__}.fit to return a mapping of metrics, {{}} for none, got "
            f"{type(metrics).__name__}"
        )
    return {name: float(value) for name, value in metrics.items()}


def checked_influence(influence: object, rows: int, what: str) -> Tensor:
    """Return influence ``(rows,)`` float32 on CPU; raise ValueError when it is something else."""
    if not isinstance(influence, Tensor) or influence.shape != (rows,):
        got = tuple(influence.shape) if isinstance(influence, Tensor) else type(influence).__name__
        raise ValueError(f"expected {what} to return one influence for each of {rows} candidates, got {got}")
    return influence.detach().float().cpu()


def checked_tokens(tokens: object, shape: tuple[int, ...], what: str) -> Tensor:
    """Return the influence of tokens, of this ``shape``, float32 on CPU; raise ValueError when it is something else."""
    if not isinstance(tokens, Tensor) or tokens.shape != shape or not tokens.is_floating_point():
        got = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"expected {what} to return None, or one influence for each token of {shape[0]} candidates, {shape}, NaN "
            f"where no loss is taken, got {got}"
        )
    return tokens.detach().float().cpu()


def _described(part: object) -> str:
    return f"the class {part.__name__}" if isinstance(part, type) else f"an object of {type(part).__name__}"


def _nearest_class(part: object, kind: type) -> str:
    """Return a hint for an object that is another kind of part."""
    for other in (Selector, InfluenceEstimator, InfluenceRegressor):
        if isinstance(part, other) and other is not kind:
            return f" ({type(part).__name__} is a {other.__name__}: is it the wrong argument?)"
    return ""


def _own_classes(part: object) -> list[type]:
    """Return the classes of a part below the grammar, the nearest first."""
    return [owner for owner in type(part).__mro__ if owner.__module__ != Part.__module__ and issubclass(owner, Part)]


def _refuse_misspelling(owner: type, kind: type, name: str, declared: set[str], is_method: bool) -> None:
    names = {each: each for each in declared} | {old: new for old, new in _FORMER.items() if new in declared}
    alike = [each for each, right in names.items() if callable(getattr(kind, right)) == is_method]
    near = difflib.get_close_matches(name, alike, 1, _CLOSE)
    if near:
        right = names[near[0]]
        raise TypeError(
            f"{owner.__name__}.{name} is never used: {kind.__name__} has no {name}, the nearest name is {right}. "
            f"Rename it to {right}, or to _{name} if it is your own"
        )


def _check_member(part: object, kind: type, name: str) -> None:
    """Raise TypeError when a method takes other arguments than the declared one, or a flag is none."""
    declared, member, mine = getattr(kind, name), getattr(part, name), f"{type(part).__name__}.{name}"
    if not inspect.isfunction(declared):
        if not isinstance(member, bool):
            raise TypeError(f"expected {mine} to be True or False, as {kind.__name__}.{name} is, got {member!r}")
        return
    if not callable(member):
        raise TypeError(f"expected {mine} to be a method, as {kind.__name__}.{name} is, got {type(member).__name__}")
    if inspect.iscoroutinefunction(member) or inspect.isgeneratorfunction(member):
        raise TypeError(f"expected {mine} to return its result: it is a generator or a coroutine")
    expected = inspect.signature(declared)
    given = [parameter.name for parameter in expected.parameters.values()][1:]
    swapped = [each for each in inspect.signature(member).parameters if each in given]
    if swapped != [each for each in given if each in swapped]:
        raise TypeError(f"expected {mine} to take ({', '.join(given)}) in this order, got ({', '.join(swapped)})")
    try:
        inspect.signature(member).bind(*given)
    except TypeError as error:
        raise TypeError(
            f"{mine}{inspect.signature(member)} cannot be called as {name}({', '.join(given)}): {error}. "
            f"{kind.__name__}.{name} says what it is given"
        ) from None
