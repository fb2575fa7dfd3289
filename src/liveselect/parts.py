"""Parts as they are passed in, saved and restored: what is none is refused, and nothing is lost on the way."""

import difflib
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from liveselect.grammar import (
    Around,
    CandidateSource,
    InfluenceEstimator,
    InfluenceRegressor,
    LiveModel,
    Part,
    Round,
    Selector,
    State,
)
from liveselect.pool import CandidatePool

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

_YIELDED = ("candidates", "reference")
"""Methods of a source that may be generators."""

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
    _check_kind(part, kind, argument)
    declared = _declared(kind)
    for owner, name, member in _own_members(part, Part, declared):
        _refuse_misspelling(owner, kind, name, declared, is_method=callable(member))
    foreign = _foreign_names(type(part), Part)
    for name, value in vars(part).items():
        if not name.startswith("_") and name not in declared | foreign and isinstance(value, bool):
            _refuse_misspelling(type(part), kind, name, declared, is_method=False)
    for name in sorted(declared):
        _check_member(part, kind, name)
    _check_state(part, declared)
    if isinstance(part, Around):
        check_part(vars(part).get("selector"), Selector, f"the selector inside {type(part).__name__}")
    return part


def check_source(source: CandidateSource, argument: str) -> CandidateSource:
    """Return ``source`` if it is a ``CandidateSource`` with a pool, and its members are spelt as declared.

    Args:
        source: what was passed in, ready to serve.
        argument: name of the argument, for messages.

    Raises:
        TypeError: as :func:`check_part`, or it has no pool or no batch size.
        ValueError: its batch size is below 1.
    """
    _check_kind(source, CandidateSource, argument)
    declared = _declared(CandidateSource)
    for owner, name, member in _own_members(source, CandidateSource, declared):
        if not isinstance(member, property):  # whatever it returns, it may be the part's own
            _refuse_misspelling(owner, CandidateSource, name, declared, is_method=callable(member))
    for name in sorted(declared):
        if inspect.isfunction(getattr(CandidateSource, name, None)):
            _check_method(source, CandidateSource, name)
    for name, kind, meaning in (
        ("pool", CandidatePool, "the candidates, a CandidatePool"),
        ("batch_size", Integral, "rows in the training batch of one rank"),
    ):
        value = getattr(source, name, None)
        if not isinstance(value, kind) or isinstance(value, bool):
            near = [] if value is not None else difflib.get_close_matches(name, set(dir(source)) - declared, 1, _CLOSE)
            raise TypeError(
                f"expected {type(source).__name__} to have {name} ({meaning}), got {value!r}"
                + (f": rename {near[0]} to {name}" if near else "")
            )
    if source.batch_size < 1:
        raise ValueError(f"expected {type(source).__name__}.batch_size of at least 1, got {source.batch_size}")
    return source


def _check_kind(part: object, kind: type, argument: str) -> None:
    """Raise TypeError for what is no object of a ``kind``."""
    if isinstance(part, type) and issubclass(part, (kind, Part)):
        hint = _nearest_class(part, kind)
        raise TypeError(
            f"expected {argument} to be an object, got the class {part.__name__}{hint}: pass {part.__name__}(...)"
        )
    if not isinstance(part, kind):
        raise TypeError(
            f"expected {argument} to inherit from liveselect.grammar.{kind.__name__}, got {_described(part)}"
            f"{_nearest_class(part, kind)}"
        )


def _declared(kind: type) -> set[str]:
    """Return the public names that a kind declares, with values that it leaves to others to set."""
    bases = [base for base in kind.__mro__ if base.__module__ == Part.__module__]
    names = {name for base in bases for name in (*vars(base), *inspect.get_annotations(base))}
    return {name for name in names if not name.startswith("_")}


def _own_members(part: object, root: type, declared: set[str]) -> Iterator[tuple[type, str, object]]:
    """Yield what the classes of a part define beside what is declared, each with its class.

    Names that a class from elsewhere brings along (a mixin, a framework's base class) mean what they mean there, also
    where they are overridden.
    """
    grammar = [base for base in type(part).__mro__ if base.__module__ == Part.__module__]
    known = declared.union(_foreign_names(type(part), root), *map(vars, grammar))
    for owner in type(part).__mro__:
        if owner.__module__ == Part.__module__ or not issubclass(owner, root):
            continue
        for name, member in vars(owner).items():
            if not name.startswith("_") and name not in known:
                yield owner, name, member


def _foreign_names(cls: type, root: type) -> set[str]:
    """Return the names of the bases of a class that have nothing to do with ``root``."""
    foreign = [base for base in cls.__mro__ if not issubclass(base, root) and base is not object]
    return {name for base in foreign for name in (*vars(base), *inspect.get_annotations(base))}


