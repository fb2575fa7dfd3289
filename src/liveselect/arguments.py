"""Checks of constructor arguments: flags in place of numbers, numbers in place of flags, missing model folders."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np


def check_plain(of: Callable[..., Any], given: Mapping[str, object]) -> None:
    """Raise TypeError for a flag that is neither True nor False, and for a number that is a flag or a text.

    Args:
        of: whose annotated parameters say what is expected: ``bool``, ``int`` or ``float``, also beside None.
        given: the arguments by name; others are not looked at.
    """
    for name, parameter in inspect.signature(of).parameters.items():
        value, annotation = given.get(name), parameter.annotation
        if value is None or isinstance(annotation, str):  # names of optional libraries are no flags
            continue
        kinds = set(get_args(annotation) or (annotation,)) if get_origin(annotation) is not tuple else set()
        if not kinds or not kinds <= {bool, int, float, type(None)}:
            continue
        is_flag, wants_flag = isinstance(value, bool | np.bool_), bool in kinds
        if is_flag != wants_flag or isinstance(value, str):
            expected = "True or False" if wants_flag else "a number"
            raise TypeError(f"expected {name} of {of.__name__} to be {expected}, got {value!r}")


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
