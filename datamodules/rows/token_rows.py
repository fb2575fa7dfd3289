"""Rows of token ids from datasets, and batches of them, checked and brought into one form."""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from liveselect.datamodules.rows.by_position import ByPosition, is_readable_by_position
from liveselect.datamodules.rows.columns import Columns, by_role
from liveselect.datamodules.rows.draws import MapStyle
from liveselect.grammar import IGNORE_INDEX

WEIGHTS = frozenset({"weight", "weights", "sample_weight", "example_weight", "loss_weight", "importance", "loss_mask"})
"""Fields that would change the loss if they had an effect."""

SEEN = ("attention_mask", "input_mask")
"""Fields with 1 where ready ids are tokens, and 0 where they are padding."""

COUNTED = ("loss_mask", "completion_mask", "assistant_mask", "assistant_masks")
"""Fields with 1 where ready ids carry loss, and 0 where they do not: padding, but prompts too."""

UNCLEAR = ("padding_mask", "pad_mask", "key_padding_mask", "mask")
"""Fields in which some tools mark padding with 1, and others tokens."""

MASKS = frozenset({*SEEN, *COUNTED, *UNCLEAR} - {"attention_mask"})
"""Fields that would hide tokens of a row if they had an effect."""

FOR_MASKS = (
    "which has no effect: tokens are hidden by an attention_mask, with 1 for tokens and 0 for padding, or by labels of "
    f"{IGNORE_INDEX}. Rename it, or leave it out"
)
"""What is said of such a field, after its name."""


def masks_of(row: Mapping) -> list[str]:
    """Return the names of what would hide tokens of a row, and has no effect."""
    return sorted(name for name in MASKS & {str(key) for key in row} if np.ndim(row.get(name, 0)) > 0)


def check_map_style(
    dataset: object, what: str, instead: str = "Write the stream to disk with `liveselect prepare`"
) -> MapStyle:
    """Return ``dataset``; raise unless it has a length and rows that can be read by position.

    A dataset that calls itself iterable and can be asked by position comes back as one that is. ``instead`` says what
    to do with a stream.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) and is_readable_by_position(dataset):
        dataset = ByPosition(dataset)
    elif isinstance(dataset, torch.utils.data.IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise TypeError(
            f"expected {what} as a map-style dataset (with __len__ and __getitem__), got {type(dataset).__name__}: "
            f"selection reads rows by their position, which a stream does not allow. {instead}, or pass a map-style "
            "dataset"
        )
    if isinstance(dataset, Mapping) and 0 not in dataset:
        raise TypeError(
            f"expected {what} as a sequence of rows, got a {type(dataset).__name__} with the keys "
            f"{sorted(map(str, dataset))[:5]}: pass one split of a dataset, or a list of its values"
        )
    if isinstance(dataset, (torch.Tensor, np.ndarray)) and dataset.ndim != 2:
        raise TypeError(
            f"expected {what} as rows of tokens, got an array of shape {tuple(dataset.shape)}: cut one stream of ids "
            "into blocks, stream[: n // T * T].reshape(-1, T), or pass its file, TokenFiles(path, block_size=T)"
        )
    if len(cast("MapStyle", dataset)) == 0:
        raise ValueError(f"{what} is empty: {type(dataset).__name__} has no rows")
    return cast("MapStyle", dataset)


def integers(values: ArrayLike, name: str, where: str) -> np.ndarray:
    """Return ``values`` of any shape as int64; raise TypeError, which names them, unless they are integers."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        held = "missing values or sequences" if array.dtype.kind == "O" else array.dtype.name
        raise TypeError(
            f"expected {name} of {where} as integers, got {held}: token ids are never rounded for you; convert them "
            "where they are made, or name the right column"
        )
    return array.astype(np.int64, copy=False)


