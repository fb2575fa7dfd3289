"""What two runs chose differently."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from liveselect.decisions.files import find_decisions, read_about, read_round, rounds_in

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
    abouts = read_about(first), read_about(second)
    columns = [read_round(path, ["id", "chosen", "score", "group"]) for path in (first, second)]
    chosen = [part["chosen"].astype(bool) for part in columns]
    shared = np.intersect1d(*(part["id"][mask] for part, mask in zip(columns, chosen, strict=True)))
    mixtures = [_shares(part["group"][mask]) for part, mask in zip(columns, chosen, strict=True)]
    names = set(mixtures[0]) | set(mixtures[1])
    distance = sum(abs(mixtures[0].get(name, 0.0) - mixtures[1].get(name, 0.0)) for name in names) / 2
    scored, correlation = _score_correlation(columns[0], columns[1])
    return RoundDifference(
        round=int(abouts[0]["round"]),
        same_plan=abouts[0]["plan"] == abouts[1]["plan"],
        chosen=(int(chosen[0].sum()), int(chosen[1].sum())),
        shared=len(shared),
        mixture=distance,
        scored=scored,
        correlation=correlation,
    )


def spearman(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Return the rank correlation of two samples ``(n,)``, with mean ranks for ties; NaN when one does not vary."""
    if len(first) < 3:
        return float("nan")
    ranks = [_mean_ranks(values) for values in (first, second)]
    deviations = [values - values.mean() for values in ranks]
    scale = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum() / scale) if scale else float("nan")


def _mean_ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return ((ends - 1 + ends - counts) / 2)[inverse]


def _score_correlation(first: dict[str, Any], second: dict[str, Any]) -> tuple[int, float]:
    known = [part["id"][np.isfinite(part["score"])] for part in (first, second)]
    scores = [part["score"][np.isfinite(part["score"])] for part in (first, second)]
    ids, left, right = np.intersect1d(*known, return_indices=True)
    if len(ids) > COMPARED_MOST:
        left, right = left[:COMPARED_MOST], right[:COMPARED_MOST]
    return len(ids), spearman(scores[0][left], scores[1][right])


def _shares(groups: npt.NDArray[Any]) -> dict[str, float]:
    names, counts = np.unique(groups.astype(str), return_counts=True)
    return {str(name): float(count) / max(1, len(groups)) for name, count in zip(names, counts, strict=True)}
