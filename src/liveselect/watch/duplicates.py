"""Finds passages that two sets of token rows share."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveselect.grammar import IGNORE_INDEX, Batch

MIN_DISTINCT_TOKENS = 8
"""Of a passage: padding and lines of dashes are shared by texts that have nothing else in common."""
UNKNOWN = -1
_HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers modulo 2^64 never vanish and every token counts

Passages = npt.NDArray[np.int64]


class Shared(NamedTuple):
    """A passage ``tokens (length,)`` of a row, and the number of the record in the set that contains it, or UNKNOWN."""

    tokens: npt.NDArray[np.int64]
    holder: int


class PassageSet:
    """The passages of a set of rows, as hashes.

    A passage is ``length`` tokens in a row; a row that is shorter is one as a whole.

    Args:
        length: tokens of a passage, at least 1.
    """

    def __init__(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"expected passages of at least one token, got {length}")
        self.length = length
        self._hashes = np.empty(0, dtype=np.uint64)
        self._holders = np.empty(0, dtype=np.int64)

    def add(self, batch: Batch) -> None:
        """Add the passages of all rows of the batch; ``record (B,)``, if there is one, numbers their holders."""
        numbers = batch["record"].tolist() if "record" in batch else [UNKNOWN] * len(batch["input_ids"])
        found = [_hashes(self._of(row)) for row in _rows(batch)]
        holders = [np.full(len(hashes), number) for hashes, number in zip(found, numbers, strict=True)]
        self._hashes, first = np.unique(np.concatenate([self._hashes, *found]), return_index=True)
        self._holders = np.concatenate([self._holders, *holders])[first]

    def shared(self, batch: Batch) -> list[Shared | None]:
        """Return, for each of the ``B`` rows of the batch, a passage that it shares with the set, or None."""
        return [self._held_by(self._of(row)) for row in _rows(batch)]

    def _held_by(self, passages: Passages) -> Shared | None:
        if not len(self._hashes) or not len(passages):
            return None
        hashes = _hashes(passages)
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        common = np.flatnonzero(self._hashes[places] == hashes)
        ordered = np.sort(passages[common], axis=1)
        distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
        common = common[distinct >= min(MIN_DISTINCT_TOKENS, passages.shape[1])]
        return Shared(passages[common[0]], int(self._holders[places[common[0]]])) if len(common) else None

    def _of(self, row: npt.NDArray[np.int64]) -> Passages:
        """Return the passages of a row, ``(n, tokens)``."""
        length = min(self.length, len(row))
        return np.lib.stride_tricks.sliding_window_view(row, length) if length else np.empty((0, 1), dtype=np.int64)


def _hashes(passages: Passages) -> npt.NDArray[np.uint64]:
    length = passages.shape[1]
    powers = np.array([pow(_HASH_BASE, i, 2**64) for i in range(1, length + 1)], dtype=np.uint64)
    hashes: npt.NDArray[np.uint64] = (passages.astype(np.uint64) * powers).sum(axis=1, dtype=np.uint64)
    return hashes ^ np.uint64(length)


def _rows(batch: Batch) -> list[npt.NDArray[np.int64]]:
    """Return the tokens of each row, without padding where the batch marks it."""
    ids = batch["input_ids"].cpu().numpy().astype(np.int64)
    if "attention_mask" in batch:
        keep = batch["attention_mask"].cpu().numpy().astype(bool)
        return [row[mask] for row, mask in zip(ids, keep, strict=True)]
    labels = batch["labels"].cpu().numpy()
    ends = [int(np.flatnonzero(row != IGNORE_INDEX)[-1]) + 1 if (row != IGNORE_INDEX).any() else 0 for row in labels]
    return [row[:end] for row, end in zip(ids, ends, strict=True)]
