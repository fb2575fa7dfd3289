"""One pass over the rows of a dataset before training: its size, its fingerprint, and errors in its rows."""

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor

from liveselect import distributed
from liveselect.datamodules.pools.display import PrepareDisplay
from liveselect.grammar import IGNORE_INDEX, SelectionWarning

WHOLE_ROWS, WHOLE_TOKENS = 1 << 17, 1 << 26
"""Datasets up to this size are read in full: a minute where a row takes half a millisecond."""

SLOW_SECONDS = 10.0  # reading that takes longer shows its progress

SPREAD_ROWS = 4096
"""Rows of a larger dataset that represent all of it."""

ROWS_READ_TWICE = 256  # to see whether they differ
CHUNK_ROWS, CHUNK_TOKENS = 1024, 1 << 18  # read at once: bounds the memory
_HASHED_APART = frozenset({"id", "input_ids", "labels", "attention_mask"})
MAX_TOKEN_ID = 2**31 - 1  # ids are hashed as 32-bit numbers, so that the hash does not depend on their integer type


class Chunk(NamedTuple):
    """Some rows, end to end.

    Attributes:
        lengths: ``(n,)`` int64 tokens of each row; a row without tokens is an error.
        tokens: ``(sum of lengths,)`` int64.
        labels: the same shape; another one where batches do not have one label for each token.
        mask: ``(sum of lengths,)`` bool attention mask, or None.
        others: ``(16 x batches,)`` uint8, hashes of what else the batches of these rows hold, or None.
    """

    lengths: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    mask: np.ndarray | None = None
    others: np.ndarray | None = None


Read = Callable[[Sequence[int], int], Chunk]
"""Reads the rows ``ids (n,)`` of a dataset, which draws random numbers under the seed."""


@dataclass(frozen=True)
class Content:
    """The result of a :func:`survey`.

    Attributes:
        fingerprint: hash of all rows, of a spread of them, or, where rows differ each time they are read, of their
            number.
        largest: the largest token id.
        longest: tokens of the longest row.
        block_size: tokens of every row, None where they differ.
        is_whole: whether every row was read.
    """

    fingerprint: str
    largest: int
    longest: int
    block_size: int | None
    is_whole: bool


