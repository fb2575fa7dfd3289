"""Parts: the files of token ids that the documents of a unit become.

A part is named by the content of its unit, so an existing part is always right: after an interruption, and also after
the sources were repaired, unchanged units are not encoded again.
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa

from liveselect.datamodules.pools.metadata import metadata_array, value_kinds
from liveselect.datamodules.pools.pool_files import hash_tokens, token_dtype, write_durably
from liveselect.datamodules.pools.readers import RecordError
from liveselect.datamodules.pools.tokenizers import Encoder

UNIT_BYTES = 1 << 20  # an interruption loses the work on this much for each worker
PART_VERSION = 2  # of what a part holds for the same documents: others are made again
UNIT_DOCUMENTS = 4096  # short documents have overheads of their own

Content = str | list[int] | np.ndarray
"""Text, or token ids ``(n,)``."""


class Document(NamedTuple):
    """A document before it is encoded; ``done`` counts the bytes of all sources that were read with it."""

    source: str
    id: str
    where: str
    content: Content
    metadata: str  # JSON object
    done: int


@dataclass
class Unit:
    """Documents of one source that are encoded together."""

    source: str
    documents: list[Document] = field(default_factory=list)
    size: int = 0

    def digest(self) -> str:
        """Return a hash of everything that the part is made of."""
        digest = hashlib.blake2b(self.source.encode(), digest_size=12)
        for document in self.documents:
            data = _content_bytes(document.content)
            head = json.dumps([document.id, len(data), document.metadata])
            digest.update(head.encode() + data)
        return digest.hexdigest()


def _content_bytes(content: Content) -> bytes:
    if isinstance(content, str):
        return content.encode()
    try:
        return np.asarray(content, dtype=np.int64).tobytes()
    except (ValueError, TypeError, OverflowError):  # not ids: encode_unit raises an error that names the document
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
        tokenizer_folder: folder of the tokenizer, or None without one.
        vocab_size: every id is below it.
        separator: the id after each document, or None.
        ready: whether the documents are token ids already.
        padding: the id that ready ids may be padded with on either side, or None.
        skip_invalid: whether documents whose ids are impossible are left out.
        key: hash of everything that determines the tokens.
    """

    tokenizer_folder: Path | None
    vocab_size: int
    separator: int | None
    ready: bool
    key: str
    padding: int | None = None
    skip_invalid: bool = False


