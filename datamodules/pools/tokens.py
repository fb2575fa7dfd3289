"""The token store: a finished pool folder, opened for reading."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from liveselect import distributed
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.datamodules.pools.integrity import check_content, check_sizes
from liveselect.datamodules.pools.pool_files import (
    DOCUMENTS,
    REMEDY,
    ROW_GROUP,
    TOKENIZER,
    TOKENS,
    JsonObject,
    PoolWriter,
    hash_tokens,
    read_manifest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenStore:
    """Token blocks on disk, read through a memory map; row ``i`` is candidate ``i``.

    It is a map-style dataset; every process that unpickles it opens the files again.

    Args:
        path: folder made by ``liveselect prepare`` or :func:`write_store`.
        verify: compare the content of the files with the manifest, as :meth:`verify` does; by default only their sizes.

    Attributes:
        rows: number of blocks.
        block_size: T, tokens of a block.
        vocab_size: the largest id that the tokenizer can make, plus one.
        eos_id: the token that follows each document, or None.
        fingerprint: hash of the content.
        group_names: the sources, in the order of their group codes.

    Raises:
        FileNotFoundError: ``path`` holds no finished pool.
        ValueError: the files do not match the manifest.
    """

    def __init__(self, path: str | Path, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        check_sizes(self.path, self.manifest["files"], REMEDY)
        self.rows: int = self.manifest["rows"]
        self.block_size: int = self.manifest["block_size"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.eos_id: int | None = self.manifest["eos_id"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self.group_names: tuple[str, ...] = tuple(source["name"] for source in self.manifest["sources"])
        if verify:
            self.verify()

    def verify(self) -> None:
        """Raise ValueError, which names the file, unless the files hold what the manifest says.

        Files up to 4 GiB are read in full, and of larger ones 4096 blocks that are evenly spread; what the manifest of
        an older pool has no blocks of is read in full. Whoever trains on a pool, scores or clusters it calls this.
        """
        display = PrepareDisplay(quiet=distributed.rank() > 0)
        check_content(self.path, self.manifest["files"], REMEDY, display.say)

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, rows={self.rows}, block_size={self.block_size})"

    def __getstate__(self) -> dict[str, object]:
        lazy = {name for name, value in vars(type(self)).items() if isinstance(value, cached_property)}
        return {name: value for name, value in vars(self).items() if name not in lazy}

    @property
    def tokenizer_path(self) -> Path | None:
        """Folder for ``AutoTokenizer.from_pretrained``, or None when the pool was made from ready ids."""
        path = self.path / TOKENIZER
        return path if path.is_dir() else None

    @cached_property
    def _tokens(self) -> np.ndarray:
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        return np.memmap(self.path / TOKENS, dtype=dtype, mode="r", shape=(self.rows, self.block_size))

    @cached_property
    def _parquet(self) -> pq.ParquetFile:
        with self._naming_documents():
            return pq.ParquetFile(self.path / DOCUMENTS)

    def _column(self, name: str) -> pa.ChunkedArray:
        with self._naming_documents():
            return self._parquet.read([name])[name]

    @contextmanager
    def _naming_documents(self) -> Iterator[None]:
        """Name the file of the documents where it cannot be read."""
        try:
            yield
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{self.path / DOCUMENTS} is damaged ({error}): {REMEDY}") from error

    @cached_property
    def _starts(self) -> np.ndarray:
        return self._column("start").to_numpy()

    @cached_property
    def document_tokens(self) -> np.ndarray:
        """``(documents,)`` int64, tokens of each document; the end of the pool may cut the last one."""
        return self._column("tokens").to_numpy()

    @cached_property
    def document_hashes(self) -> np.ndarray:
        """``(documents,)`` uint64, the :func:`hash_tokens` of each document's ids, without the separator."""
        return self._column("hash").to_numpy()

    @cached_property
    def groups(self) -> Tensor:
        """``(rows,)`` int32, the source that most tokens of each block come from."""
        codes = pc.index_in(self._column("source"), value_set=pa.array(self.group_names)).to_numpy()
        return torch.from_numpy(_majority(self._starts, codes.astype(np.int64), self.rows, self.block_size))

    def documents_of_rows(self) -> Tensor:
        """Return the place of the document that most tokens of each block come from, ``(rows,)`` int64."""
        starts = self._starts
        return torch.from_numpy(_majority(starts, np.arange(len(starts)), self.rows, self.block_size)).long()

    def read(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Return the blocks ``ids (n,)`` as ``(n, T)`` int64."""
        rows = np.asarray(ids, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"expected row ids in 0..{self.rows - 1}, got {rows.min()}..{rows.max()}")
        tokens = self._tokens[rows].astype(np.int64)
        if rows.size and tokens.max() >= self.vocab_size:  # a model would fail at its embedding, without a name
            row = rows[int((tokens >= self.vocab_size).any(axis=1).argmax())]
            raise ValueError(
                f"{self.path / TOKENS}, row {row}: token id {tokens.max()} is beyond the vocabulary of "
                f"{self.vocab_size}: the file was damaged; {REMEDY}"
            )
        return torch.from_numpy(tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        ids = torch.as_tensor(indices, dtype=torch.int64)
        return [{"id": i, "input_ids": block} for i, block in zip(ids, self.read(ids), strict=True)]

    def documents_of(self, row: int) -> list[JsonObject]:
        """Return the documents that a block holds, in their order.

        Each is a dict of ``id``, ``source``, ``start`` and ``end`` (its tokens are ``block[start:end]``), ``offset``
        (the number of its tokens in earlier blocks) and ``metadata``, the columns that came with the text.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"expected a row id in 0..{self.rows - 1}, got {row}")
        begin, end = row * self.block_size, (row + 1) * self.block_size
        first = max(int(np.searchsorted(self._starts, begin, side="right")) - 1, 0)
        last = int(np.searchsorted(self._starts, end, side="left"))
        found = []
        for index in range(first, last):
            start = int(self._starts[index])
            stop = start + int(self.document_tokens[index])
            if stop <= begin:  # only its separator lies here
                continue
            span = {"start": max(start, begin) - begin, "end": min(stop, end) - begin, "offset": max(begin - start, 0)}
            found.append({**self.document(index), **span})
        return found

    def document(self, index: int) -> JsonObject:
        """Return ``id``, ``source`` and ``metadata`` of the document at a position of ``documents.parquet``."""
        group, position = divmod(index, ROW_GROUP)
        with self._naming_documents():
            row = self._row_group(group).slice(position, 1).to_pylist()[0]
        return {"id": row["id"], "source": row["source"], "metadata": row.get("metadata") or {}}

    @cached_property
    def _row_group(self) -> Callable[[int], pa.Table]:
        """Reads a row group, and keeps the last one: callers ask for neighbouring documents."""
        return lru_cache(maxsize=1)(self._parquet.read_row_group)

    def rows_of(self, document_id: str) -> range:
        """Return the blocks that hold tokens of a document.

        Raises:
            KeyError: no document has this id, or several have.
        """
        (matches,) = np.nonzero(pc.equal(self._column("id"), document_id).to_numpy())
        if len(matches) != 1:
            raise KeyError(f"expected one document with the id {document_id!r}, found {len(matches)}")
        start = int(self._starts[matches[0]])
        last = start + int(self.document_tokens[matches[0]]) - 1
        return range(start // self.block_size, min(last // self.block_size + 1, self.rows))


def _majority(starts: np.ndarray, codes: np.ndarray, rows: int, block_size: int) -> np.ndarray:
    """Return the most frequent code of each block ``(rows,)`` int32; of equally frequent ones the smallest.

    ``starts (d,)`` are the stream positions where the documents with ``codes (d,)`` begin; a separator counts for the
    document before it. The stream is cut at every document and every block, and the lengths of the pieces are summed.
    """
    cuts = np.unique(np.concatenate([starts, np.arange(rows, dtype=np.int64) * block_size]))
    lengths = np.diff(cuts, append=rows * block_size)
    row = cuts // block_size
    code = codes[np.searchsorted(starts, cuts, side="right") - 1]
    width = int(codes.max()) + 1
    keys, piece = np.unique(row * width + code, return_inverse=True)
    totals = np.bincount(piece, weights=lengths).astype(np.int64)
    order = np.lexsort((-keys, totals, keys // width))  # within a row: the largest total last, the smaller code later
    last = np.flatnonzero(np.diff(keys[order] // width, append=-1))
    return (keys[order][last] % width).astype(np.int32)


def write_store(
    path: str | Path,
    documents: Sequence[ArrayLike] | np.ndarray,
    *,
    block_size: int,
    vocab_size: int,
    eos_id: int | None = None,
    sources: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    metadata: Sequence[Mapping[str, object]] | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> TokenStore:
    """Make a pool from documents in memory and open it; ready blocks ``(rows, T)`` are documents without ``eos_id``.

    Args:
        path: folder to make; it must not exist.
        documents: token ids of each document, or an array ``(rows, T)``.
        block_size: T, tokens of a block.
        vocab_size: every token id is below it.
        eos_id: appended to each document, or None.
        sources: source name of each document.
        ids: id of each document; their positions by default.
        metadata: further columns of each document.
        tokenizer: saved in the pool by its ``save_pretrained``.
    """
    if block_size < 2:
        raise ValueError(f"expected blocks of at least 2 tokens, got block_size={block_size}: one has none to predict")
    path = Path(path)
    path.mkdir(parents=True)
    try:
        names = [str(name) for name in sources] if sources is not None else ["pool"] * len(documents)
        columns, stream = _columns(documents, eos_id)
        columns |= {"id": [str(i) for i in (ids if ids is not None else range(len(documents)))], "source": names}
        if metadata is not None:
            columns["metadata"] = [dict(entry) for entry in metadata]
        table = pa.table(columns)
        kind = table.schema.field("metadata").type if metadata is not None else None
        writer = PoolWriter(path, block_size, vocab_size, eos_id, list(dict.fromkeys(names)), kind)
        try:
            writer.append(stream, table)
            if tokenizer is not None:
                tokenizer.save_pretrained(path / TOKENIZER)
            writer.finish(settings={"made_by": "write_store"})
        finally:
            writer.close()
    except BaseException:
        shutil.rmtree(path)
        raise
    return TokenStore(path)


def _columns(
    documents: Sequence[ArrayLike] | np.ndarray, eos_id: int | None
) -> tuple[dict[str, Sequence[object] | np.ndarray], np.ndarray]:
    """Return start, tokens and hash of each document, and the stream ``(n,)`` int64 that joins them."""
    arrays = [np.asarray(document, dtype=np.int64) for document in documents]
    if any(array.ndim != 1 or not array.size or array.min() < 0 for array in arrays):
        raise ValueError("expected every document as a sequence of at least one token id, none of them negative")
    separator = np.empty(0, np.int64) if eos_id is None else np.array([eos_id])
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    starts = np.cumsum(lengths + len(separator)) - lengths - len(separator)
    stream = np.concatenate([part for array in arrays for part in (array, separator)] or [separator])
    hashes = np.array([hash_tokens(array) for array in arrays], dtype=np.uint64)
    return {"start": starts, "tokens": lengths, "hash": hashes}, stream
