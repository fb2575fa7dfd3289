"""The files of a pool: their content, how they are written, and the fingerprint of a pool.

``pool.json``          the manifest: shape, vocabulary, sources, settings, the size and hashes of every other file
``tokens.bin``         the blocks, ``(rows, T)`` little-endian uint16 or uint32, row after row
``documents.parquet``  one row per document, in the order of the stream: ``id``, ``source``, ``start``, ``tokens``,
                       ``hash``, and ``metadata``, a struct with the columns that came with the text
``tokenizer/``         what ``AutoTokenizer.from_pretrained`` reads

Documents are joined into one stream, each followed by the end-of-text token, and the stream is cut every ``T`` tokens.
Which documents a block holds follows from their ``start`` alone: nothing else records it.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from liveselect.datamodules.pools.integrity import entry_of, hash_file

REMEDY = "copy it again or prepare the pool again"
FORMAT = "liveselect-pool"
VERSION = 1
MANIFEST, TOKENS, DOCUMENTS, TOKENIZER = "pool.json", "tokens.bin", "documents.parquet", "tokenizer"
PARTIAL, LOCK = ".partial", "lock"  # the folder in which a pool is made, and the file that the making process locks
ROW_GROUP = 16384  # documents; showing the metadata of a single one decodes this many

JsonObject = dict[str, Any]
"""A JSON object, such as the manifest of a pool."""

DOCUMENT_FIELDS = (
    pa.field("id", pa.string()),
    pa.field("source", pa.string()),
    pa.field("start", pa.int64()),
    pa.field("tokens", pa.int64()),
    pa.field("hash", pa.uint64()),
)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest type on disk that holds every id below ``vocab_size``."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def hash_tokens(ids: ArrayLike) -> int:
    """Return the 64-bit hash of a token sequence ``(n,)``, which does not depend on the integer type of the ids."""
    data = np.ascontiguousarray(ids, dtype="<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system supports it."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the whole file or none."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def pool_fingerprint(manifest: JsonObject) -> str:
    """Return a hash of a pool's content: its tokens, their shape and meaning, and its documents.

    It does not depend on the place of the pool, the compression of its files or the number of workers.
    """
    keys = ("version", "rows", "block_size", "vocab_size", "eos_id", "sources", "documents_digest")
    content = {key: manifest[key] for key in keys} | {"tokens": manifest["files"][TOKENS]["blake2b"]}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_manifest(path: Path) -> JsonObject:
    """Return the manifest of a pool.

    Raises:
        FileNotFoundError: ``path`` holds no finished pool.
        ValueError: the manifest was changed, or has another version.
    """
    file = path / MANIFEST
    if not file.is_file():
        partial = path.with_name(path.name + PARTIAL)
        hint = f"; {partial} is unfinished: run the same `liveselect prepare` again" if partial.exists() else ""
        raise FileNotFoundError(f"expected a pool made by `liveselect prepare`, found no {file}{hint}")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not the manifest of a pool ({error}): prepare the pool again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"expected {file} to say format {FORMAT!r} version {VERSION}: prepare the pool again")
    try:
        is_whole = pool_fingerprint(manifest) == manifest["fingerprint"] and _fits_its_tokens(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):  # a name or a kind of value was changed
        is_whole = False
    if not is_whole:
        raise ValueError(f"{file} was changed after the pool was made: prepare the pool again")
    return manifest


def _fits_its_tokens(manifest: JsonObject) -> bool:
    """Return whether the manifest gives the file of tokens the type and size that follow from its other entries."""
    dtype = token_dtype(manifest["vocab_size"])
    size = manifest["rows"] * manifest["block_size"] * dtype.itemsize
    sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items() if str(entry["blake2b"])}
    return bool(manifest["dtype"] == dtype.name and sizes[TOKENS] == size and DOCUMENTS in sizes)


class PoolWriter:
    """Writes the files of a pool from pieces of the stream that arrive in order; holds less than a block of tokens.

    Tokens that do not fill a last block are left out, and so are documents that lie entirely among them.

    Args:
        folder: an existing empty folder.
        block_size: T, tokens of a block.
        vocab_size: every token id is below it.
        eos_id: the token that follows each document, or None.
        sources: names of the sources in the order of their group codes.
        metadata: type of the metadata, or None when the documents carry none.
    """

    def __init__(
        self,
        folder: Path,
        block_size: int,
        vocab_size: int,
        eos_id: int | None,
        sources: Sequence[str],
        metadata: pa.StructType | None = None,
    ) -> None:
        self.folder, self.block_size, self.vocab_size, self.eos_id = folder, block_size, vocab_size, eos_id
        self.stream_tokens = 0
        self._dtype = token_dtype(vocab_size)
        self._counts: dict[str, JsonObject] = {name: {"name": name, "documents": 0, "tokens": 0} for name in sources}
        self._rest = np.empty(0, dtype=self._dtype)
        self._written = 0
        self._documents_digest = hashlib.blake2b(digest_size=16)
        self._schema = pa.schema([*DOCUMENT_FIELDS, *([pa.field("metadata", metadata)] if metadata else [])])
        self._waiting = self._schema.empty_table()
        self._file = (folder / TOKENS).open("wb")
        self._tokens_digest = hashlib.blake2b(digest_size=16)
        self._parquet = pq.ParquetWriter(folder / DOCUMENTS, self._schema, compression="zstd")

    def append(self, stream: np.ndarray, documents: pa.Table) -> None:
        """Append a piece of the stream ``(n,)``, separators included, and the documents that start in it.

        ``documents`` has the columns of the schema; its ``start`` counts from the beginning of the piece.
        """
        if len(stream) and int(stream.max()) >= self.vocab_size:
            raise ValueError(f"expected token ids below vocab_size={self.vocab_size}, got {int(stream.max())}")
        start = pa.array(documents["start"].to_numpy() + self.stream_tokens)
        documents = documents.set_column(documents.schema.get_field_index("start"), "start", start)
        self.stream_tokens += len(stream)
        self._waiting = pa.concat_tables([self._waiting, documents.select(self._schema.names).cast(self._schema)])

        stream = np.concatenate([self._rest, stream.astype(self._dtype, copy=False)])
        whole = len(stream) - len(stream) % self.block_size
        data = stream[:whole].tobytes()
        self._file.write(data)
        self._tokens_digest.update(data)
        self._rest = stream[whole:].copy()
        self._written += whole
        self._write_documents()

    def _write_documents(self, all_of_them: bool = False) -> None:
        """Write the documents that start in written blocks, in row groups of equal size."""
        ready = int(np.searchsorted(self._waiting["start"].to_numpy(), self._written))
        size = ready if all_of_them else ready - ready % ROW_GROUP
        for first in range(0, size, ROW_GROUP):
            group = self._waiting.slice(first, min(ROW_GROUP, size - first)).combine_chunks()
            self._parquet.write_table(group, row_group_size=ROW_GROUP)
            sources = group["source"].to_pylist()
            for name in ("start", "tokens", "hash"):
                self._documents_digest.update(np.ascontiguousarray(group[name].to_numpy()).tobytes())
            self._documents_digest.update(json.dumps([group["id"].to_pylist(), sources]).encode())
            for source, tokens in zip(sources, group["tokens"].to_pylist(), strict=True):
                self._counts[source]["documents"] += 1
                self._counts[source]["tokens"] += tokens
        self._waiting = self._waiting.slice(size)

    def finish(self, settings: Mapping[str, object], counts: Mapping[str, int] | None = None) -> None:
        """Close the files and write the manifest, which makes them a pool.

        Args:
            settings: how the pool was made; recorded in the manifest.
            counts: numbers of documents left out, by reason; recorded in the manifest.
        """
        if not self._written:
            raise ValueError(
                f"expected at least one block of {self.block_size} tokens, got {self.stream_tokens} tokens in all: "
                "use a smaller block size or more text"
            )
        self._write_documents(all_of_them=True)
        self.close()
        manifest: JsonObject = {
            "format": FORMAT,
            "version": VERSION,
            "rows": self._written // self.block_size,
            "block_size": self.block_size,
            "dtype": self._dtype.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "sources": list(self._counts.values()),
            "left_out_tokens": len(self._rest),
            "documents_digest": self._documents_digest.hexdigest(),
            "counts": dict(counts or {}),
            "settings": dict(settings),
            "files": {TOKENS: entry_of(self.folder / TOKENS, self._tokens_digest.hexdigest())},
        }
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != TOKENS):
            manifest["files"][path.relative_to(self.folder).as_posix()] = entry_of(path, hash_file(path))
        manifest["fingerprint"] = pool_fingerprint(manifest)
        write_durably(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    def close(self) -> None:
        """Close the files; without :meth:`finish` they are no pool."""
        self._file.close()
        self._parquet.close()
