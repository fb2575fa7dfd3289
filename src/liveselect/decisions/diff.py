"""What two runs chose differently."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch

from liveselect.decisions.files import find_decisions, read_about, read_rows, read_scores, rounds_in
from liveselect.functional.correlation import spearman

MAX_SCORES_COMPARED = 1_000_000
"""Scores in a rank correlation, the first ones: enough for three digits, and sorted within a second."""


@dataclass(frozen=True)
class RoundDifference:
    """One round of two runs.

    Attributes:
        round: index of the round.
        same_plan: whether they trained on the same candidates in the same order.
        chosen: number of candidates that each chose.
        shared: number of candidates that both chose.
        mixture: distance of the shares of groups, 0 alike .. 1 disjoint (total variation).
        scored: number of candidates that both compared.
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
    scored = [read_scores(path) for path in paths]
    shared, *places = np.intersect1d(*(rows["id"].to_numpy() for rows in scored), return_indices=True)
    scores = [rows["score"].to_numpy()[place[:MAX_SCORES_COMPARED]] for rows, place in zip(scored, places, strict=True)]
    return RoundDifference(
        round=int(abouts[0]["round"]),
        same_plan=abouts[0]["plan"] == abouts[1]["plan"],
        chosen=(len(chosen[0]), len(chosen[1])),
        shared=len(np.intersect1d(*(rows["id"].to_numpy() for rows in chosen))),
        mixture=sum(abs(shares[0].get(name, 0.0) - shares[1].get(name, 0.0)) for name in {**shares[0], **shares[1]})
        / 2,
        scored=len(shared),
        correlation=spearman(*map(torch.from_numpy, scores)),
    )


def _shares(groups: pa.ChunkedArray) -> dict[str, float]:
    counts = groups.value_counts().to_pylist()
    return {each["values"]: each["counts"] / len(groups) for each in counts}