def encoding_of(
    tokenizer_folder: Path | None,
    vocab_size: int,
    separator: int | None,
    ready: bool,
    padding: int | None = None,
    skip_invalid: bool = False,
) -> Encoding:
    """Return an encoding with its key; ``padding`` and ``skip_invalid`` matter for ready ids alone."""
    files = [] if tokenizer_folder is None or ready else sorted(tokenizer_folder.iterdir())
    files = [file for file in files if file.name == "tokenizer.json"] or files
    content = [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    text = json.dumps([PART_VERSION, content, vocab_size, separator, *([padding, skip_invalid] if ready else [])])
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Encoding(tokenizer_folder, vocab_size, separator, ready, key, padding, skip_invalid)


class WrittenPart(NamedTuple):
    """A part file.

    Attributes:
        path: the file.
        size: its bytes.
        done: bytes of all sources read up to its end.
        existed: whether an earlier run wrote it.
        tokens: tokens of the part, separators included.
        counts: numbers of documents left out or repaired, by reason.
        kinds: the types of the metadata, as :func:`value_kinds` finds them.
    """

    path: Path
    size: int
    done: int
    existed: bool
    tokens: int
    counts: dict[str, int]
    kinds: dict[str, list[str]]


def write_part(folder: Path, unit: Unit, encoding: Encoding) -> WrittenPart:
    """Encode a unit and write its part durably, unless the part exists."""
    path = folder / f"{unit.digest()}.arrow"
    existed = path.exists()
    if not existed:
        table = encode_unit(unit, encoding)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
        write_durably(path, sink.getvalue())
    with pa.memory_map(str(path)) as source:
        facts = json.loads(pa.ipc.open_file(source).schema.metadata[b"facts"])
    size, done = path.stat().st_size, unit.documents[-1].done
    return WrittenPart(path, size, done, existed, facts["tokens"], facts["counts"], facts["kinds"])


def start_worker() -> None:
    """Make this process a worker: it leaves Ctrl-C to its parent, and ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(os.getppid(),), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:  # joblib's workers would wait five more minutes for work
        time.sleep(0.5)
    os._exit(1)


def read_part(path: Path, kind: pa.StructType | None) -> tuple[np.ndarray, pa.Table]:
    """Return the stream ``(n,)`` of a part, from a memory map, and its documents with metadata of type ``kind``."""
    part = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    ids = part["ids"].combine_chunks()
    starts = pa.array(ids.offsets.to_numpy()[:-1])
    documents = part.select(["id", "source", "tokens", "hash"]).append_column("start", starts)
    if kind is not None:
        documents = documents.append_column("metadata", metadata_array(part["metadata"], kind))
    return ids.flatten().to_numpy(), documents


@lru_cache(maxsize=1)
def _encoder(encoding: Encoding) -> Encoder | None:
    return None if encoding.tokenizer_folder is None or encoding.ready else Encoder(encoding.tokenizer_folder)


def encode_unit(unit: Unit, encoding: Encoding) -> pa.Table:
    """Return the part of a unit: a row for each document that is not empty, and its facts in the schema.

    The columns are ``id``, ``source``, ``tokens``, ``hash``, ``metadata`` (JSON), and ``ids`` with the separator.
    """
    encoder, counts = _encoder(encoding), Counter[str]()
    arrays: list[np.ndarray | None]
    tail = [] if encoding.separator is None else [encoding.separator]
    if encoder is not None:
        arrays = list(encoder([cast("str", document.content) for document in unit.documents]))
    else:
        arrays = [_ready_ids(document, encoding, counts) for document in unit.documents]
    kept = [
        (document, array)
        for document, array in zip(unit.documents, arrays, strict=True)
        if array is not None and len(array)
    ]
    counts["empty"] = sum(array is not None and not len(array) for array in arrays)
    lengths = np.array([len(array) + len(tail) for _, array in kept], dtype=np.int64)
    stream = np.concatenate([part for _, array in kept for part in (array, tail)] or [[]])
    flat = pa.array(stream.astype(token_dtype(encoding.vocab_size)))
    facts = {
        "tokens": int(lengths.sum()),
        "counts": counts,
        "kinds": value_kinds(json.loads(document.metadata) for document, _ in kept),
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


def _ready_ids(document: Document, encoding: Encoding, counts: Counter[str]) -> np.ndarray | None:
    """Return ids without padding, and without the separators that they may come with; None to leave them out."""
    try:
        ids = _checked_ids(document, encoding.vocab_size)
    except RecordError:
        if not encoding.skip_invalid:
            raise
        counts["invalid"] += 1
        return None
    if encoding.padding is not None:
        whole = len(ids)
        ids = _trimmed(_trimmed(ids, encoding.padding)[::-1], encoding.padding)[::-1]
        counts["padded"] += len(ids) < whole
    return ids if encoding.separator is None else _trimmed(ids, encoding.separator)


def _trimmed(ids: np.ndarray, token: int) -> np.ndarray:
    """Return ``ids (n,)`` without the run of a token at their end."""
    others = np.flatnonzero(ids != token)
    return ids[: others[-1] + 1 if len(others) else 0]


def _checked_ids(document: Document, vocab_size: int) -> np.ndarray:
    try:
        ids = np.asarray(document.content)
    except ValueError:  # lists of unequal lengths
        ids = np.empty(1, dtype=object)
    if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
        raise RecordError(
            f"{document.where}: expected a flat list of integer token ids, got {str(document.content)[:60]}"
        )
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise RecordError(
            f"{document.where}: expected token ids from 0 to {vocab_size - 1}, got {wrong}: name the tokenizer that "
            "made them (--tokenizer), or pass a larger --vocab-size"
        )
    return ids.astype(np.int64)
