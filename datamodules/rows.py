"""The rows of a pool, whatever holds them: read by id, and collated as candidates and as training batches."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules import transport
from liveselect.datamodules.cluster import Clusters
from liveselect.datamodules.tokens import TokenStore
from liveselect.pool import CandidatePool
from liveselect.protocols import IGNORE_INDEX

SPREAD = 64  # rows of a data set that are looked at before training: for its fingerprint, length and vocabulary

Collate = Callable[[Any], Any]
Receive = Callable[[Any], Any]


class Rows(Protocol):
    """The rows of a pool as a SelectionDataModule uses them.

    Attributes:
        dataset: what the training loader reads; map-style.
        collate_fn: makes a batch of what the dataset returns for a list of ids, in a worker.
        receive: makes the training batch of that, in the process that trains; None where it is one already.
        vocab_size: every token id is below it, as far as was looked at.
        block_size: tokens of every row, None when rows differ.
        fingerprint: identifies the content.
        store: the prepared pool behind the rows, if there is one.
    """

    dataset: Any
    collate_fn: Collate
    receive: Receive | None
    vocab_size: int
    block_size: int | None
    fingerprint: str
    store: TokenStore | None

    def __len__(self) -> int:
        """Return the number of rows."""

    def candidates(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the rows ``ids (B,)`` as a candidate batch."""


class StoreRows:
    """The rows of a prepared pool; batches are ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``."""

    def __init__(self, store: TokenStore) -> None:
        self.store: TokenStore | None = store
        self._store = store
        self.dataset = self
        self.collate_fn: Collate = transport.send
        self.receive: Receive | None = transport.receive
        self.vocab_size = store.vocab_size
        self.block_size: int | None = store.block_size
        self.fingerprint = store.fingerprint

    def __len__(self) -> int:
        return len(self._store)

    def __getitems__(self, ids: Sequence[int]) -> dict[str, Tensor]:
        return self.candidates(ids)

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
        dataset: Hugging Face datasets are read through their numpy format; ``__getitems__`` is used where it exists.

    Raises:
        TypeError: the dataset has no length, or its rows are not dicts.
        ValueError: rows have no ``input_ids``.
    """

    def __init__(self, dataset: Any) -> None:
        check_map_style(dataset, "the pool")
        self.source = dataset
        self.store: TokenStore | None = None
        self.dataset = self
        self.collate_fn: Collate = transport.send
        self.receive: Receive | None = transport.receive
        self._view = _numpy_view(dataset)
        spread = read_token_rows(self._view, spread_ids(len(dataset)))
        lengths = {len(tokens) for tokens, _ in spread}
        self.vocab_size = max((int(tokens.max()) for tokens, _ in spread if len(tokens)), default=0) + 1
        self.block_size = lengths.pop() if len(lengths) == 1 else None
        self.fingerprint = dataset_fingerprint(dataset, [tokens for tokens, _ in spread])

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, ids: Sequence[int]) -> dict[str, Tensor]:
        return self.candidates(ids)

    def candidates(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows ``ids (B,)`` as a candidate batch."""
        return pad_rows(read_token_rows(self._view, ids), ids)


