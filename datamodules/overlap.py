"""A search for the reference set inside the pool: exact, and fast enough for the start of every run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from liveselect.datamodules.batching import Item
from liveselect.datamodules.rows.collating import unpadded
from liveselect.datamodules.rows.rows import Rows
from liveselect.grammar import IGNORE_INDEX, Batch

PASSAGE = 32  # tokens of a passage; long enough not to be shared by chance or by idiom
MIN_DISTINCT_TOKENS = 8  # in a passage: rows of dashes and numbers are shared by texts of all kinds
PIECE_TOKENS = 1 << 16  # hashed at once, so that they stay in cache
STORE_TOKENS, DATASET_TOKENS = 1 << 28, 1 << 24  # larger pools are not scanned: it would take minutes

_BASE = 0x9E3779B97F4A7C15  # odd, so that no token is forgotten; hashes are polynomials in it, modulo 2^64
_TABLE_BITS = 20  # a table of one megabyte, which fits in cache


class Overlap(NamedTuple):
    """Text that pool and reference set share.

    Attributes:
        record: position of the reference record.
        candidate: the candidate that holds the passage, None for a document of the pool.
        tokens: the first shared passage, empty for a document.
        found: number of passages of the record that are in the pool.
        looked_for: number of passages of the record that were looked for.
    """

    record: int
    candidate: int | None
    tokens: np.ndarray
    found: int = 1
    looked_for: int = 1


def shared_documents(pool: np.ndarray, reference: np.ndarray) -> list[Overlap]:
    """Return the reference records whose hash ``(r,)`` is that of one of the pool's documents ``(d,)``; uint64."""
    found = np.flatnonzero(np.isin(reference, pool))
    return [Overlap(int(i), None, np.empty(0, np.int64)) for i in found]


def shared_passages(rows: Rows, items: Sequence[Item]) -> list[Overlap]:
    """Return one overlap for every reference record with a passage that occurs in the pool.

    Each item is cut into passages of ``PASSAGE`` tokens, one of them exactly in its middle, because the tokens at the
    edges of a text depend on where it was cut. So every shared text is found that is twice as long as a passage. A
    prepared pool is searched as one stream; rows of a dataset are searched one by one, with passages no longer than
    the rows. Every match is compared token by token. Items shorter than a passage are not looked for, nor are passages
    of a few tokens that repeat.
    """
    length = passage_length(rows)
    passages = _passages(items, length)
    looked_for = Counter(record for records in passages.values() for record in records)
    found: Counter[int] = Counter()
    first: dict[int, tuple[int, np.ndarray]] = {}
    for key, candidate in _passages_in_pool(rows, passages, length):
        for record in passages[key]:
            found[record] += 1
            first.setdefault(record, (candidate, np.frombuffer(key, np.int64).copy()))
    return [Overlap(record, *first[record], found[record], looked_for[record]) for record in sorted(first)]


