"""Whether files still hold what was written: sizes and hashes, of all of a file or of blocks spread over a large one.

An entry of a manifest is ``{"bytes": size, "blake2b": hash}``. That of a large file also has ``"spread"``: the hashes
of blocks of ``BLOCK_BYTES``, evenly spread over it, the first and the last among them.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

WHOLE_BYTES = 4 << 30
"""Files up to this size are read in full, which takes seconds; of larger ones the spread blocks are, where known."""

BLOCK_BYTES, BLOCKS = 1 << 18, 4096
SLOW_BYTES = 2 << 30  # reading more than this is worth a line
PIECE_BYTES = 1 << 22

Entry = Mapping[str, Any]
"""What a manifest says of a file, as JSON."""


def hash_file(path: Path) -> str:
    """Return the BLAKE2b hash of a file, read in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def entry_of(path: Path, whole: str | None = None) -> dict[str, Any]:
    """Return the entry of a file; ``whole`` is its hash where that is known already."""
    size = path.stat().st_size
    entry: dict[str, Any] = {"bytes": size, "blake2b": whole or hash_file(path)}
    return entry | ({"spread": [found for _, found in _spread(path, size)]} if size > WHOLE_BYTES else {})


def _spread(path: Path, size: int) -> Iterator[tuple[int, str]]:
    """Yield where each of the spread blocks of a file of ``size`` bytes starts, and its hash."""
    with path.open("rb", buffering=0) as file:
        for start in np.linspace(0, max(0, size - BLOCK_BYTES), BLOCKS).astype(np.int64).tolist():
            file.seek(start)
            yield start, hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=8).hexdigest()


def check_sizes(folder: Path, files: Mapping[str, Entry], remedy: str) -> None:
    """Raise ValueError unless every file is there with its size; ``remedy`` says what to do."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks its file {name}: {remedy}")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes where the manifest says {entry['bytes']}: it was changed or "
                f"copied in part; {remedy}"
            )


def check_content(
    folder: Path, files: Mapping[str, Entry], remedy: str, say: Callable[[str], None] = lambda line: None
) -> None:
    """Raise ValueError unless every file has its size and content, in full or in its spread blocks.

    Args:
        folder: of the files.
        files: the entries by name.
        remedy: what to do, for messages.
        say: shows a line before some seconds of reading.
    """
    check_sizes(folder, files, remedy)
    amount = sum(_amount(entry) for entry in files.values())
    if amount > SLOW_BYTES:
        say(f"reading {amount / 1e9:.1f} GB of {folder}, about 1 GB a second, to see that it is unchanged")
    for name, entry in files.items():
        path = folder / name
        if _amount(entry) == entry["bytes"]:
            if hash_file(path) != entry["blake2b"]:
                raise ValueError(f"the content of {path} is not what the manifest says: {remedy}")
            continue
        for (start, found), expected in zip(_spread(path, entry["bytes"]), entry["spread"], strict=True):
            if found != expected:
                raise ValueError(
                    f"the content of {path} is not what the manifest says, in its bytes {start} to "
                    f"{start + BLOCK_BYTES}: {remedy}"
                )


def _amount(entry: Entry) -> int:
    """Return the bytes of a file that are read."""
    size = int(entry["bytes"])
    return BLOCKS * BLOCK_BYTES if size > WHOLE_BYTES and len(entry.get("spread", ())) == BLOCKS else size
