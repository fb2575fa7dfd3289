"""Parts: some documents in, one file of token ids out.

A part is named by the content of its unit, so a part that is there is right: after an interruption, and also after the
sources were mended, whatever did not change is not encoded again.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from liveselect.datamodules.pools.metadata import value_kinds
from liveselect.datamodules.pools.pool_files import hash_tokens, token_dtype, write_durably
from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.tokenizers import Encoder

UNIT_BYTES = 1 << 20
UNIT_DOCUMENTS = 4096


class Document(NamedTuple):
    """A document before it is encoded; ``done`` counts the bytes of all sources that were read with it."""

    source: str
    id: str
    where: str
    content: Any  # text, or token ids (n,)
    metadata: str  # JSON object
    done: int


@dataclass
class Unit:
    """Documents of one source that are encoded together."""

    source: str
    documents: list[Document] = field(default_factory=list)
    size: int = 0

    def digest(self) -> str:
        """Return a hash of everything that enters the part."""
        digest = hashlib.blake2b(self.source.encode(), digest_size=12)
        for document in self.documents:
            data = _content_bytes(document.content)
            head = json.dumps([document.id, len(data), document.metadata])
            digest.update(head.encode() + data)
        return digest.hexdigest()


def _content_bytes(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode()
    try:
        return np.asarray(content, dtype=np.int64).tobytes()
    except (ValueError, TypeError, OverflowError):  # not ids; the encoding says so
        return repr(content).encode()


def units_of(documents: Iterable[Document], unit_bytes: int) -> Iterator[Unit]:
    """Gather documents into units of at least ``unit_bytes`` bytes of text, or ids at four bytes each."""
    unit = None
    for document in documents:
        if unit is not None and unit.source != document.source:
            yield unit
            unit = None
        unit = unit or Unit(document.source)
        unit.documents.append(document)
        unit.size += len(document.content) * (1 if isinstance(document.content, str) else 4)
        if unit.size >= unit_bytes or len(unit.documents) >= UNIT_DOCUMENTS:
            yield unit
            unit = None
    if unit is not None:
        yield unit


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens.

    Attributes:
        tokenizer: folder of the tokenizer, or None when the documents are token ids.
        vocab_size: every id is below it.
        separator: the id after each document, or None.
    """

    tokenizer: Path | None
    vocab_size: int
    separator: int | None

    def key(self) -> str:
        """Return a hash of everything that decides which tokens come out."""
        files = sorted(self.tokenizer.iterdir()) if self.tokenizer else []
        files = [file for file in files if file.name == "tokenizer.json"] or files
        content = [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        text = json.dumps([content, self.vocab_size, self.separator])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def encode_unit(unit: Unit, encoding: Encoding, encoder: Encoder | None) -> pa.Table:
    """Return the part of a unit: a row for each document that is not empty, and its facts in the schema.

    The columns are ``id``, ``source``, ``tokens``, ``hash``, ``metadata`` (JSON), and ``ids`` with the separator.
    """
    if encoder is not None:
        arrays = encoder([document.content for document in unit.documents])
    else:
        arrays = [_checked_ids(document, encoding.vocab_size) for document in unit.documents]
    tail = [] if encoding.separator is None else [encoding.separator]
    if tail and encoder is None:  # ready ids may come with their separator
        arrays = [array[:-1] if len(array) and array[-1] == tail[0] else array for array in arrays]
    kept = [(document, array) for document, array in zip(unit.documents, arrays, strict=True) if len(array)]
    metadata = [json.loads(document.metadata) for document, _ in kept]
    lengths = np.array([len(array) + len(tail) for _, array in kept], dtype=np.int64)
    stream = np.concatenate([part for _, array in kept for part in (array, tail)] or [[]])
    flat = pa.array(stream.astype(token_dtype(encoding.vocab_size)))
    facts = {
        "tokens": int(lengths.sum()),
        "documents": len(kept),
        "empty": len(unit.documents) - len(kept),
        "kinds": value_kinds(metadata),
    }
    columns = {
        "id": [document.id for document, _ in kept],
        "source": [unit.source] * len(kept),
        "tokens": lengths - len(tail),
        "hash": np.array([hash_tokens(array) for _, array in kept], dtype=np.uint64),
        "metadata": pa.array([document.metadata for document, _ in kept], pa.large_string()),
        "ids": pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]), flat),
    }
    return pa.table(columns).replace_schema_metadata({"facts": json.dumps(facts)})


def _checked_ids(document: Document, vocab_size: int) -> np.ndarray:
    try:
        ids = np.asarray(document.content)
    except ValueError:  # lists of unequal lengths
        ids = np.empty(1, dtype=object)
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
        raise DataError(
            f"{document.where}: expected a flat list of integer token ids, got {str(document.content)[:60]}"
        )
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise DataError(
            f"{document.where}: expected token ids from 0 to {vocab_size - 1}, got {wrong}: name the tokenizer that "
            "made them (--tokenizer), or pass a larger --vocab-size"
        )
    return ids.astype(np.int64)


def read_part(path: Path) -> pa.Table:
    """Return a part file as a table that lies in a memory map."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def part_facts(path: Path) -> dict[str, Any]:
    """Return ``tokens`` (separators included), ``documents``, ``empty`` and the ``kinds`` of metadata of a part."""
    with pa.memory_map(str(path)) as file:
        return json.loads(pa.ipc.open_file(file).schema.metadata[b"facts"])


def write_part(path: Path, unit: Unit, encoding: Encoding, encoder: Encoder | None) -> None:
    """Encode a unit and write its part durably."""
    table = encode_unit(unit, encoding, encoder)
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as file:
        file.write_table(table)
    write_durably(path, buffer.getvalue())
