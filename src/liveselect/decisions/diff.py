"""What two runs chose differently."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from liveselect.decisions.files import find_decisions, read_about, read_rows, rounds_in

COMPARED_MOST = 1_000_000
"""Scores compared in a rank correlation; of more, the first."""


@dataclass(frozen=True)
class RoundDifference:
    """One round of two runs.

    Attributes:
        round: index of the round.
        same_plan: whether they trained on the same candidates in the same order.
        chosen: how many each chose.
        shared: how many candidates both chose in this round.
        mixture: distance of the shares of groups, 0 alike .. 1 disjoint (total variation).
        scored: how many candidates both compared.
        correlation: Spearman of their scores, NaN where fewer than three were compared by both.
    """

    round: int
    same_plan: bool
    chosen: tuple[int, int]
    shared: int
    mixture: float
    scored: int
    correlation: float


def compare_runs(first: str | Path, second: str | Path) -> list[RoundDifference]:
    """Return the differences of the rounds that both runs recorded, in order.

    Raises:
        FileNotFoundError: a run has no recorded decisions.
        ValueError: the runs chose from different pools, or a file is damaged.
    """
    folders = find_decisions(first), find_decisions(second)
    rounds = [rounds_in(folder) for folder in folders]
    pools = [read_about(next(iter(found.values())))["pool"] for found in rounds]
    if pools[0] != pools[1]:
        raise ValueError(
            f"{folders[0]} chose from the pool {pools[0]!r} and {folders[1]} from {pools[1]!r}: ids of different pools "
            "cannot be compared"
        )
    return [compare_rounds(path, rounds[1][index]) for index, path in rounds[0].items() if index in rounds[1]]


def compare_rounds(first: Path, second: Path) -> RoundDifference:
    """Return the difference of two rounds' files."""
    paths = first, second
    abouts = [read_about(path) for path in paths]
    chosen = [read_rows(path, ["id", "group"], ds.field("chosen")) for path in paths]
    shares = [_shares(rows["group"]) for rows in chosen]
    scored = [read_rows(path, ["id", "score"], pc.is_finite(ds.field("score"))) for path in paths]
    shared, *places = np.intersect1d(*(rows["id"].to_numpy() for rows in scored), return_indices=True)
    scores = [rows["score"].to_numpy()[place[:COMPARED_MOST]] for rows, place in zip(scored, places, strict=True)]
    return RoundDifference(
        round=int(abouts[0]["round"]),
        same_plan=abouts[0]["plan"] == abouts[1]["plan"],
        chosen=(len(chosen[0]), len(chosen[1])),
        shared=len(np.intersect1d(*(rows["id"].to_numpy() for rows in chosen))),
        mixture=sum(abs(shares[0].get(name, 0.0) - shares[1].get(name, 0.0)) for name in {**shares[0], **shares[1]})
        / 2,
        scored=len(shared),
        correlation=spearman(*scores),
    )


def spearman(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Return the rank correlation of two samples ``(n,)``; NaN below three values or when one does not vary."""
    if len(first) < 3 or not np.ptp(first) or not np.ptp(second):
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def _shares(groups: pa.ChunkedArray) -> dict[str, float]:
    counts = groups.value_counts().to_pylist()
    return {each["values"]: each["counts"] / len(groups) for each in counts}
