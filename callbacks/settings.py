"""What selection was set to, so that a resumed run can tell what has changed."""

import inspect
from collections.abc import Mapping
from typing import Any


def settings_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of some parts as text, by dotted name.

    A part is told by its class, and by the arguments of its constructor that it keeps under their names, where they
    are plain values; parts inside a part likewise. What a part learns is no setting.
    """
    found: dict[str, str] = {}
    for name, part in parts.items():
        if _is_plain(part):
            found[name] = repr(part)
            continue
        found[name] = getattr(part, "__qualname__", type(part).__qualname__)
        if hasattr(part, "__dict__") and not inspect.isroutine(part) and not inspect.isclass(part):
            kept = {argument: vars(part)[argument] for argument in _arguments(part) if argument in vars(part)}
            # of other objects only those that are parts of selection; a data set or a model is none
            inner = {key: value for key, value in kept.items() if _is_plain(value) or _is_part(value)}
            found.update({f"{name}.{key}": value for key, value in settings_of(inner).items()})
    return found


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return what differs, one text each; a setting that only one of them knows has come or gone with its part."""
    return [
        f"{name} was {before[name]} and is {now[name]}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]


def _arguments(part: Any) -> list[str]:
    try:
        return list(inspect.signature(type(part)).parameters)
    except (TypeError, ValueError):  # of a compiled class
        return []


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _is_part(value: Any) -> bool:
    return any(hasattr(value, method) for method in ("propose", "select", "measure", "predict"))
