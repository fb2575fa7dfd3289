"""What users have in their code, YAML files and shells: public names, the arguments behind them, options of commands.

``tests/public_names.txt`` keeps them. After a deliberate change, write it anew, and say in CHANGELOG.md what users must
change:

    python tests/public_names.py
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from liveselect import cli

FILE = Path(__file__).with_suffix(".txt")
ROOMS = ("callbacks", "datamodules", "influence", "regressors", "selectors", "functional", "losses", "scores")
ROOMS += (
    "scoring",
    "verdict",
    "loops",
    "loops.hugging_face",
    "cli.model",
    "decisions",
    "monitoring",
    "report",
    "watch",
)
GRAMMAR = ("grammar",)  # its classes are inherited by users, so their methods count too
NOT_OURS = r"--(trainer\.|.*\.help$|print_config|weights_only|help)"  # what Lightning and jsonargparse add


def names_in(module: ModuleType) -> list[str]:
    """Return the public names of a module: its ``__all__``, or what it defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    found: set[str] = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sorted(name for name in found if not name.startswith("_"))


def arguments(function: Callable[..., Any]) -> list[str]:
    """Return the arguments in order: optional ones end in ``=``, those behind ``*`` are passed by name only."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # exceptions and others that are made in C
        return []
    found = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD and get_origin(parameter.annotation) is Unpack:
            found += [f"{name}=" for name in get_type_hints(get_args(parameter.annotation)[0])]
        if parameter.name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(parameter.name + ("" if parameter.default is parameter.empty else "="))
    return found


def methods(base: type) -> Iterator[str]:
    """Yield what a class lets its users write."""
    for name in sorted({*vars(base), *inspect.get_annotations(base)}):
        if not name.startswith("_"):
            member = vars(base).get(name)
            yield f"{name}({', '.join(arguments(member))})" if inspect.isfunction(member) else name


def lines_of(module: ModuleType) -> Iterator[str]:
    """Yield a line for every name, and below it one for each of its arguments."""
    for name in names_in(module):
        yield f"{module.__name__}.{name}"
        thing = getattr(module, name)
        if isinstance(thing, type) and module.__name__.split(".")[-1] in GRAMMAR:
            yield from (f"    .{method}" for method in methods(thing))
        elif isinstance(thing, type) or inspect.isfunction(thing):
            yield from (f"    {argument}" for argument in arguments(thing))


def options(command: str) -> list[str]:
    """Return the options that a command shows in its help, or in the long one."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main([command, "--help-all" if command in ("fit", "validate", "score") else "--help"])
    found = re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[\w.-]+)", shown.getvalue(), re.MULTILINE)
    return sorted({option for option in found if not re.match(NOT_OURS, option)})


def public_names() -> list[str]:
    """Return the lines of the list."""
    rooms = [room for room in (*GRAMMAR, *ROOMS) if importlib.util.find_spec(f"liveselect.{room}")]
    found = [line for room in rooms for line in lines_of(importlib.import_module(f"liveselect.{room}"))]
    for command in cli.COMMANDS:
        found.append(f"liveselect {command}")
        found += [f"    {option}" for option in options(command)]
    return found


if __name__ == "__main__":
    FILE.write_text("\n".join(public_names()) + "\n")