def token_row(row: object, where: str, columns: Columns | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return ``input_ids (T,)`` and ``labels (T,)``, int64, of one row; a padded row keeps its padding, without loss.

    The row may have any form that :func:`~liveselect.datamodules.rows.columns.by_role` reads. Padding on the left is
    moved to the right, where no token can see it: batches made here have no attention mask.
    """
    row = by_role(row, columns, where)
    if "input_ids" not in row:
        raise ValueError(
            f"expected {where} to have input_ids, got the columns {sorted(map(str, row))}: name the one with token "
            "ids, columns={'input_ids': NAME}; text has to be made a pool first (`liveselect prepare`)"
        )
    tokens = integers(row["input_ids"], "input_ids", where)
    labels = integers(row["labels"], "labels", where) if row.get("labels") is not None else tokens
    if tokens.ndim != 1 or labels.shape != tokens.shape:
        raise ValueError(
            f"expected {where} to have one-dimensional input_ids and labels of one length, got shapes {tokens.shape} "
            f"and {labels.shape}"
        )
    labels = np.array(labels)  # a copy: labels are changed below, and the dataset must not be
    if row.get("attention_mask") is not None:
        return _without_hidden(tokens, labels, row["attention_mask"], "labels" in row, where)
    return tokens, labels


def _without_hidden(
    tokens: np.ndarray, labels: np.ndarray, attention_mask: ArrayLike, has_labels: bool, where: str
) -> tuple[np.ndarray, np.ndarray]:
    seen = np.asarray(attention_mask) != 0
    if seen.shape != tokens.shape:
        raise ValueError(
            f"expected attention_mask of {where} to have one entry for each of its {len(tokens)} tokens, got the shape "
            f"{seen.shape}"
        )
    if seen.all():
        return tokens, labels
    if not has_labels:
        labels[~seen] = IGNORE_INDEX
    places = np.flatnonzero(seen)
    if len(places) and places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            f"the attention_mask of {where} hides tokens between others, which cannot be padding, and training batches "
            "made here carry no mask: pass a collate_fn that returns the mask, or cut the hidden tokens out"
        )
    first = int(places[0]) if len(places) else 0
    return np.roll(tokens, -first), np.roll(labels, -first)


def pad_rows(rows: Sequence[tuple[np.ndarray, np.ndarray]], ids: Sequence[int], pad_id: int = 0) -> dict[str, Tensor]:
    """Return ``id (B,)``, ``input_ids (B, T)`` and ``labels (B, T)``, padded on the right to the longest row.

    There is no attention mask: in a causal model, no token sees those to its right.
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


def complete_batch(batch: object, ids: Sequence[int], name: str, columns: Columns | None = None) -> dict[str, Tensor]:
    """Return a batch of the rows ``ids (B,)`` with ``id`` and ``labels``; other keys stay as they were.

    The batch may have any form that :func:`~liveselect.datamodules.rows.columns.by_role` reads. Token ids and labels
    become int64, which losses and embeddings need.
    """
    batch = by_role(batch, columns, f"a batch of {name}")
    if "input_ids" not in batch:
        raise ValueError(
            f"expected {name} to return input_ids, got the keys {sorted(map(str, batch))}: name the one with token "
            "ids, columns={'input_ids': NAME}"
        )
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
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise TypeError(
            f"expected {name} to return input_ids as integers, got {tokens.dtype}: token ids are never rounded for "
            "you; convert them where they are made"
        )
    batch["input_ids"] = tokens = tokens.long()
    batch["id"] = torch.as_tensor(ids, dtype=torch.int64)
    if "labels" not in batch:
        batch["labels"] = _labels_of(tokens, batch.get("attention_mask"), name)
    elif isinstance(batch["labels"], (Tensor, np.ndarray)):
        labels = torch.as_tensor(batch["labels"])
        batch["labels"] = labels if labels.dtype.is_floating_point else labels.long()
    return batch


def _labels_of(tokens: Tensor, attention_mask: ArrayLike | Tensor | None, name: str) -> Tensor:
    """Return a copy of ``tokens (B, T)``, without loss where the mask hides them."""
    labels = tokens.clone()
    if attention_mask is None:
        return labels
    mask = torch.as_tensor(attention_mask)
    if mask.shape != tokens.shape:
        raise ValueError(
            f"expected {name} to return an attention_mask of the shape of input_ids, {tuple(tokens.shape)}, or labels "
            f"beside it, got the mask {tuple(mask.shape)}, which does not show the padding, whose tokens carry no loss"
        )
    return labels.masked_fill_(mask == 0, IGNORE_INDEX)