def _overrides(part: object, name: str) -> bool:
    """Return whether a part has its own method in place of the grammar's default; what comes after that is not used."""
    owner = next(owner for owner in type(part).__mro__ if name in vars(owner))
    return owner.__module__ != Part.__module__


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
    if isinstance(part, InfluenceEstimator) and part.has_direction and not _overrides(part, "direction"):
        raise TypeError(f"{type(part).__name__} says has_direction: write direction() too, or leave has_direction out")


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
            held = f"no {role}" if expected is None else f"the state of the {role} {expected}"
            raise ValueError(
                f"the checkpoint holds {held}, but this run uses {found or 'none'}: resume with the {role} that the "
                "run began with, or start a new run"
            )
    elif part is not None and saved is not None:
        part.load_state_dict(saved["state"])


def check_keys(state: State, expected: set[str], what: str) -> None:
    """Raise ValueError unless a state has just the ``expected`` keys."""
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"the {what} of the checkpoint lacks {missing}: it was damaged, or written by another version")
    if unknown := sorted(state.keys() - expected):
        raise ValueError(f"the {what} of the checkpoint holds {unknown}, which this version does not know")


def digest_of(state: object) -> str:
    """Return a hash of all that a state of tensors and builtins holds; it is the same after saving and loading."""
    digest = hashlib.blake2b(digest_size=16)
    _add_to(digest, state)
    return digest.hexdigest()


def _add_to(digest: hashlib.blake2b, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"{len(value)} entries".encode())
        for key, item in value.items():
            digest.update(repr(key).encode())
            _add_to(digest, item)
    elif isinstance(value, list | tuple) and not set(map(type, value)) <= {bool, int, float, type(None)}:
        digest.update(f"{type(value).__name__} of {len(value)}".encode())
        for item in value:
            _add_to(digest, item)
    else:
        digest.update(repr(value).encode())


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


def checked_direction(estimator: InfluenceEstimator) -> Mapping[str, Tensor] | None:
    """Return what an estimator compares gradients with; raise TypeError when that is no mapping of names to tensors."""
    direction = estimator.direction()
    given: object = direction
    wrong = None
    if isinstance(given, Mapping):
        odd = (f"{type(value).__name__} under {name!r}" for name, value in given.items() if not _is_named(name, value))
        wrong = next(odd, None)
    elif given is not None:
        wrong = f"an object of {type(given).__name__}"
    if wrong is not None:
        raise TypeError(
            f"expected {type(estimator).__name__}.direction to return a mapping of parameter names to tensors, or None "
            f"when there is nothing to compare with yet, got {wrong}"
        )
    return direction


def _is_named(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


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
    """Return a hint for an object, or a class, that is another kind of part."""
    cls = part if isinstance(part, type) else type(part)
    for other in (Selector, InfluenceEstimator, InfluenceRegressor, CandidateSource):
        if issubclass(cls, other) and other is not kind:
            return f" ({cls.__name__} is a {other.__name__}: is it the wrong argument?)"
    return ""


def _refuse_misspelling(owner: type, kind: type, name: str, declared: set[str], is_method: bool) -> None:
    names = {each: each for each in declared} | {old: new for old, new in _FORMER.items() if new in declared}
    alike = [each for each, right in names.items() if inspect.isfunction(getattr(kind, right, None)) == is_method]
    near = difflib.get_close_matches(name, alike, 1, _CLOSE)
    if near:
        right = names[near[0]]
        raise TypeError(
            f"{owner.__name__}.{name} is never used: {kind.__name__} has no {name}, the nearest name is {right}. "
            f"Rename it to {right}, or to _{name} if it is your own"
        )


def _check_member(part: object, kind: type, name: str) -> None:
    """Raise TypeError when a method takes other arguments than the declared one, or a flag is none."""
    if inspect.isfunction(getattr(kind, name)):
        _check_method(part, kind, name)
    elif not isinstance(member := getattr(part, name), bool):
        raise TypeError(
            f"expected {type(part).__name__}.{name} to be True or False, as {kind.__name__}.{name} is, got {member!r}"
        )


def _check_method(part: object, kind: type, name: str) -> None:
    """Raise TypeError when a method cannot be called as the engine calls it."""
    declared, member, mine = getattr(kind, name), getattr(part, name), f"{type(part).__name__}.{name}"
    if not callable(member):
        raise TypeError(f"expected {mine} to be a method, as {kind.__name__}.{name} is, got {type(member).__name__}")
    may_yield = kind is CandidateSource and name in _YIELDED
    if inspect.iscoroutinefunction(member) or (inspect.isgeneratorfunction(member) and not may_yield):
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
