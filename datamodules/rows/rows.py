"""The rows of a pool or dataset: read by id, and collated as candidates and as training batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules.pools.token_files import TokenFiles
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows import hugging_face, transport
from liveselect.datamodules.rows.collating import check_order, unpadded
from liveselect.datamodules.rows.columns import Columns
from liveselect.datamodules.rows.content import WHOLE_ROWS, WHOLE_TOKENS, Chunk, hash_others, join, spread_ids, survey
from liveselect.datamodules.rows.draws import Collate, MapStyle, candidate_seeds, fetch, load_rows, private_draws
from liveselect.datamodules.rows.token_rows import (
    FOR_MASKS,
    WEIGHTS,
    check_map_style,
    complete_batch,
    masks_of,
    pad_rows,
    token_row,
)
from liveselect.grammar import Batch

ARROW_TOKENS = 1 << 29  # Hugging Face datasets are read by columns, which is fast: this many tokens take some seconds
COLLATED_ROWS = 64  # collated at once when everything is read; also the number of rows of a trial

COLLATE = "the collate function of the training data"

Receive = Callable[[object], Batch]


class Rows(ABC):
    """The rows of a pool as they are served: read by id, as training batches and as candidates.

    Attributes:
        source: the pool or dataset that is read.
        store: the prepared pool behind the rows, if there is one.
        receive: makes the training batch of the return value of :meth:`load`, in the process that trains; None where
            that is a training batch already.
        draws: whether reading rows may draw random numbers.
        worth_workers: whether reading a candidate takes longer than handing it over from a worker process.
        is_stream: whether rows follow each other in one stream, so that a text may go on from row to row.
        vocab_size: every token id of the rows surveyed is below it.
        known_tokens: how many tokens the model knows, once that is known: rows that were not surveyed are held to it
            when they are read.
        block_size: tokens of every row, None when rows differ.
        longest: tokens of the longest row surveyed.
        fingerprint: identifies the content.
    """

    source: MapStyle
    store: TokenStore | None = None
    receive: Receive | None = None
    draws = True
    worth_workers = True
    is_stream = False
    vocab_size: int
    block_size: int | None
    longest: int
    fingerprint: str
    known_tokens: int | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    @abstractmethod
    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> object:
        """Return the rows ``ids (B,)`` as a training batch to ``receive``; each draws under its own seed."""

    @abstractmethod
    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch, with the same random draws at every call."""


class _BlockRows(Rows):
    """Blocks of one size; batches are ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``."""

    source: TokenStore | TokenFiles
    receive = staticmethod(transport.receive)
    draws = False
    worth_workers = False
    is_stream = True

    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> object:
        """Return the rows ``ids (B,)`` in the form of :func:`transport.send`; nothing is drawn."""
        return transport.send(self.candidates(ids))

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch."""
        tokens = self.source.read(ids)
        # a copy, so that user code that masks labels in place does not change the inputs
        return {"id": torch.as_tensor(ids, dtype=torch.int64), "input_ids": tokens, "labels": tokens.clone()}


class StoreRows(_BlockRows):
    """The rows of a prepared pool.

    Raises:
        ValueError: the files of the pool do not hold what its manifest says.
    """

    source: TokenStore

    def __init__(self, store: TokenStore) -> None:
        store.verify()
        self.source = self.store = store
        self.vocab_size, self.fingerprint = store.vocab_size, store.fingerprint
        self.block_size = self.longest = store.block_size


class FileRows(_BlockRows):
    """Blocks of files of token ids.

    Raises:
        ValueError: an id is negative, or beyond the ``vocab_size`` of the files.
    """

    source: TokenFiles

    def __init__(self, files: TokenFiles) -> None:
        if files.block_size is None:
            raise ValueError("expected token files in blocks, got sequences of different lengths")
        self.source = files
        self.fingerprint, largest = files.survey()
        if files.vocab_size is not None and largest >= files.vocab_size:
            raise ValueError(
                f"{files!r} holds the token id {largest}, beyond its vocab_size of {files.vocab_size}: pass the dtype "
                "that the files were written with, or the right vocab_size"
            )
        self.vocab_size = files.vocab_size or largest + 1
        self.block_size = self.longest = files.block_size

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch; raise ValueError for ids that no survey has seen."""
        batch = super().candidates(ids)
        _check_known(batch["input_ids"].numpy(), ids, self.source.vocab_size or self.known_tokens, repr(self.source))
        return batch


