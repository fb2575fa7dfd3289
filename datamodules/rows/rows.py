"""The rows of a pool, whatever holds them: read by id, and collated as candidates and as training batches."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules.clusters.cluster import Clusters
from liveselect.datamodules.pools.tokens import TokenStore
from liveselect.datamodules.rows import hugging_face, transport
from liveselect.datamodules.rows.collating import check_order, unpadded
from liveselect.datamodules.rows.content import CHUNK_ROWS, WHOLE_ROWS, WHOLE_TOKENS, Chunk, join, spread_ids, survey
from liveselect.datamodules.rows.draws import candidate_seeds, fetch, load_rows, private_draws
from liveselect.datamodules.rows.token_rows import check_map_style, complete_batch, pad_rows, token_row
from liveselect.pool import CandidatePool

ARROW_TOKENS = 1 << 29  # Hugging Face datasets are read by columns, which is fast: this many tokens take some seconds
COLLATED_ROWS = 64  # collated at once when everything is read; the rows of a trial one by one

COLLATE = "the collate function of the training data"

Collate = Callable[[Any], Any]
Receive = Callable[[Any], Any]


@runtime_checkable
class Rows(Protocol):
    """The rows of a pool as a SelectionDataModule uses them.

    Attributes:
        receive: makes the training batch of what :meth:`load` returned, in the process that trains; None where it is
            one already.
        vocab_size: every token id is below it, as far as was looked at.
        block_size: tokens of every row, None when rows differ.
        longest: tokens of the longest row that was looked at.
        fingerprint: identifies the content.
        store: the prepared pool behind the rows, if there is one.
        draws: whether random numbers may be drawn when rows are read.
    """

    draws: bool
    receive: Receive | None
    vocab_size: int
    block_size: int | None
    longest: int
    fingerprint: str
    store: TokenStore | None

    def __len__(self) -> int:
        """Return the number of rows."""

    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return the rows ``ids (B,)`` as a training batch on its way; each draws under its own of ``seeds (B,)``."""

    def candidates(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the rows ``ids (B,)`` as a candidate batch."""


class StoreRows:
    """The rows of a prepared pool; batches are ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``."""

    draws = False

    def __init__(self, store: TokenStore) -> None:
        self.store: TokenStore | None = store
        self._store = store
        self.receive: Receive | None = transport.receive
        self.vocab_size = store.vocab_size
        self.block_size: int | None = store.block_size
        self.longest = store.block_size
        self.fingerprint = store.fingerprint

    def __len__(self) -> int:
        return len(self._store)

    def load(self, ids: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return the rows ``ids (B,)`` as they travel; nothing is drawn."""
        return transport.send(self.candidates(ids))

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch."""
        tokens = self._store.read(ids)
        # a copy: user code masks labels in place, and must not change the inputs by it
        return {"id": torch.as_tensor(ids, dtype=torch.int64), "input_ids": tokens, "labels": tokens.clone()}


class DatasetRows:
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

    draws = True

    def __init__(self, dataset: Any) -> None:
        check_map_style(dataset, "the pool")
        self.source = dataset
        self.store: TokenStore | None = None
        self.receive: Receive | None = transport.receive
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

    def __len__(self) -> int:
        return len(self.source)

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


class CollatedRows:
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

    draws = True

    def __init__(self, dataset: Any, collate_fn: Collate) -> None:
        check_map_style(dataset, "the training data")
        self.source = dataset
        self.collate_fn = collate_fn
        self.receive: Receive | None = None
        tried = spread_ids(len(dataset), COLLATED_ROWS)
        widths = {self.candidates([i])["input_ids"].shape[1] for i in tried}
        self.candidates(tried[:2])  # a function that joins rows shows itself at two, not at one
        check_order(self._tried, tried, COLLATE)
        self.block_size: int | None = widths.pop() if len(widths) == 1 else None
        self.store: TokenStore | None = dataset if isinstance(dataset, TokenStore) else None
        if self.store is not None:
            self.vocab_size, self.fingerprint = self.store.vocab_size, self.store.fingerprint
            self.longest = max([self.block_size or 0, *widths])
        else:
            content = survey(len(dataset), self._read, strict=False, name="the training data")
            self.vocab_size, self.fingerprint = content.largest + 1, content.fingerprint
            self.longest = content.longest

    def __len__(self) -> int:
        return len(self.source)

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


def open_pool(rows: Rows, groups: str | None) -> CandidatePool:
    """Return the candidates of ``rows``, grouped by a column of their dataset, or by clusters or sources of a pool.

    A column of a dataset is part of the fingerprint: with other groups, what is known about each would be wrong.
    """
    if rows.store is not None:
        if groups is not None:
            return Clusters(rows.store, groups).pool(rows.fingerprint)
        names = rows.store.group_names
        codes = rows.store.groups if len(names) > 1 else None
        return CandidatePool(len(rows), rows.fingerprint, codes, names)
    if groups is None:
        return CandidatePool(len(rows), rows.fingerprint)
    values = np.asarray([str(value) for value in _column(getattr(rows, "source", rows), groups)])
    found, inverse = np.unique(values, return_inverse=True)
    groups_of = inverse.astype("<i4")
    digest = hashlib.blake2b(repr((rows.fingerprint, found.tolist())).encode(), digest_size=16)
    digest.update(groups_of.tobytes())
    codes = torch.from_numpy(groups_of.astype(np.int32))
    return CandidatePool(len(rows), digest.hexdigest(), codes, found.tolist())


def cost_of_groups(rows: Rows, groups: str | None) -> Mapping[str, Mapping[str, float]]:
    """Return the ``seconds`` by phase that making the groups took, where they are clusters of a pool; else nothing."""
    return Clusters(rows.store, groups).cost if rows.store is not None and groups is not None else {}


def _column(dataset: Any, name: str) -> Sequence[Any]:
    """Return one value per row of a dataset."""
    if (values := hugging_face.column(dataset, name)) is not None:
        return values
    values = []
    for start in range(0, len(dataset), CHUNK_ROWS):
        ids = range(start, min(start + CHUNK_ROWS, len(dataset)))
        with private_draws() as seed:
            rows = fetch(dataset, ids, candidate_seeds(ids), seed)
        for row in rows:
            if not isinstance(row, Mapping) or name not in row:
                columns = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
                raise ValueError(f"groups={name!r} is no column of the dataset; its rows have {columns}")
            value = row[name]
            values.append(value.item() if isinstance(value, (Tensor, np.generic)) and value.ndim == 0 else value)
    return values
