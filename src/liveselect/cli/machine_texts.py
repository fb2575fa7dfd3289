"""Real texts on any machine with Python: where they are and how each is read.

The interpreter's own library, the installed packages and the system's documentation; nothing comes from a network.
"""

import ast
import gzip
import importlib.metadata
import inspect
import os
import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path

Found = dict[str, Callable[[], str]]
"""For each document that there is, by name, how to read it."""


def reference_prose() -> Iterator[tuple[str, str]]:
    """Yield the topics of the language reference that Python's ``help()`` shows."""
    try:
        from pydoc_data import topics
    except ImportError:
        return
    yield from sorted(topics.topics.items())


def code() -> Found:
    """Find the library's modules; their docstrings are taken out."""
    return {name: partial(_without_docstrings, path) for name, path in _modules().items()}


def tests() -> Found:
    """Find the library's own tests, where they are installed."""
    return {name: partial(_read, path) for name, path in _library().items() if _TESTS & set(name.split("/"))}


def docstrings() -> Found:
    """Find the docstrings of the library's modules, those of a module as one text."""
    return {name: partial(_only_docstrings, path) for name, path in _modules().items()}


def tables() -> Found:
    """Find tables: character encodings, HTML entities, Unicode names."""
    found: Found = {
        name: partial(_read, path)
        for name, path in _library().items()
        if path.parent.name == "encodings" or path.parts[-2:] == ("html", "entities.py")
    }
    return found | {f"unicode/{start:04X}": partial(_unicode_rows, start) for start in range(0, 0x3000, 256)}


def headers() -> Found:
    """Find the interpreter's C headers."""
    folder = Path(sysconfig.get_path("include"))
    return {f"include/{path.relative_to(folder)}": partial(_read, path) for path in folder.rglob("*.h")}


def licences() -> Found:
    """Find the licence texts of the system, the interpreter and the installed packages."""
    found: Found = {path.name: partial(_read, path) for path in Path("/usr/share/common-licenses").glob("*")}
    found |= {path.name: partial(_read, path) for path in Path(sysconfig.get_path("stdlib")).glob("LICENSE*")}
    for folder in _package_folders():
        for path in folder.glob("*.dist-info/**/*"):
            if _LICENCE.match(path.name):
                found[path.relative_to(folder).as_posix()] = partial(_read, path)
    return found


def descriptions() -> Found:
    """Find the descriptions of the installed packages and the short documents of the system's."""
    found: Found = {}
    for folder in _package_folders():
        found |= {path.parent.name: partial(_description, path) for path in folder.glob("*.dist-info/METADATA")}
    folder = Path("/usr/share/doc")
    for pattern in ("*/README*", "*/NEWS*", "*/*.txt", "*/*.txt.gz", "*/*.md", "*/*.md.gz"):
        found |= {str(path.relative_to(folder)): partial(_read, path) for path in folder.glob(pattern)}
    return found


_TESTS = {"test", "tests", "idle_test"}
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)", re.IGNORECASE)


# ---- how it is read --------------------------------------------------------------------------------------------------


@cache
def _library() -> dict[str, Path]:
    """Return the source files of the standard library by their names in it."""
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_THE_LIBRARY]
        paths = [Path(parent, file) for file in files if file.endswith(".py")]
        found |= {f"lib/{path.relative_to(folder).as_posix()}": path for path in paths}
    return found


def _modules() -> dict[str, Path]:
    left_out = _TESTS | {"encodings"}
    return {name: path for name, path in _library().items() if not left_out & set(name.split("/"))}


def _read(path: Path) -> str:
    """Return the text of a file, empty when it is no text or cannot be read."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text


def _without_docstrings(path: Path) -> str:
    text = _read(path)
    lines = text.split("\n")
    for node in _docstrings(text):
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if not lines[first][: node.col_offset].strip():  # else it shares its line with the definition
            lines[first:last] = [""] * (last - first)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _only_docstrings(path: Path) -> str:
    values = (node.value for node in _docstrings(_read(path)))
    return "\n\n".join(inspect.cleandoc(str(value.value)) for value in values if isinstance(value, ast.Constant))


def _unicode_rows(start: int) -> str:
    return "\n".join(
        f"{number:04X};{name};{unicodedata.category(chr(number))};"
        f"{unicodedata.bidirectional(chr(number))};{unicodedata.decomposition(chr(number))}"
        for number in range(start, start + 256)
        if (name := unicodedata.name(chr(number), ""))
    )


def _package_folders() -> list[Path]:
    return sorted({Path(str(package.locate_file(""))) for package in importlib.metadata.distributions()})


def _description(metadata: Path) -> str:
    return _read(metadata).partition("\n\n")[2]  # what comes before are fields


@lru_cache(maxsize=1000)
def _docstrings(text: str) -> list[ast.Expr]:
    """Return the docstring statements of a module."""
    try:
        owners: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [ast.parse(text)]
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[ast.Expr] = []
    while owners:
        owner = owners.pop(0)
        if isinstance(first := owner.body[0] if owner.body else None, ast.Expr) and ast.get_docstring(owner):
            found.append(first)
        owners += [
            node for node in owner.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
    return found