class DatasetRows(Rows):
    """The rows of a map-style dataset of dicts with ``input_ids`` and, optionally, ``labels`` and ``attention_mask``.

    Rows may also be bare tensors, or pairs (x, y) of tokens and next tokens. Batches are ``id (B,)``,
    ``input_ids (B, T)`` and ``labels (B, T)``; rows of different lengths are padded on the right, and padding carries
    no loss.

    Args:
        dataset: Hugging Face datasets are read through their numpy format, unless they have a transform;
            ``__getitems__`` is used where it exists.
        columns: where rows have their token ids, if not in ``input_ids``.

    Raises:
        TypeError: the dataset has no length, its rows have an unknown form, or its token ids are no integers.
        ValueError: rows have no ``input_ids``, are empty, or have impossible ids or labels.
    """

    receive = staticmethod(transport.receive)

    def __init__(self, dataset: object, columns: Columns | None = None) -> None:
        self.source, self._columns = hugging_face.renamed(check_map_style(dataset, "the pool"), columns)
        self._is_whole = True
        size = len(self.source)
        self._view = hugging_face.numpy_view(self.source)
        self._refuse_weights()
        arrow = hugging_face.arrow_view(self.source)
        if arrow is None and hasattr(self._view, "__getitems__"):
            where = f"the pool ({type(dataset).__name__}), when it is asked for several rows at once,"
            check_order(self._trial_rows, spread_ids(size, COLLATED_ROWS), where)

        def read(ids: Sequence[int], seed: int) -> Chunk:
            chunk = hugging_face.read_chunk(arrow, ids) if arrow is not None else None
            return chunk or join(self._rows(ids, _first_seeded(seed, ids)))

        limits = (WHOLE_ROWS, WHOLE_TOKENS) if arrow is None else (size, ARROW_TOKENS)
        content = survey(size, read, whole_rows=limits[0], whole_tokens=limits[1])
        self.vocab_size = content.largest + 1
        self.block_size, self.longest, self.fingerprint = content.block_size, content.longest, content.fingerprint
        self._is_whole = content.is_whole

    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> object:
        """Return the rows ``ids (B,)`` in the form of :func:`transport.send`; each draws under its own of ``seeds``."""
        return transport.send(self._padded(ids, seeds))

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch, with the same random draws at every call."""
        return self._padded(ids, candidate_seeds(ids))

    def _padded(self, ids: Sequence[int], seeds: Sequence[int | None]) -> dict[str, Tensor]:
        batch = pad_rows(self._rows(ids, seeds), ids)
        if not self._is_whole:
            _check_known(batch["input_ids"].numpy(), ids, self.known_tokens, "the pool")
        return batch

    def _refuse_weights(self) -> None:
        with private_draws() as seed:
            (row, *_) = fetch(self._view, [0], candidate_seeds([0]), seed)
        if self._columns is not None:
            return  # what is read was named
        if not isinstance(row, Mapping):
            return
        if masks := masks_of(row):
            raise ValueError(
                f"rows of the pool have the field {masks[0]!r}, {FOR_MASKS}; or pass a collate_fn that hands it "
                "on, and a loss_fn that uses it"
            )
        if weights := sorted(WEIGHTS & {str(name) for name in row}):
            raise ValueError(
                f"rows of the pool have the field {weights[0]!r}, which has no effect: batches hold input_ids and "
                "labels. Leave it out, or pass a collate_fn that hands it on, and a loss_fn that uses it"
            )

    def _rows(self, ids: Sequence[int], seeds: Sequence[int | None]) -> list[tuple[np.ndarray, np.ndarray]]:
        with private_draws() as seed:
            rows = fetch(self._view, ids, seeds, seed)
        if not isinstance(rows, Sequence) or len(rows) != len(ids):
            got = f"{len(rows)} of them" if isinstance(rows, Sequence) else type(rows).__name__
            raise ValueError(
                f"expected __getitems__ of {type(self._view).__name__} to return a list of the {len(ids)} rows asked "
                f"for, got {got}"
            )
        return [token_row(row, f"row {i} of the pool", self._columns) for i, row in zip(ids, rows, strict=True)]

    def _trial_rows(self, ids: Sequence[int], seed: int) -> list[np.ndarray]:
        """Return the tokens of the rows ``ids (B,)``, read at once under a seed."""
        return [tokens for tokens, _ in self._rows(ids, _first_seeded(seed, ids))]


class CollatedRows(Rows):
    """The rows of a dataset whose batches are made by a collate function of the user's.

    Training batches are the return values of that function, unchanged. Candidate batches also get the keys that the
    engine needs: ``id``, and ``labels`` where there are none.

    Args:
        dataset: map-style; its rows may be anything.
        collate_fn: must keep the rows in their order, one row of the batch for each.
        columns: where batches have their token ids, if not in ``input_ids``.

    Raises:
        TypeError: the dataset has no length, batches have an unknown form, or token ids are no integers.
        ValueError: batches have no ``input_ids``, or another number or order of rows than they were made of.
    """

    def __init__(self, dataset: object, collate_fn: Collate, columns: Columns | None = None) -> None:
        self.source = check_map_style(dataset, "the training data")
        self._columns = columns
        if isinstance(dataset, TokenStore):
            dataset.verify()
        self.collate_fn = collate_fn
        tried = spread_ids(len(self.source), COLLATED_ROWS)
        widths = {self.candidates([i])["input_ids"].shape[1] for i in tried}
        self.candidates(tried[:2])  # a function that joins rows fails for two rows, not for one
        check_order(self._trial_rows, tried, COLLATE)
        self.block_size = widths.pop() if len(widths) == 1 else None
        self.store = dataset if isinstance(dataset, TokenStore) else None
        if self.store is not None:
            self.vocab_size, self.fingerprint = self.store.vocab_size, self.store.fingerprint
            self.longest = max([self.block_size or 0, *widths])
        else:
            content = survey(len(self.source), self._read, strict=False, name="the training data")
            self.vocab_size, self.fingerprint = content.largest + 1, content.fingerprint
            self.longest = content.longest

    def load(self, ids: Sequence[int], seeds: Sequence[int | None]) -> object:
        """Return the batch that the collate function makes of the rows ``ids (B,)``; each draws under its own seed."""
        return load_rows(self.source, self.collate_fn, ids, seeds)

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch, with the same random draws at every call."""
        return self._complete(ids, candidate_seeds(ids))

    def _complete(self, ids: Sequence[int], seeds: Sequence[int | None], then: int | None = None) -> dict[str, Tensor]:
        batch = load_rows(self.source, self.collate_fn, ids, seeds, then)
        return complete_batch(batch, ids, COLLATE, self._columns)

    def _trial_rows(self, ids: Sequence[int], seed: int) -> list[np.ndarray]:
        """Return the rows ``ids (B,)``, collated under a seed; the dataset draws under the seeds of candidates."""
        return unpadded(self._complete(ids, candidate_seeds(ids), then=seed))

    def _read(self, ids: Sequence[int], seed: int) -> Chunk:
        """Return collated rows, ``COLLATED_ROWS`` at a time; padding counts as tokens."""
        chunks = []
        for first in range(0, len(ids), COLLATED_ROWS):
            part = ids[first : first + COLLATED_ROWS]
            batch = self._complete(part, _first_seeded(seed + first, part))
            tokens, labels = (np.asarray(batch[name]) for name in ("input_ids", "labels"))
            mask = np.asarray(batch["attention_mask"]).ravel() != 0 if batch.get("attention_mask") is not None else None
            lengths = np.full(len(part), tokens.shape[1])
            chunks.append(Chunk(lengths, tokens.ravel(), labels.ravel(), mask, hash_others(batch)))
        lengths, all_tokens, all_labels, masks, others = zip(*chunks, strict=True)
        return Chunk(
            np.concatenate(lengths),
            np.concatenate(all_tokens),
            np.concatenate(all_labels),
            None if masks[0] is None else np.concatenate(masks),
            None if any(each is None for each in others) else np.concatenate(others),
        )


def _check_known(tokens: np.ndarray, ids: Sequence[int], known: int | None, name: str) -> None:
    """Raise ValueError when a row of ``tokens (B, T)`` holds an id that is negative, or that the model does not know.

    An embedding would fail without saying which row it was.
    """
    wrong = tokens < 0 if known is None else (tokens < 0) | (tokens >= known)
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise ValueError(
            f"row {ids[row]} of {name} holds the token id {tokens[wrong][0]}, where ids from 0"
            + (f" to {known - 1}" if known is not None else "")
            + " were expected: this row was not looked at before training; mend it, or leave it out"
        )


def _first_seeded(seed: int, ids: Sequence[int]) -> list[int | None]:
    """Return seeds of rows ``(B,)`` that draw one after the other under ``seed``."""
    return [seed] + [None] * (len(ids) - 1)
