"""Hugging Face datasets, read by columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from liveselect.datamodules.rows.columns import TARGETS, Columns
from liveselect.datamodules.rows.content import Chunk
from liveselect.datamodules.rows.draws import MapStyle

if TYPE_CHECKING:
    from datasets import Dataset

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask")


def _is_readable_by_columns(dataset: MapStyle) -> "TypeGuard[Dataset]":
    """Return whether a dataset is a Hugging Face dataset without a transform.

    A transform has to be called to know what it returns: such a dataset is read row by row.
    """
    named = ("with_format", "column_names", "format")
    return all(hasattr(dataset, name) for name in named) and cast("Dataset", dataset).format["type"] != "custom"


def _token_columns(dataset: MapStyle) -> list[str]:
    """Return the token columns that rows of a Hugging Face dataset show, none of other datasets."""
    if not _is_readable_by_columns(dataset):
        return []
    shown = dataset.column_names if dataset.format["output_all_columns"] else dataset.format["columns"]
    return [name for name in TOKEN_COLUMNS if name in shown]


def renamed(dataset: MapStyle, columns: Columns | None) -> tuple[MapStyle, Columns | None]:
    """Return a Hugging Face dataset with its columns under the names of their roles; others as they are, with columns.

    Nothing is copied. Targets, which are moved by a place, stay a matter of each row.
    """
    if columns is None or TARGETS in columns or not _is_readable_by_columns(dataset):
        return dataset, columns
    if not set(columns.values()) <= set(dataset.column_names):
        return dataset, columns  # whoever reads the first row says which column is missing
    hidden = [name for name in dataset.column_names if name in TOKEN_COLUMNS and name not in columns.values()]
    names = {str(name): role for role, name in columns.items() if name != role}
    return dataset.remove_columns(hidden).rename_columns(names), None


def numpy_view(dataset: MapStyle) -> MapStyle:
    """Return a Hugging Face dataset in its numpy format, restricted to token columns; other datasets as they are."""
    columns = _token_columns(dataset)
    if _is_readable_by_columns(dataset) and "input_ids" in columns:
        return dataset.with_format("numpy", columns=columns)
    return dataset


def arrow_view(dataset: MapStyle) -> "Dataset | None":
    """Return a Hugging Face dataset as Arrow tables of its token columns, None unless these are lists of integers."""
    columns = _token_columns(dataset)
    if not _is_readable_by_columns(dataset) or "input_ids" not in columns:
        return None
    view = dataset.with_format("arrow", columns=columns)
    return view if all(map(_is_list_of_integers, view[:1].schema.types)) else None


def read_chunk(view: "Dataset", ids: Sequence[int]) -> Chunk | None:
    """Return the rows ``ids`` of an :func:`arrow_view`; None where they have to be read one by one.

    That is where values are missing, where a row's columns are of different lengths, and where tokens are hidden.
    """
    table = view[ids.start : ids.stop] if isinstance(ids, range) else view[list(ids)]
    columns: dict[str, np.ndarray] = {}
    all_lengths: list[np.ndarray] = []
    for name in table.column_names:
        flat = _flat(table[name])
        if flat is None:
            return None
        lengths, columns[name] = flat
        all_lengths.append(lengths)
    if not all(np.array_equal(lengths, other) for other in all_lengths):
        return None
    if "attention_mask" in columns and not columns["attention_mask"].all():
        return None
    return Chunk(lengths, columns["input_ids"], columns.get("labels", columns["input_ids"]))


def column(dataset: MapStyle, name: str) -> list[object] | None:
    """Return a column of a Hugging Face dataset, one value for each row; None where rows have to be read one by one.

    Raises:
        ValueError: there is no such column.
    """
    if not _is_readable_by_columns(dataset):
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
