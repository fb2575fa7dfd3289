"""Is the reference set inside the pool? Exact answers, fast enough to ask before every run."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from liveselect.datamodules.batching import Item
from liveselect.datamodules.rows.collating import unpadded
from liveselect.datamodules.rows.rows import Rows
from liveselect.protocols import IGNORE_INDEX, Batch

PASSAGE = 32  # tokens of a passage; long enough not to be shared by chance or by idiom
FEWEST_DISTINCT = 8  # tokens of a passage that differ: rows of dashes and numbers are shared by texts of all kinds
PIECE_TOKENS = 1 << 16  # what is hashed at once stays in cache
STORE_TOKENS, DATASET_TOKENS = 1 << 28, 1 << 24  # larger pools are not scanned: it would take minutes

_BASE = 0x9E3779B97F4A7C15  # odd, so that no token is forgotten; hashes are polynomials in it, modulo 2^64
_TABLE_BITS = 20


class Overlap(NamedTuple):
    """Something that pool and reference set share.

    Attributes:
        record: position of the reference record.
        candidate: the candidate that holds the passage, None for a document of the pool.
        tokens: the first that they share, empty for a document.
        found: how many passages of the record the pool holds.
        looked_for: of how many.
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
    """Return one overlap for every reference record of which a passage occurs in the pool.

    Each item is represented by ``PASSAGE`` tokens in its middle, since at the edges of a text tokens depend on what was
    cut there, and by those before and after them, one beside the other: whatever an item shares with the pool is found
    if it is twice as long as a passage. A prepared pool is read as the one stream that it was cut from; rows of a
    dataset stand for themselves, and passages are no longer than these. Every match is compared token by token. Items
    shorter than a passage are not looked for, nor are passages of a few tokens that repeat.
    """
    length = passage_length(rows)
    passages: dict[bytes, set[int]] = {}
    for item in items:
        for start in _starts(len(item), length):
            key = _key(item.input_ids[start : start + length])
            if _varies(key, length):
                passages.setdefault(key, set()).add(item.record)
    if not passages:
        return []
    looked_for = Counter(record for records in passages.values() for record in records)
    hashes = {key: _hashes(np.frombuffer(key, np.int64), length)[0] for key in passages}
    first: dict[int, tuple[int, np.ndarray]] = {}
    matched: set[bytes] = set()
    wanted = np.array([])
    for piece in _pieces(rows, length):
        if len(wanted) != len(hashes) - len(matched):  # what was found may stand in the pool a million times
            wanted = np.array([value for key, value in hashes.items() if key not in matched], np.uint64)
        for position in _matches(_hashes(piece.tokens, length), wanted).tolist():
            if rows.store is None and not piece.within_a_row(position, length):
                continue
            tokens = piece.tokens[position : position + length]
            if (key := _key(tokens)) in passages and key not in matched:
                matched.add(key)
                for record in passages[key]:
                    first.setdefault(record, (piece.candidate_at(position), tokens.copy()))
    found = Counter(record for key in matched for record in passages[key])
    return [Overlap(record, *first[record], found[record], looked_for[record]) for record in sorted(first)]


def _starts(size: int, length: int) -> range:
    """Return where the passages of an item of ``size`` tokens begin: one in its middle, the others beside it."""
    return range((size - length) // 2 % length, size - length + 1, length) if size >= length else range(0)


def _varies(key: bytes, length: int) -> bool:
    return len(set(np.frombuffer(key, np.int64).tolist())) >= min(FEWEST_DISTINCT, length // 4)


def passage_length(rows: Rows) -> int:
    """Return how many tokens are looked for; rows of a dataset may be shorter than a passage."""
    return PASSAGE if rows.store else min(PASSAGE, rows.block_size or PASSAGE)


def shared_rows(rows: Rows, items: Sequence[Item]) -> list[Overlap]:
    """Return one overlap for every reference record that has an item equal to a whole row of a dataset.

    This finds the short ones, which :func:`shared_passages` does not look for. Padding does not count.
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
    """Return the rows of a batch without padding; without an attention mask, what follows the last label is padding."""
    rows = unpadded(batch)
    if "attention_mask" in batch or batch["labels"].shape != batch["input_ids"].shape:
        return rows
    counted = batch["labels"].numpy() != IGNORE_INDEX
    return [
        row[: len(seen) - int(seen[::-1].argmax())] if seen.any() else row
        for row, seen in zip(rows, counted, strict=True)
    ]


def scan_limit(rows: Rows) -> int:
    """Return how many tokens of such a pool are worth scanning."""
    return DATASET_TOKENS if rows.store is None else STORE_TOKENS


def pool_tokens(rows: Rows) -> int:
    """Return how many tokens a pool holds, estimated where rows differ."""
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
    table = np.zeros(1 << _TABLE_BITS, bool)  # most windows are turned away by one look into a table that fits in cache
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
