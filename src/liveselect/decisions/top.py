"""The candidates that a round chose first."""

from pathlib import Path

import pyarrow.dataset as ds

from liveselect.decisions.files import find_decisions, read_rows, rounds_in
from liveselect.decisions.table import Row

_COLUMNS = ("id", "group", "score", "influence", "place", "reason")


def top_chosen(run: str | Path, count: int) -> tuple[int, list[Row]]:
    """Return the last round with scores (or else the last one), and the ``count`` candidates that it chose first.

    These are the ones with the highest scores; where nothing was scored, those that are trained on first.

    Raises:
        FileNotFoundError: there are no recorded decisions.
        ValueError: a file is damaged.
    """
    rounds = rounds_in(find_decisions(run))
    found: list[Row] = []
    last = -1
    for index, path in reversed(rounds.items()):
        rows = read_rows(path, _COLUMNS, ds.field("chosen")).to_pylist()
        if last < 0 or any(row["score"] is not None for row in rows):
            last, found = index, rows
        if any(row["score"] is not None for row in found):
            break
    found.sort(key=lambda row: (row["score"] is None, -(row["score"] or 0.0), row["place"]))
    return last, found[:count]
