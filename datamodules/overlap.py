"""Is the reference set inside the pool? Exact answers, fast enough to ask before every run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from liveselect.datamodules.batching import Item
from liveselect.datamodules.rows import Rows

PASSAGE = 32  # tokens of a passage; long enough not to be shared by chance or by idiom
PIECE_TOKENS = 1 << 16  # what is hashed at once stays in cache
STORE_TOKENS, DATASET_TOKENS = 1 << 28, 1 << 24  # larger pools are not scanned: it would take minutes

_BASE = 0x9E3779B97F4A7C15  # odd, so that no token is forgotten; hashes are polynomials in it, modulo 2^64
_TABLE_BITS = 20


class Overlap(NamedTuple):
    """Something that pool and reference set share.

    Attributes:
        record: position of the reference record.
        candidate: the candidate that holds the passage, None for a document of the pool.
        tokens: what they share, empty for a document.
    """

    record: int
    candidate: int | None
    tokens: np.ndarray


def shared_documents(pool: np.ndarray, reference: np.ndarray) -> list[Overlap]:
    """Return the reference records whose hash ``(r,)`` is that of one of the pool's documents ``(d,)``; uint64."""
    found = np.flatnonzero(np.isin(reference, pool))
    return [Overlap(int(i), None, np.empty(0, np.int64)) for i in found]


def shared_passages(rows: Rows, items: Sequence[Item]) -> list[Overlap]:
    """Return one overlap for every reference record whose inner passage occurs in the pool.

    Each item is represented by the ``PASSAGE`` tokens in its middle (fewer where rows of the pool are shorter), since
    at the edges of a text tokens depend on what was cut there. The pool is read as one stream, block after block, as
    it was packed. Every match is compared token by token. Shorter items are not looked for.
    """
    length = min(PASSAGE, rows.block_size or PASSAGE)
    passages: dict[bytes, int] = {}
    for item in items:
        if len(item) >= length:
            start = (len(item) - length) // 2
            passages.setdefault(_key(item.input_ids[start : start + length]), item.record)
    if not passages:
        return []
    wanted = np.array([_hashes(np.frombuffer(key, np.int64), length)[0] for key in passages], np.uint64)
    found: dict[int, Overlap] = {}
    for piece in _pieces(rows, length):
        for position in _matches(_hashes(piece.tokens, length), wanted).tolist():
            tokens = piece.tokens[position : position + length]
            record = passages.get(_key(tokens))
            if record is not None and record not in found:
                found[record] = Overlap(record, piece.candidate_at(position), tokens.copy())
    return [found[record] for record in sorted(found)]


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