def survey(
    size: int,
    read: Read,
    *,
    strict: bool = True,
    whole_rows: int = WHOLE_ROWS,
    whole_tokens: int = WHOLE_TOKENS,
    name: str = "the pool",
) -> Content:
    """Read a dataset, in full up to a size, check its rows and return their properties.

    Args:
        size: number of rows.
        read: reads some of them.
        strict: labels must be token ids or -100; a user's own loss function may accept others.
        whole_rows: read everything up to this many rows,
        whole_tokens: and up to about this many tokens.
        name: the name of the dataset in messages.

    Raises:
        ValueError: rows are empty, token ids are negative, or no row has a token to predict.
        TypeError: token ids are no integers.
    """
    first = spread_ids(size, ROWS_READ_TWICE)
    spread = read(first, 0)
    mean = max(1.0, float(spread.lengths.mean()))
    is_whole = size <= whole_rows and size * mean <= whole_tokens
    began = time.perf_counter()
    again = read(first, 0)
    is_stable = _equal(spread._replace(others=None), again._replace(others=None))
    others, others_again = spread.others, again.others  # what differs from one reading to the next says nothing
    counts_others = others is not None and others_again is not None and np.array_equal(others, others_again)
    seconds_each = (time.perf_counter() - began) / len(first)
    at_once = int(max(1, min(CHUNK_ROWS, CHUNK_TOKENS // mean)))
    found = _Findings(name, strict)
    every: Sequence[int] = range(size) if is_whole and is_stable else spread_ids(size, SPREAD_ROWS)
    display = PrepareDisplay(quiet=distributed.rank() > 0 or seconds_each * len(every) < SLOW_SECONDS)
    with display.phase(f"reading {name}", len(every), " rows"):
        for number, start in enumerate(range(0, len(every), at_once)):
            ids = every[start : start + at_once]
            chunk = read(ids, number)
            found.add(chunk if counts_others else chunk._replace(others=None), ids)
            display.update(start + len(ids))
    found.conclude()
    _warn_of_shifted_labels(spread, name)
    if not is_stable:
        _warn(
            f"rows of {name} differ each time they are read, although torch, numpy and random are seeded for each row: "
            "the dataset, or its collate function, draws from a generator of its own. A resumed run cannot train on "
            "the same tokens, and of the data only the number of rows is compared when it resumes. Let it draw from "
            "torch.rand, numpy.random or random"
        )
    elif not is_whole:
        _warn(
            f"{name} holds {size} rows of about {mean:.0f} tokens, too many to read before training: {SPREAD_ROWS} of "
            "them, evenly spread, represent all when a resumed run compares its data with those of the checkpoint, and "
            "the token ids of the others are checked when they are first read. A pool made by `liveselect prepare` is "
            "compared in full, however large it is"
        )
    how = "length" if not is_stable else "whole" if is_whole else "spread"
    return Content(found.fingerprint(how, size), found.largest, found.longest, found.block_size, how == "whole")


def spread_ids(size: int, count: int) -> list[int]:
    """Return up to ``count`` positions below ``size``, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64)).tolist()


def join(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Chunk:
    """Return rows of ``input_ids (T,)`` and ``labels (T,)`` end to end."""
    lengths = np.array([len(tokens) for tokens, _ in rows], dtype=np.int64)
    return Chunk(lengths, np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]))


def hash_others(batch: Mapping[str, object]) -> np.ndarray | None:
    """Return a hash of what a batch holds beside tokens, labels and mask, ``(16,)`` uint8; None where that is nothing.

    Weights, positions and texts, for example, which a training step or a loss of the user's may use.
    """
    digest = hashlib.blake2b(digest_size=16)
    found = False
    for name in sorted(batch.keys() - _HASHED_APART, key=str):
        value = batch[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = value.double().numpy() if value.is_floating_point() else value.numpy()
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            kind = "<f8" if value.dtype.kind == "f" else "<i8"  # what a number is stored as does not count
            content = repr(value.shape).encode() + value.astype(kind).tobytes()
        elif isinstance(value, list | tuple) and all(isinstance(each, str | int | float) for each in value):
            content = repr(list(value)).encode()
        else:
            continue
        digest.update(f"{name!r} {len(content)} ".encode() + content)
        found = True
    return np.frombuffer(digest.digest(), np.uint8) if found else None


def _equal(one: Chunk, other: Chunk) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b if a is None or b is None else np.array_equal(a, b) for a, b in pairs)


@dataclass
class _Findings:
    """The properties of the rows read so far."""

    name: str
    strict: bool
    largest: int = 0
    longest: int = 0
    rows: int = 0
    without_target: int = 0
    foreign_label: int | None = None
    other_labels: bool = False
    lengths: set[int] = field(default_factory=set)
    digests: list[hashlib.blake2b] = field(default_factory=lambda: [hashlib.blake2b(digest_size=16) for _ in range(4)])
    others: hashlib.blake2b | None = None

    @property
    def block_size(self) -> int | None:
        return next(iter(self.lengths)) if len(self.lengths) == 1 else None

    def add(self, chunk: Chunk, ids: Sequence[int]) -> None:
        self._check(chunk, ids)
        self.rows += len(ids)
        self.largest = max(self.largest, int(chunk.tokens.max()))
        self.longest = max(self.longest, int(chunk.lengths.max()))
        self.lengths |= {int(chunk.lengths.min()), int(chunk.lengths.max())}
        arrays = (chunk.lengths, chunk.tokens, chunk.labels, chunk.mask)
        for digest, array in zip(self.digests, arrays, strict=True):
            if array is not None:
                small = array.astype("<i4") if array.dtype.kind in "iub" else array
                digest.update(np.ascontiguousarray(small).data)
        if chunk.others is not None:
            self.others = self.others or hashlib.blake2b(digest_size=16)
            self.others.update(chunk.others.data)

    def _check(self, chunk: Chunk, ids: Sequence[int]) -> None:
        if not chunk.lengths.all():
            raise ValueError(
                f"row {ids[int(chunk.lengths.argmin())]} of {self.name} has no tokens: leave empty rows out (datasets: "
                "data.filter(lambda row: len(row['input_ids']) > 1))"
            )
        if chunk.tokens.min() < 0 or chunk.tokens.max() > MAX_TOKEN_ID:
            wrong = int(np.flatnonzero((chunk.tokens < 0) | (chunk.tokens > MAX_TOKEN_ID))[0])
            raise ValueError(
                f"expected input_ids of {self.name} as token ids of 0 or more, got {chunk.tokens[wrong]} in row "
                f"{_row_of(chunk, ids, wrong)}: no model has an embedding for it. A value that marks padding or masked "
                "labels (-100, -1) belongs into labels; pad input_ids with a token"
            )
        if chunk.labels.shape != chunk.tokens.shape or chunk.labels.dtype.kind not in "iu":
            self.other_labels = True
            return
        counted = chunk.labels != IGNORE_INDEX
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        targets = np.add.reduceat(counted, starts, dtype=np.int64) - counted[starts]
        self.without_target += int((targets == 0).sum())
        wrong_labels = counted & ((chunk.labels < 0) | (chunk.labels > MAX_TOKEN_ID))
        if wrong_labels.any():
            wrong = int(wrong_labels.argmax())
            self._note_label(int(chunk.labels[wrong]), _row_of(chunk, ids, wrong))
        elif self.strict:
            self.largest = max(self.largest, int(chunk.labels.max()))

    def _note_label(self, label: int, row: int) -> None:
        if self.strict:
            raise ValueError(
                f"expected labels of {self.name} as token ids, or {IGNORE_INDEX} where no loss is taken, got {label} "
                f"in row {row}: replace it by {IGNORE_INDEX}"
            )
        self.foreign_label = label if self.foreign_label is None else self.foreign_label

    def conclude(self) -> None:
        """Raise or warn about faults of the rows as a whole."""
        if self.without_target == self.rows:
            raise ValueError(
                f"none of the {self.rows} rows of {self.name} that were looked at has a token to predict: each holds "
                f"less than two tokens, or labels of {IGNORE_INDEX} alone"
            )
        if self.without_target:
            _warn(
                f"{self.without_target} of the {self.rows} rows of {self.name} that were looked at have no token to "
                f"predict (less than two tokens, or labels of {IGNORE_INDEX} alone): training on them teaches nothing, "
                "and their influence is zero. Leave them out"
            )
        if self.other_labels:
            _warn(
                f"batches of {self.name} have labels that are not one integer for each token: the default loss of "
                "selection cannot use them. Pass a loss_fn"
            )
        if self.foreign_label is not None:
            _warn(
                f"batches of {self.name} have labels of {self.foreign_label}: losses of selection leave out "
                f"{IGNORE_INDEX} alone. Map them to {IGNORE_INDEX}, or pass a loss_fn that knows them"
            )

    def fingerprint(self, how: str, size: int) -> str:
        """Return a hash of the rows read, and of how they were read."""
        digest = hashlib.blake2b(f"{how} {size}".encode(), digest_size=16)
        if how != "length":
            for part in (*self.digests, *([] if self.others is None else [self.others])):
                digest.update(part.digest())
        return digest.hexdigest()


def _row_of(chunk: Chunk, ids: Sequence[int], place: int) -> int:
    """Return the id of the row with the token at position ``place`` of a chunk."""
    return ids[int(np.searchsorted(np.cumsum(chunk.lengths), place, side="right"))]


def _warn_of_shifted_labels(chunk: Chunk, name: str) -> None:
    """Warn when labels are the next tokens: a loss that shifts them itself would predict the one after."""
    tokens, labels = chunk.tokens[:-1], chunk.labels[:-1]
    if chunk.labels.shape != chunk.tokens.shape or not len(tokens):
        return
    inside = np.ones(len(tokens), bool)
    inside[np.cumsum(chunk.lengths)[:-1] - 1] = False  # the last token of a row has no next one
    inside &= labels != IGNORE_INDEX
    shifted, aligned = (labels == chunk.tokens[1:])[inside], (labels == tokens)[inside]
    if len(shifted) and shifted.mean() > 0.95 and aligned.mean() < 0.5:
        _warn(
            f"labels of {name} look shifted: each is the token after its own. The default loss of selection shifts "
            "labels itself, as Hugging Face models do, so it would predict one token too far: leave labels out or make "
            "them equal to input_ids, or pass a loss_fn that takes them as they are"
        )


def _warn(message: str) -> None:
    warnings.warn(message, SelectionWarning, stacklevel=4)  # the code that called survey
