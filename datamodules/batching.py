"""Items of different lengths to batches with little padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liveselect.datamodules.rows.token_rows import pad_rows
from liveselect.grammar import IGNORE_INDEX

MIN_LENGTH_SHARE = 7 / 8  # a row shorter than this share of the longest begins a new batch: padding stays below 1/8


@dataclass(frozen=True)
class Item:
    """One tokenised example of the reference set.

    Attributes:
        input_ids: ``(T,)`` int64.
        labels: ``(T,)`` int64, -100 where no loss is taken.
        record: position of its record.
        subtask: number of the subtask that it is of, None where subtasks are not named.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    record: int
    subtask: int | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """The number of tokens that carry loss; the first never does, because no token precedes it."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def bucket(items: Sequence[Item], tokens: int, pad_id: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of at most ``tokens`` tokens, padding included, longest rows first.

    Rows of one batch have nearly the same length, so little padding is computed; where only the last tokens count (an
    answer, a last word), they are in nearly the same columns. The longest come first, so that a budget that does not
    fit in memory fails at once. An item longer than the budget is a batch by itself. ``id (B,)`` is the position in
    ``items``; the other keys are ``input_ids (B, T)`` and ``labels (B, T)``, and ``subtask (B,)`` where items have one.
    """
    order = sorted(range(len(items)), key=lambda i: (-len(items[i]), items[i].targets, i))
    batches: list[list[int]] = []
    for i in order:
        width = len(items[batches[-1][0]]) if batches else 0
        if not batches or (len(batches[-1]) + 1) * width > tokens or len(items[i]) < MIN_LENGTH_SHARE * width:
            batches.append([])
        batches[-1].append(i)
    return [_padded(items, rows, pad_id) for rows in batches]


def _padded(items: Sequence[Item], rows: Sequence[int], pad_id: int) -> dict[str, Tensor]:
    batch = pad_rows([(items[i].input_ids, items[i].labels) for i in rows], rows, pad_id)
    subtasks = [number for i in rows if (number := items[i].subtask) is not None]
    return {**batch, "subtask": torch.tensor(subtasks)} if subtasks else batch


def pack(items: Sequence[Item], width: int, tokens: int, pad_id: int = 0) -> list[dict[str, Tensor]]:
    """Return batches of rows of ``width`` tokens that hold several items each, with ``position_ids (B, T)``.

    Positions begin at 0 in every item: models that build their attention mask from positions keep items apart; in all
    others, each item sees the items before it. An item's first token is no target, since another item precedes it.
    ``id (B,)`` counts the rows.
    """
    rows = _fill(items, width)
    per_batch = max(1, tokens // width)
    batches = []
    for first in range(0, len(rows), per_batch):
        part = rows[first : first + per_batch]
        tokens_and_labels = [_join([items[i] for i in row]) for row in part]
        batch = pad_rows(tokens_and_labels, range(first, first + len(part)), pad_id)
        columns = batch["input_ids"].shape[1]
        lengths = [[len(items[i]) for i in row] for row in part]
        batch["position_ids"] = torch.stack([_positions(row, columns) for row in lengths])
        batches.append(batch)
    return batches


def _fill(items: Sequence[Item], width: int) -> list[list[int]]:
    """Return the items of each row: the longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: (-len(items[i]), i)):
        row = next((r for r, free in enumerate(room) if free >= len(items[i])), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= len(items[i])
    return rows


def _join(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    labels = [item.labels.copy() for item in items]
    for part in labels:
        part[0] = IGNORE_INDEX
    return np.concatenate([item.input_ids for item in items]), np.concatenate(labels)


def _positions(lengths: Sequence[int], columns: int) -> Tensor:
    parts = [*lengths, columns - sum(lengths)]  # the padding is one more item
    return torch.cat([torch.arange(length) for length in parts])
