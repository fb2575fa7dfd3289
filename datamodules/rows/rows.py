"""The rows of a pool, whatever holds them: read by id, and collated as candidates and as training batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows import hugging_face, transport
from liveselect.datamodules.rows.collating import check_order, unpadded
from liveselect.datamodules.rows.content import WHOLE_ROWS, WHOLE_TOKENS, Chunk, join, spread_ids, survey
from liveselect.datamodules.rows.draws import candidate_seeds, fetch, load_rows, private_draws
from liveselect.datamodules.rows.token_rows import check_map_style, complete_batch, pad_rows, token_row

ARROW_TOKENS = 1 << 29  # Hugging Face datasets are read by columns, which is fast: this many tokens take some seconds
COLLATED_ROWS = 64  # collated at once when everything is read; the rows of a trial one by one

COLLATE = "the collate function of the training data"

Collate = Callable[[Any], Any]
Receive = Callable[[Any], Any]


class Rows(ABC):
    """The rows of a pool as they are served: read by id, as training batches and as candidates.

    Attributes:
        source: the pool or dataset that is read.
        store: the prepared pool behind the rows, if there is one.
        receive: makes the training batch of what :meth:`load` returned, in the process that trains; None where it is
            one already.
        draws: whether random numbers may be drawn when rows are read.
        worth_workers: whether reading a candidate takes longer than handing it over from a worker process.
        vocab_size: every token id is below it, as far as was looked at.
        block_size: tokens of every row, None when rows differ.
        longest: tokens of the longest row that was looked at.
        fingerprint: identifies the content.
    """

    source: Any
    store: TokenStore | None = None
    receive: Receive | None = None
    draws = True
    worth_workers = True
    vocab_size: int
    block_size: int | None
    longest: int
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    @abstractmethod
    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return the rows ``ids (B,)`` as a training batch on its way; each draws under its own of ``seeds (B,)``."""

    @abstractmethod
    def candidates(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the rows ``ids (B,)`` as a candidate batch; what they draw is the same at every call."""


class StoreRows(Rows):
    """The rows of a prepared pool; batches are ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``."""

    source: TokenStore
    receive = staticmethod(transport.receive)
    draws = False
    worth_workers = False

    def __init__(self, store: TokenStore) -> None:
        self.source = self.store = store
        self.vocab_size, self.fingerprint = store.vocab_size, store.fingerprint
        self.block_size = self.longest = store.block_size

    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return the rows ``ids (B,)`` as they travel; nothing is drawn."""
        return transport.send(self.candidates(ids))

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch."""
        tokens = self.source.read(ids)
        # a copy: user code masks labels in place, and must not change the inputs by it
        return {"id": torch.as_tensor(ids, dtype=torch.int64), "input_ids": tokens, "labels": tokens.clone()}


class DatasetRows(Rows):
    """The rows of a map-style dataset of dicts with ``input_ids`` and, if they like, ``labels`` and ``attention_mask``.

    Batches are ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``; rows of different lengths are padded on the
    right, and padding carries no loss.

    Args:
        dataset: Hugging Face datasets are read through their numpy format, unless they have a transform;
            ``__getitems__`` is used where it exists.

    Raises:
        TypeError: the dataset has no length, its rows are not dicts, or its token ids are no integers.
        ValueError: rows have no ``input_ids``, are empty, or have ids or labels that cannot be.
    """

    receive = staticmethod(transport.receive)

    def __init__(self, dataset: Any) -> None:
        check_map_style(dataset, "the pool")
        self.source = dataset
        self._view = hugging_face.numpy_view(dataset)
        arrow = hugging_face.arrow_view(dataset)
        if arrow is None and hasattr(self._view, "__getitems__"):
            where = f"the pool ({type(dataset).__name__}), when it is asked for several rows at once,"
            check_order(self._tried, spread_ids(len(dataset), COLLATED_ROWS), where)

        def read(ids: Sequence[int], seed: int) -> Chunk:
            chunk = hugging_face.read_chunk(arrow, ids) if arrow is not None else None
            return chunk or join(self._rows(ids, [seed] + [None] * (len(ids) - 1)))

        by_columns = arrow is not None
        content = survey(
            len(dataset),
            read,
            whole_rows=len(dataset) if by_columns else WHOLE_ROWS,
            whole_tokens=ARROW_TOKENS if by_columns else WHOLE_TOKENS,
        )
        self.vocab_size = content.largest + 1
        self.block_size, self.longest, self.fingerprint = content.block_size, content.longest, content.fingerprint

    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return the rows ``ids (B,)`` as they travel; each draws under its own of ``seeds (B,)``."""
        return transport.send(pad_rows(self._rows(ids, seeds), ids))

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch; what they draw is the same at every call."""
        return pad_rows(self._rows(ids, candidate_seeds(ids)), ids)

    def _rows(self, ids: Sequence[int], seeds: Sequence[int | None]) -> list[tuple[np.ndarray, np.ndarray]]:
        with private_draws() as seed:
            rows = fetch(self._view, ids, seeds, seed)
        if not isinstance(rows, Sequence) or len(rows) != len(ids):
            got = f"{len(rows)} of them" if isinstance(rows, Sequence) else type(rows).__name__
            raise ValueError(
                f"expected __getitems__ of {type(self._view).__name__} to return a list of the {len(ids)} rows that it "
                f"was asked for, got {got}"
            )
        return [token_row(row, f"row {i} of the pool") for i, row in zip(ids, rows, strict=True)]

    def _tried(self, ids: Sequence[int], seed: int) -> list[np.ndarray]:
        """Return the tokens of the rows ``ids (B,)``, read at once under a seed."""
        return [tokens for tokens, _ in self._rows(ids, [seed] + [None] * (len(ids) - 1))]


class CollatedRows(Rows):
    """The rows of a dataset whose batches are made by somebody else's collate function.

    Training batches are what that function returns, untouched. Candidate batches get what the engine needs beside it:
    ``id``, and ``labels`` where there are none.

    Args:
        dataset: map-style; its rows may be anything.
        collate_fn: must keep the rows in their order, one row of the batch for each.

    Raises:
        TypeError: the dataset has no length, batches are no mappings, or token ids are no integers.
        ValueError: batches have no ``input_ids``, or another number or order of rows than they were made of.
    """

    def __init__(self, dataset: Any, collate_fn: Collate) -> None:
        check_map_style(dataset, "the training data")
        self.source = dataset
        self.collate_fn = collate_fn
        tried = spread_ids(len(dataset), COLLATED_ROWS)
        widths = {self.candidates([i])["input_ids"].shape[1] for i in tried}
        self.candidates(tried[:2])  # a function that joins rows shows itself at two, not at one
        check_order(self._tried, tried, COLLATE)
        self.block_size = widths.pop() if len(widths) == 1 else None
        self.store = dataset if isinstance(dataset, TokenStore) else None
        if self.store is not None:
            self.vocab_size, self.fingerprint = self.store.vocab_size, self.store.fingerprint
            self.longest = max([self.block_size or 0, *widths])
        else:
            content = survey(len(dataset), self._read, strict=False, name="the training data")
            self.vocab_size, self.fingerprint = content.largest + 1, content.fingerprint
            self.longest = content.longest

    def load(self, ids: Sequence[int], seeds: Sequence[int | None]) -> Any:
        """Return what the collate function makes of the rows ``ids (B,)``; each draws under its own of ``seeds``."""
        return load_rows(self.source, self.collate_fn, ids, seeds)

    def candidates(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the rows ``ids (B,)`` as a candidate batch; what is drawn is the same at every call."""
        return self._complete(ids, candidate_seeds(ids))

    def _complete(self, ids: Sequence[int], seeds: Sequence[int | None], then: int | None = None) -> dict[str, Any]:
        batch = load_rows(self.source, self.collate_fn, ids, seeds, then)
        return complete_batch(batch, ids, COLLATE)

    def _tried(self, ids: Sequence[int], seed: int) -> list[np.ndarray]:
        """Return the rows ``ids (B,)`` as they are collated under a seed; the dataset reads them as it always does."""
        return unpadded(self._complete(ids, candidate_seeds(ids), then=seed))

    def _read(self, ids: Sequence[int], seed: int) -> Chunk:
        """Return rows as they are collated, ``COLLATED_ROWS`` at a time; padding counts as tokens."""
        chunks = []
        for first in range(0, len(ids), COLLATED_ROWS):
            part = ids[first : first + COLLATED_ROWS]
            batch = self._complete(part, [seed + first] + [None] * (len(part) - 1))
            tokens, mask = np.asarray(batch["input_ids"], dtype=np.int64), batch.get("attention_mask")
            chunks.append(
                Chunk(
                    np.full(len(part), tokens.shape[1], dtype=np.int64),
                    tokens.reshape(-1),
                    np.asarray(batch["labels"]).reshape(-1),
                    None if mask is None else np.asarray(mask).reshape(-1) != 0,
                )
            )
        lengths, tokens, labels, masks = zip(*chunks, strict=True)
        mask = None if masks[0] is None else np.concatenate(masks)
        return Chunk(np.concatenate(lengths), np.concatenate(tokens), np.concatenate(labels), mask)