def _passages(items: Sequence[Item], length: int) -> dict[bytes, set[int]]:
    """Return the passages of all items, each with the records that hold it."""
    passages: dict[bytes, set[int]] = {}
    for item in items:
        size = len(item)
        starts = range((size - length) // 2 % length, size - length + 1, length) if size >= length else range(0)
        for start in starts:
            tokens = item.input_ids[start : start + length]
            if len(np.unique(tokens)) >= min(MIN_DISTINCT_TOKENS, length // 4):
                passages.setdefault(_key(tokens), set()).add(item.record)
    return passages


def _passages_in_pool(rows: Rows, passages: Iterable[bytes], length: int) -> Iterator[tuple[bytes, int]]:
    """Yield each of the passages that is in the pool, once, with the first candidate that holds its beginning."""
    hash_of = {key: _hashes(np.frombuffer(key, np.int64), length)[0] for key in passages}
    wanted = np.empty(0, np.uint64)
    for piece in _pieces(rows, length) if hash_of else ():
        if len(wanted) != len(hash_of):
            wanted = np.array(list(hash_of.values()), np.uint64)
        for position in _matches(_hashes(piece.tokens, length), wanted).tolist():
            key = _key(piece.tokens[position : position + length])
            if key in hash_of and (rows.is_stream or piece.within_a_row(position, length)):
                del hash_of[key]  # no longer looked for: it may be in the pool a million times
                yield key, piece.candidate_at(position)


def passage_length(rows: Rows) -> int:
    """Return the number of tokens of a passage; rows of a dataset may be shorter than ``PASSAGE``."""
    return PASSAGE if rows.is_stream else min(PASSAGE, rows.block_size or PASSAGE)


def shared_rows(rows: Rows, items: Sequence[Item]) -> list[Overlap]:
    """Return one overlap for every reference record with a short item that equals a whole row of a dataset.

    :func:`shared_passages` does not look for items shorter than a passage. Padding does not count.
    """
    wanted: dict[bytes, list[int]] = {}
    for item in items:
        if len(item) < PASSAGE:
            wanted.setdefault(_key(item.input_ids), []).append(item.record)
    found: dict[int, Overlap] = {}
    for first in range(0, len(rows) if wanted else 0, 1024):
        batch = rows.candidates(range(first, min(first + 1024, len(rows))))
        for i, tokens in enumerate(visible_rows(batch)):
            for record in wanted.get(_key(tokens), []):
                found.setdefault(record, Overlap(record, first + i, tokens))
    return [found[record] for record in sorted(found)]


def visible_rows(batch: Batch) -> list[np.ndarray]:
    """Return the rows of a batch without padding: without an attention mask, the tokens after the last label."""
    rows = unpadded(batch)
    if "attention_mask" in batch or batch["labels"].shape != batch["input_ids"].shape:
        return rows
    counted = batch["labels"].numpy() != IGNORE_INDEX
    return [
        row[: len(seen) - int(seen[::-1].argmax())] if seen.any() else row
        for row, seen in zip(rows, counted, strict=True)
    ]


def scan_limit(rows: Rows) -> int:
    """Return the size in tokens up to which a pool is searched for passages."""
    return STORE_TOKENS if rows.is_stream else DATASET_TOKENS


def pool_tokens(rows: Rows) -> int:
    """Return the number of tokens of a pool, estimated where rows differ."""
    if rows.block_size is not None:
        return len(rows) * rows.block_size
    sample = rows.candidates(range(min(len(rows), 64)))["input_ids"]
    return len(rows) * sample.shape[1]


def _key(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, dtype=np.int64).tobytes()


def _hashes(stream: np.ndarray, length: int) -> np.ndarray:
    """Return the polynomial hash of every window, ``(n - length + 1,)`` uint64.

    A window of a + b tokens is a window of a tokens, shifted, and one of b tokens: doubling reaches any length in a few
    passes over the stream.
    """
    single = stream.astype(np.uint64) + np.uint64(1)
    result, result_length = np.zeros(0, np.uint64), 0
    block, block_length = single, 1
    while True:
        if length & block_length:
            if result_length:
                result = block[: len(block) - result_length] * _power(result_length) + result[block_length:]
            else:
                result = block
            result_length += block_length
        if result_length == length:
            return result
        block = block[:-block_length] * _power(block_length) + block[block_length:]
        block_length *= 2


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_BASE, exponent, 1 << 64))


def _matches(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the positions of ``hashes (n,)`` that are among ``wanted (w,)``."""
    shift = np.uint64(64 - _TABLE_BITS)
    table = np.zeros(1 << _TABLE_BITS, bool)  # excludes most windows by a single look-up
    table[wanted >> shift] = True
    likely = np.flatnonzero(table[hashes >> shift])
    return likely[np.isin(hashes[likely], wanted)]


class _Piece(NamedTuple):
    """Part of the stream: ``carried`` tokens of the row before, then rows of ``width`` tokens from ``first`` on."""

    tokens: np.ndarray
    carried: int
    first: int
    width: int

    def within_a_row(self, position: int, length: int) -> bool:
        return position >= self.carried and (position - self.carried) % self.width + length <= self.width

    def candidate_at(self, position: int) -> int:
        return self.first + (position - self.carried) // self.width


def _pieces(rows: Rows, length: int) -> Iterator[_Piece]:
    """Yield the pool's tokens in pieces that overlap by a window less one."""
    per_piece = max(1, PIECE_TOKENS // (rows.block_size or 1024))
    tail = np.empty(0, np.int64)
    for first in range(0, len(rows), per_piece):
        ids = range(first, min(first + per_piece, len(rows)))
        blocks = (rows.store.read(ids) if rows.store else rows.candidates(ids)["input_ids"]).numpy()
        tokens = np.concatenate([tail, blocks.reshape(-1)])
        if len(tokens) >= length:
            yield _Piece(tokens, len(tail), first, blocks.shape[1])
        tail = tokens[max(0, len(tokens) - length + 1) :]
