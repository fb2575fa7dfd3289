"""Hugging Face datasets, read by columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from liveselect.datamodules.rows.content import Chunk

COLUMNS = ("input_ids", "labels", "attention_mask")


def visible_columns(dataset: Any) -> list[str] | None:
    """Return the columns that rows of a Hugging Face dataset show; None for other datasets, and transformed ones.

    What a transform returns is known only by calling it: such a dataset is read row by row.
    """
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "column_names") and hasattr(dataset, "format")):
        return None
    form = dataset.format
    if form["type"] == "custom":
        return None
    return list(dataset.column_names if form["output_all_columns"] else form["columns"])


def numpy_view(dataset: Any) -> Any:
    """Return a Hugging Face dataset in its numpy format, restricted to token columns; other datasets as they are."""
    columns = [name for name in COLUMNS if name in (visible_columns(dataset) or ())]
    return dataset.with_format("numpy", columns=columns) if "input_ids" in columns else dataset


def arrow_view(dataset: Any) -> Any:
    """Return a Hugging Face dataset as Arrow tables of its token columns, None unless these are lists of integers."""
    columns = [name for name in COLUMNS if name in (visible_columns(dataset) or ())]
    if "input_ids" not in columns:
        return None
    view = dataset.with_format("arrow", columns=columns)
    is_plain = all(_is_list_of_integers(kind) for kind in view[:1].schema.types)
    return view if is_plain else None


def read_chunk(view: Any, ids: Sequence[int]) -> Chunk | None:
    """Return the rows ``ids`` of an :func:`arrow_view`; None where they have to be looked at one by one.

    That is where values are missing, where a row's columns are of different lengths, and where tokens are hidden.
    """
    table = view[ids.start : ids.stop] if isinstance(ids, range) else view[list(ids)]
    columns = {name: _flat(table[name]) for name in table.column_names}
    if any(column is None for column in columns.values()):
        return None
    lengths, tokens = columns["input_ids"]  # type: ignore[misc]
    if any(not np.array_equal(lengths, column[0]) for column in columns.values() if column is not None):
        return None
    if "attention_mask" in columns and not columns["attention_mask"][1].all():  # type: ignore[index]
        return None
    labels = columns["labels"][1] if "labels" in columns else tokens  # type: ignore[index]
    return Chunk(lengths, tokens, labels)


def column(dataset: Any, name: str) -> list[Any] | None:
    """Return a column of a Hugging Face dataset, one value for each row, or None where the rows have to be asked.

    Raises:
        ValueError: there is no such column.
    """
    if visible_columns(dataset) is None:
        return None
    if name not in dataset.column_names:
        raise ValueError(f"groups={name!r} is no column of the dataset; the columns are {dataset.column_names}")
    return list(dataset.with_format(None)[name])


def _is_list_of_integers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return lengths ``(n,)`` and values ``(sum,)`` of a column of lists, None where some are missing."""
    lists = lists.combine_chunks() if lists.num_chunks != 1 else lists.chunk(0)
    values = pc.list_flatten(lists)
    if lists.null_count or values.null_count:
        return None
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, values.to_numpy(zero_copy_only=False)
