"""Checks of constructor arguments: flags and numbers in each other's place, fractions, missing model folders."""

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np


def check_plain(of: Callable[..., Any], given: Mapping[str, object]) -> None:
    """Raise TypeError for what is no flag or no number where one is expected, ValueError for a fraction of a count.

    Args:
        of: whose annotated parameters say what is expected: ``bool``, ``int`` or ``float``, also beside None.
        given: the arguments by name; others are not looked at.
    """
    for name, parameter in inspect.signature(of).parameters.items():
        annotation = parameter.annotation
        if name not in given or isinstance(annotation, str):  # names of optional libraries are no flags
            continue
        value = given[name]
        kinds = set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
        if not kinds <= {bool, int, float, type(None)} or (value is None and type(None) in kinds):
            continue
        is_flag, wants_flag = isinstance(value, bool | np.bool_), bool in kinds
        if is_flag != wants_flag or not (is_flag or isinstance(value, Real)):
            expected = "True or False" if wants_flag else "a number"
            raise TypeError(f"expected {name} of {of.__name__} to be {expected}, got {value!r}")
        if not is_flag and float not in kinds and not isinstance(value, Integral):
            raise ValueError(f"expected {name} of {of.__name__} to be a whole number, got {value!r}")


def of_python(value: object) -> Any:
    """Return a number of numpy as one of Python, which checkpoints and JSON know; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def refuse_missing_folder(name: str | Path) -> None:
    """Raise FileNotFoundError where the name of a model is that of a folder which is not there, not one of the hub."""
    text = str(name)
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1
    if is_path and not Path(text).exists():
        raise FileNotFoundError(
            f"expected a folder with a model, as Transformers saves it, at {text}, found none: look at the path, or "
            "name a model of the Hugging Face hub"
        )
