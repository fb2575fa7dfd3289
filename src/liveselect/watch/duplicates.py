"""Finds passages that two sets of token rows share."""

import numpy as np
import numpy.typing as npt

from liveselect.protocols import IGNORE_INDEX, Batch

FEWEST_DISTINCT = 8
"""Tokens of a passage that must differ: padding and rules of dashes are shared by texts that have nothing in common."""
_BASE = 0x9E3779B97F4A7C15  # odd: no token is forgotten

Passages = npt.NDArray[np.int64]


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

    def add(self, batch: Batch) -> None:
        """Add the passages of all rows of the batch."""
        self._hashes = np.unique(np.concatenate([self._hashes, *(_hashes(self._of(row)) for row in _rows(batch))]))

    def shared(self, batch: Batch) -> npt.NDArray[np.bool_]:
        """Return which rows of the batch hold a passage of the set, ``(B,)``."""
        return np.array([self._holds(self._of(row)) for row in _rows(batch)], dtype=np.bool_)

    def _holds(self, passages: Passages) -> bool:
        if not len(self._hashes) or not len(passages):
            return False
        hashes = _hashes(passages)
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        ordered = np.sort(passages[self._hashes[places] == hashes], axis=1)
        distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
        return bool((distinct >= min(FEWEST_DISTINCT, passages.shape[1])).any())

    def _of(self, row: npt.NDArray[np.int64]) -> Passages:
        """Return the passages of a row, ``(n, tokens)``."""
        length = min(self.length, len(row))
        return np.lib.stride_tricks.sliding_window_view(row, length) if length else np.empty((0, 1), dtype=np.int64)


def _hashes(passages: Passages) -> npt.NDArray[np.uint64]:
    length = passages.shape[1]
    powers = np.array([pow(_BASE, i, 2**64) for i in range(1, length + 1)], dtype=np.uint64)
    hashes: npt.NDArray[np.uint64] = (passages.astype(np.uint64) * powers).sum(axis=1, dtype=np.uint64)
    return hashes ^ np.uint64(length)


def _rows(batch: Batch) -> list[npt.NDArray[np.int64]]:
    """Return the tokens of each row, without padding where the batch tells it."""
    ids = batch["input_ids"].cpu().numpy().astype(np.int64)
    if "attention_mask" in batch:
        keep = batch["attention_mask"].cpu().numpy().astype(bool)
        return [row[mask] for row, mask in zip(ids, keep, strict=True)]
    labels = batch["labels"].cpu().numpy()
    ends = [int(np.flatnonzero(row != IGNORE_INDEX)[-1]) + 1 if (row != IGNORE_INDEX).any() else 0 for row in labels]
    return [row[:end] for row, end in zip(ids, ends, strict=True)]
