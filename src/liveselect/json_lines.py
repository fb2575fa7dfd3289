"""Files of JSON lines that are written whole, added to at their end, and read while somebody adds to them."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def json_line(kind: str, content: Any) -> str:
    """Return a line of the given ``kind`` that holds a dictionary or an object's attributes."""
    named = content if isinstance(content, dict) else vars(content)
    return json.dumps({"kind": kind, **named}, ensure_ascii=False, default=vars) + "\n"


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a file whole or not at all; raise OSError when the disk does not take it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # not mkstemp: others may read it as the umask says
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def add(path: Path, size: int, lines: Iterable[str]) -> None:
    """Write lines behind the first ``size`` bytes of a file; raise OSError, the file as it was, when that fails."""
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


def read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the lines of a file, and whether a last one without an end was left out.

    Such a line is being written just now, or was when the machine went down.

    Raises:
        ValueError: a line is no object with a kind.
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
    """A line that could not be read."""


def _parsed(path: Path, number: int, data: bytes) -> dict[str, Any]:
    try:
        line = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _NotJSONError(f"{path} is not a ledger: it is no text ({error})") from error
    except ValueError as error:
        raise _NotJSONError(
            f"{path} is not a ledger, or it is damaged: line {number} is not JSON ({error}). Ledgers are replaced as a "
            "whole or added to at their end, so look at how this file was copied; the checkpoint of the run holds the "
            "ledger too"
        ) from error
    if not isinstance(line, dict) or "kind" not in line:
        raise ValueError(f"{path} is not a ledger: line {number} has no kind")
    return line