class CollatedRows:
    """The rows of a dataset whose batches are made by somebody else's collate function.

    Training batches are what that function returns, untouched. Candidate batches get what the engine needs beside it:
    ``id``, and ``labels`` where there are none.

    Args:
        dataset: map-style; its rows may be anything.
        collate_fn: must keep the rows in their order, one row of the batch for each.

    Raises:
        TypeError: the dataset has no length, or batches are no mappings.
        ValueError: batches have no ``input_ids``, or another number of rows than they were made of.
    """

    def __init__(self, dataset: Any, collate_fn: Collate) -> None:
        check_map_style(dataset, "the training data")
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.receive: Receive | None = None
        rows = [self.candidates([i])["input_ids"][0].numpy() for i in spread_ids(len(dataset))]
        lengths = {len(row) for row in rows}
        self.vocab_size = max((int(row.max()) for row in rows if len(row)), default=0) + 1
        self.block_size: int | None = lengths.pop() if len(lengths) == 1 else None
        self.fingerprint = dataset_fingerprint(dataset, rows)
        self.store: TokenStore | None = None
        if isinstance(dataset, TokenStore):
            self.store, self.vocab_size, self.fingerprint = dataset, dataset.vocab_size, dataset.fingerprint
        self.candidates(spread_ids(len(dataset))[:2])  # a function that joins rows shows itself at two, not at one

    def __len__(self) -> int:
        return len(self.dataset)

    def candidates(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the rows ``ids (B,)`` as a candidate batch."""
        batch = self.collate_fn(fetch(self.dataset, ids))
        return complete_batch(batch, ids, "the collate function of the training data")


def complete_batch(batch: Any, ids: Sequence[int], name: str) -> dict[str, Any]:
    """Return a batch of the rows ``ids (B,)`` with ``id`` and ``labels``; what it had stays as it was."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"expected {name} to return a mapping with input_ids, got {type(batch).__name__}")
    if "input_ids" not in batch:
        raise ValueError(f"expected {name} to return input_ids, got the keys {sorted(map(str, batch))}")
    batch = dict(batch)
    tokens = batch["input_ids"]
    if not isinstance(tokens, (Tensor, np.ndarray)):
        raise TypeError(
            f"expected {name} to return input_ids as one tensor (B, T), got {type(tokens).__name__}: the default "
            "collate function stacks tensors only, so let the dataset return tensors (datasets: with_format('torch'))"
        )
    tokens = torch.as_tensor(tokens)
    if tokens.dim() != 2 or len(tokens) != len(ids):
        raise ValueError(
            f"expected {name} to return one row for each example, got input_ids {tuple(tokens.shape)} for {len(ids)} "
            "examples: selection cannot trace rows that are dropped, joined or packed while collating"
        )
    batch["input_ids"] = tokens
    batch["id"] = torch.as_tensor(ids, dtype=torch.int64)
    if "labels" not in batch:
        batch["labels"] = tokens.clone()
        if "attention_mask" in batch:
            batch["labels"].masked_fill_(torch.as_tensor(batch["attention_mask"]) == 0, IGNORE_INDEX)
    return batch


def open_pool(rows: Rows, groups: str | None) -> CandidatePool:
    """Return the candidates of ``rows``, grouped by a column of their dataset, or by clusters or sources of a pool."""
    if rows.store is not None:
        if groups is not None:
            return Clusters(rows.store, groups).pool(rows.fingerprint)
        names = rows.store.group_names
        codes = rows.store.groups if len(names) > 1 else None
        return CandidatePool(len(rows), rows.fingerprint, codes, names)
    if groups is None:
        return CandidatePool(len(rows), rows.fingerprint)
    values = np.asarray([str(value) for value in _column(getattr(rows, "source", rows.dataset), groups)])
    found, inverse = np.unique(values, return_inverse=True)
    return CandidatePool(len(rows), rows.fingerprint, torch.from_numpy(inverse.astype(np.int32)), found.tolist())


def check_map_style(dataset: Any, what: str) -> None:
    """Raise unless ``dataset`` has a length and rows that can be asked for by position."""
    if isinstance(dataset, torch.utils.data.IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"expected {what} as a map-style dataset (with __len__ and __getitem__), got {type(dataset).__name__}: "
            "selection asks for rows by their position, which a stream cannot give. Write the stream to disk with "
            "`liveselect prepare`, or pass a map-style dataset"
        )
    if len(dataset) == 0:
        raise ValueError(f"{what} is empty: {type(dataset).__name__} has no rows")


def fetch(dataset: Any, ids: Sequence[int]) -> list[Any]:
    """Return the rows ``ids`` of a map-style dataset as a ``DataLoader`` would."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(ids))
    return [dataset[i] for i in ids]


def read_token_rows(dataset: Any, ids: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ``input_ids (T,)`` and ``labels (T,)``, int64, of the rows ``ids``; masked tokens carry no loss."""
    return [token_row(row, f"row {i} of the pool") for i, row in zip(ids, fetch(dataset, ids), strict=True)]


def token_row(row: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ``input_ids (T,)`` and ``labels (T,)`` of one row; a padded row keeps its padding, without loss."""
    if not isinstance(row, Mapping):
        raise TypeError(f"expected {where} as a dict with input_ids, got {type(row).__name__}")
    if "input_ids" not in row:
        raise ValueError(
            f"expected {where} to have input_ids, got the columns {sorted(map(str, row))}: text has to be made a pool "
            "first (`liveselect prepare`), or rename the column"
        )
    tokens = np.asarray(row["input_ids"], dtype=np.int64)
    labels = np.array(row.get("labels", tokens), dtype=np.int64)
    if tokens.ndim != 1 or labels.shape != tokens.shape:
        raise ValueError(
            f"expected {where} to have one-dimensional input_ids and labels of one length, got shapes {tokens.shape} "
            f"and {labels.shape}"
        )
    if "attention_mask" in row and "labels" not in row:
        labels[np.asarray(row["attention_mask"]) == 0] = IGNORE_INDEX
    return tokens, labels


def pad_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], ids: Sequence[int], pad_id: int = 0) -> dict[str, Tensor]:
    """Return ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``, padded on the right to the longest row.

    No attention mask: in a causal model no token sees what stands to its right.
    """
    width = max(len(tokens) for tokens, _ in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    for i, (tokens, targets) in enumerate(rows):
        input_ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = targets
    return {
        "id": torch.as_tensor(ids, dtype=torch.int64),
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
    }


def spread_ids(size: int) -> list[int]:
    """Return the positions of up to ``SPREAD`` rows, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, SPREAD)).astype(np.int64)).tolist()


def dataset_fingerprint(dataset: Any, rows: Sequence[np.ndarray]) -> str:
    """Return the fingerprint of a Hugging Face dataset, or else a hash of the length and the given spread of rows."""
    if isinstance(known := getattr(dataset, "_fingerprint", None), str):
        return known
    digest = hashlib.blake2b(str(len(dataset)).encode(), digest_size=16)
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + np.ascontiguousarray(row, dtype="<i8").tobytes())
    return digest.hexdigest()


def _numpy_view(dataset: Any) -> Any:
    """Return a Hugging Face dataset in its numpy format, restricted to token columns; other datasets as they are."""
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "column_names")):
        return dataset
    columns = [name for name in ("input_ids", "labels", "attention_mask") if name in dataset.column_names]
    return dataset.with_format("numpy", columns=columns) if "input_ids" in columns else dataset


def _column(dataset: Any, name: str) -> Sequence[Any]:
    """Return one value per row of a dataset."""
    if hasattr(dataset, "column_names"):
        if name not in dataset.column_names:
            raise ValueError(f"groups={name!r} is no column of the dataset; the columns are {dataset.column_names}")
        return dataset.with_format(None)[name]
    first = dataset[0]
    if not isinstance(first, Mapping) or name not in first:
        columns = sorted(map(str, first)) if isinstance(first, Mapping) else type(first).__name__
        raise ValueError(f"groups={name!r} is no column of the dataset; its rows have {columns}")
    return [dataset[i][name] for i in range(len(dataset))]
