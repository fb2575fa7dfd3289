"""Scores from a column of numbers in the metadata of a prepared pool."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from liveselect.datamodules import TokenStore
from liveselect.datamodules.pools.pool_files import DOCUMENTS


def column_scores(store: TokenStore, column: str) -> np.ndarray:
    """Return the mean of a metadata column over the tokens of each block, ``(rows,)`` float64.

    Documents without a number do not count; a block that has only such documents is -inf, and is never drawn.

    Raises:
        ValueError: there is no such column, or it holds no numbers, or integers that no float64 holds.
    """
    file = pq.ParquetFile(store.path / DOCUMENTS)
    _check_column(file.schema_arrow, column, store.path)
    sums, weights = np.zeros(store.rows), np.zeros(store.rows)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, ["start", "tokens", f"metadata.{column}"])
        values = pa.chunked_array(table["metadata"]).combine_chunks().field(column)
        try:
            numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"the column {column!r} of the documents in {store.path} holds integers that no float64 holds exactly "
                f"({error}): prepare the pool from documents with smaller numbers"
            ) from error
        known = ~np.isnan(numbers)
        starts, tokens = (table[name].to_numpy()[known] for name in ("start", "tokens"))
        _add(sums, weights, starts, tokens, numbers[known], store.block_size)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weights > 0, sums / weights, -np.inf)


def _add(
    sums: np.ndarray, weights: np.ndarray, starts: np.ndarray, tokens: np.ndarray, numbers: np.ndarray, block_size: int
) -> None:
    """Add the documents' numbers to the blocks of their tokens, weighted by the number of tokens in each."""
    first = starts // block_size
    spanned = (starts + np.maximum(tokens, 1) - 1) // block_size - first + 1
    document = np.repeat(np.arange(len(starts)), spanned)
    block = first[document] + np.arange(len(document)) - np.repeat(np.cumsum(spanned) - spanned, spanned)
    inside = block < len(sums)  # tokens that did not fill a last block are in none
    document, block = document[inside], block[inside]
    begin = np.maximum(starts[document], block * block_size)
    end = np.minimum(starts[document] + tokens[document], (block + 1) * block_size)
    np.add.at(sums, block, (end - begin) * numbers[document])
    np.add.at(weights, block, end - begin)


def _check_column(schema: pa.Schema, column: str, path: Path) -> None:
    fields = {}
    if "metadata" in schema.names:
        kind = schema.field("metadata").type
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    numeric = sorted(
        name
        for name, kind in fields.items()
        if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    )
    if column not in numeric:
        state = "does not hold numbers" if column in fields else "is not there"
        raise ValueError(
            f"the column {column!r} of the documents in {path} {state}: columns of numbers are {numeric or 'none'}. "
            "`liveselect prepare` keeps the columns that the documents come with"
        )
