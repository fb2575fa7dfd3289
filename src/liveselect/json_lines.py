"""Files that are replaced as a whole, and files of JSON lines that are added to and read at the same time."""

import json
import math
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

UNFINISHED = ".tmp"
_NUMBERS = count()

Line = dict[str, Any]
"""The content of a line, as JSON knows it."""


def json_line(kind: str, content: object) -> str:
    """Return a line of the given ``kind`` that holds a dictionary or an object's attributes.

    Numbers that are not finite, which JSON does not know, become null. Half a surrogate pair, which UTF-8 does not
    know, becomes the escape that JSON has for it.
    """
    named = {"kind": kind, **(content if isinstance(content, dict) else vars(content))}
    try:
        line = json.dumps(named, ensure_ascii=False, default=_builtin, allow_nan=False)
    except ValueError:  # looking at every number of a ledger takes longer, and most are finite
        line = json.dumps(_finite(named), ensure_ascii=False, allow_nan=False)
    return line.encode("utf-8", "backslashreplace").decode() + "\n"


def _builtin(value: object) -> object:
    """Return a number of numpy, which settings may be, as one of Python; of other objects their attributes."""
    return value.item() if isinstance(value, np.generic) else vars(value)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value if value is None or isinstance(value, bool | int | str) else _finite(_builtin(value))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once it is complete; an error leaves ``path`` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp, whose files only their owner may read; beside the target, because only that is renamed atomically;
    # numbered, because the handler of a signal may write the same file while it is written
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes of this machine left of files when they were killed in the middle of one."""
    for path in folder.glob(f"*.{socket.gethostname()}.*{UNFINISHED}"):
        process = path.name.split(".")[-3]
        if process.isdecimal() and not _is_running(int(process)):
            with suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _flush_folder(folder: Path) -> None:
    """Let the new name of a file outlive a loss of power, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_lines(path: Path, size: int, lines: Iterable[str]) -> None:
    """Write lines after the first ``size`` bytes of a file; when that fails, raise OSError and leave it as it was."""
    with path.open("r+b") as file:
        file.seek(size)
        try:
            file.write("".join(lines).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size)
            raise


def read_lines(path: Path) -> tuple[list[Line], bool]:
    """Return the lines of a file, and whether an incomplete last one was left out; ValueError for any other content.

    A line is incomplete while it is being written, or because the machine went down at that moment.
    """
    *whole, rest = path.read_bytes().split(b"\n")
    lines = [_parsed(path, number, data) for number, data in enumerate(whole, 1) if data]
    try:
        return [*lines, *([_parsed(path, len(whole) + 1, rest)] if rest else [])], False
    except _NotJSONError:
        if not whole:
            raise
        return lines, True


class _NotJSONError(ValueError):
    """A line that is not JSON, which a last line may be for a moment."""


def _parsed(path: Path, number: int, data: bytes) -> Line:
    try:
        line: Line = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _NotJSONError(f"{path} is not a ledger: it is not text ({error})") from error
    except ValueError as error:
        raise _NotJSONError(
            f"{path} is not a ledger, or it is damaged: line {number} is not JSON ({error}). Ledgers are replaced as a "
            "whole or added to at their end, so look at how this file was copied; the checkpoint of the run holds the "
            "ledger too"
        ) from error
    if not isinstance(line, dict) or "kind" not in line:
        raise ValueError(f"{path} is not a ledger: line {number} has no kind")
    return line
