"""Misspelled settings, found before torch and Lightning are imported: classes are read, and nothing of them is run."""

import ast
import difflib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

SECTIONS = ("trainer", "model", "data", "select", "seed_everything", "ckpt_path", "optimizer", "lr_scheduler")
"""What a file of ``liveselect fit`` may hold at its top."""
_OTHERS = ("config", "print_config", "help", "help-all", "weights_only", "verbose")
_TRAINER = "lightning.pytorch.Trainer"
_PRESETS = "liveselect.callbacks"
_LIKENESS = 0.75
"""How alike two names are, 0..1, from which on one is a misspelling of the other."""
_KEYS = ("class_path", "init_args", "dict_kwargs")


def options_of(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command line with their values, in order."""
    for index, word in enumerate(arguments):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
        elif word.startswith("-c"):
            name, equals, value = "-c", word[2:3], word[2:].removeprefix("=")
        else:
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        yield name, value if equals else "" if following.startswith("--") else following


def refuse_typos(arguments: Sequence[str], more: Sequence[str] = ()) -> None:
    """Raise ValueError for a setting on a command line, or in a file on it, that is another one misspelled.

    Settings are looked at where the names of a class's arguments can be read. All else is left to jsonargparse.

    Args:
        arguments: of the command.
        more: names that its files may hold beside ``SECTIONS``.
    """
    sections = (*SECTIONS, *more)
    classes: dict[str, str] = {"trainer": _TRAINER}  # a later file or option may change only some arguments
    for name, value in options_of(arguments):
        if name in ("-c", "--config"):
            _check_file(value, sections, classes)
        elif name.startswith("--"):
            _check_option(name, value, sections, classes)


def _check_file(file: str, sections: Sequence[str], classes: dict[str, str]) -> None:
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return  # jsonargparse says what is wrong with it
    if not isinstance(settings, Mapping):
        return
    for section, value in settings.items():
        _refuse_near(str(section), sections, f"{file}: there is no section")
        if section == "trainer" and isinstance(value, Mapping):
            value = {"init_args": value}
        _check_part(str(section), value, f"{file}, {section}", classes)


def _check_option(name: str, value: str, sections: Sequence[str], classes: dict[str, str]) -> None:
    section, *path = name.removeprefix("--").rstrip("+").split(".")
    _refuse_near(section, (*sections, *_OTHERS), f"{name}: there is no option")
    while path and path[0] == "init_args":
        path = path[1:]
    if not path:
        _check_part(section, value, name, classes)
    elif path[0] == "class_path":
        _check_part(section, {"class_path": value}, name, classes)
    elif section in classes:
        _refuse_argument(path[0], classes[section], name)


def _check_part(place: str, value: object, where: str, classes: dict[str, str]) -> None:
    """Check a class path, or a mapping with one and its arguments, and what is in these."""
    if isinstance(value, list):
        for index, each in enumerate(value):
            _check_part(f"{place}.{index}", each, where, classes)
        return
    if isinstance(value, str) and "." in value and value.replace(".", "").isidentifier():
        _note_class(place, value, where, classes)
    if place == "select" and isinstance(value, str) and value.isidentifier():
        _note_class(place, f"{_PRESETS}.{value}", where, classes)
    if not isinstance(value, Mapping):
        return
    if "class_path" in value:
        for key in value:
            _refuse_near(str(key), _KEYS, f"{where}: beside class_path there is no")
        if isinstance(value["class_path"], str):
            _check_part(place, value["class_path"], where, classes)
    given = value.get("init_args")
    for name, each in given.items() if isinstance(given, Mapping) else ():
        if place in classes:
            _refuse_argument(str(name), classes[place], where)
        _check_part(f"{place}.{name}", each, f"{where}.{name}", classes)


def _note_class(place: str, class_path: str, where: str, classes: dict[str, str]) -> None:
    module, _, name = class_path.rpartition(".")
    classes.pop(place, None)
    path = _module(module)
    if path is None:
        return
    if _definition(path, name) is None:
        _refuse_near(name, sorted(_names(path)), f"{where}: {module} holds no")
        return
    classes[place] = class_path


def _refuse_argument(name: str, class_path: str, where: str) -> None:
    known = arguments_of(class_path)
    if known is None or name in known or name in _KEYS:
        return
    if class_path.rpartition(".")[2] == "PDS" and name in (arguments_of(f"{_PRESETS}.LivePDS") or ()):
        return  # of version 0.1, which has an answer of its own
    _refuse_near(name, sorted(known), f"{where}: {class_path.rpartition('.')[2]} has no setting")


def _refuse_near(name: str, known: Sequence[str], said: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS)
    if near:
        raise ValueError(f"{said} {name!r}. Did you mean {near[0]!r}?")


# ---- classes as they are written ---------------------------------------------------------------------------------


@cache
def arguments_of(class_path: str) -> frozenset[str] | None:
    """Return the names of a class's arguments as its file has them; None where they cannot be read."""
    module, _, name = class_path.rpartition(".")
    path = _module(module)
    found = None if path is None else _definition(path, name)
    return None if found is None else _arguments(*found)


def _arguments(path: Path, node: ast.ClassDef) -> frozenset[str] | None:
    made = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    if made is None:
        if any("dataclass" in ast.dump(each) for each in node.decorator_list):
            return _fields(path, node)
        bases = [_named(path, base) for base in node.bases]
        return _arguments(*bases[0]) if len(bases) == 1 and bases[0] is not None else None
    names = {each.arg for each in (*made.args.posonlyargs, *made.args.args, *made.args.kwonlyargs)} - {"self"}
    if made.args.kwarg is not None:
        more = _passed_on(path, node, made, made.args.kwarg)
        if more is None:
            return None  # it takes any names
        names |= more
    return frozenset(names)


def _passed_on(path: Path, node: ast.ClassDef, made: ast.FunctionDef, rest: ast.arg) -> frozenset[str] | None:
    """Return the names that the ``**rest`` of a constructor may have: typed, or those of the class that it makes."""
    typed = rest.annotation
    if isinstance(typed, ast.Subscript) and ast.unparse(typed.value) == "Unpack":
        found = _named(path, typed.slice)
        return None if found is None else _fields(*found)
    for call in (each for each in ast.walk(made) if isinstance(each, ast.Call)):
        if any(word.arg is None and ast.unparse(word.value) == rest.arg for word in call.keywords):
            is_base = ast.unparse(call.func) == "super().__init__"
            found = _named(path, node.bases[0] if is_base and node.bases else call.func)
            return None if found is None else _arguments(*found)
    return None


def _fields(path: Path, node: ast.ClassDef) -> frozenset[str] | None:
    """Return the annotated names of a class and of its bases."""
    names = {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    for base in node.bases:
        if ast.unparse(base).rpartition(".")[2] in ("TypedDict", "ABC", "Protocol"):
            continue
        found = _named(path, base)
        inherited = None if found is None else _fields(*found)
        if inherited is None:
            return None
        names |= inherited
    return frozenset(names)


def _named(path: Path, expression: ast.expr) -> tuple[Path, ast.ClassDef] | None:
    return _definition(path, expression.id) if isinstance(expression, ast.Name) else None


@cache
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ast.Module([], [])


def _statements(path: Path) -> Iterator[ast.stmt]:
    """Yield the statements of a module, and those for type checkers, where packages that import late name parts."""
    for each in _tree(path).body:
        yield each
        if isinstance(each, ast.If):
            yield from each.body


def _names(path: Path) -> set[str]:
    found = {each.name for each in _statements(path) if isinstance(each, ast.ClassDef)}
    for each in _statements(path):
        if isinstance(each, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in each.names}
    return found


@cache
def _definition(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """Return the class that a module calls ``name``, and the file where it is, through what the module imports."""
    for each in _statements(path):
        if isinstance(each, ast.ClassDef) and each.name == name:
            return path, each
        if isinstance(each, ast.ImportFrom) and each.module and not each.level:
            for alias in each.names:
                if (alias.asname or alias.name) == name:
                    other = _module(each.module)
                    return None if other is None or other == path else _definition(other, alias.name)
    return None


@cache
def _module(name: str) -> Path | None:
    """Return the file of a module, without importing any of its packages."""
    package, *inside = name.split(".")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return None
    if found is None:
        return None
    if not inside:
        return Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    for folder in found.submodule_search_locations or ():
        place = Path(folder, *inside)
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None
