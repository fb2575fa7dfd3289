"""Rows whose vectors point nearly the same way."""

import torch
from torch import Tensor

_BLOCK = 1024  # rows compared at once
_ITERATIONS = 10
_SAMPLE = 1 << 17  # rows that clusters are fitted on


def near_vectors(units: Tensor, threshold: float, clusters: int = 1) -> Tensor:
    """Return which rows are near an earlier row of their cluster, ``(n,)`` bool.

    So a chain of near-duplicates is dropped but for its first row, even where its ends are far from each other.

    Args:
        units: ``(n, D)`` float32, of unit length.
        threshold: cosine above which two rows are near-duplicates.
        clusters: of spherical k-means; rows of different clusters are not compared, which takes their number times
            less work and misses pairs at the borders.

    Source: Abbas et al. 2023, "SemDeDup", arXiv 2303.09540, which keeps the rows far from the centroid first; here the
    first in the pool.
    """
    place = _clustered(units, clusters)
    dropped = torch.zeros(len(units), dtype=torch.bool)
    for cluster in range(clusters):
        rows = (place == cluster).nonzero()[:, 0]
        members = units[rows]
        for start in range(0, len(rows), _BLOCK):
            part = members[start : start + _BLOCK]
            cosines = part @ members[: start + len(part)].T
            dropped[rows[start : start + len(part)]] = near_an_earlier(cosines, threshold, start)
    return dropped


def near_an_earlier(cosines: Tensor, threshold: float, start: int = 0) -> Tensor:
    """Return which rows are near an earlier one, ``(b,)`` bool, from ``cosines (b, start + b)`` with rows 0, 1, ..."""
    earlier = torch.ones_like(cosines, dtype=torch.bool).tril(start - 1)
    return ((cosines > threshold) & earlier).any(dim=1)


def _clustered(units: Tensor, clusters: int) -> Tensor:
    """Return the cluster of each row by spherical k-means, ``(n,)`` int64."""
    if clusters == 1:
        return torch.zeros(len(units), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    sample = units[torch.randperm(len(units), generator=generator)[:_SAMPLE]]
    centres = sample[:clusters].clone()
    for _ in range(_ITERATIONS):
        sums = torch.zeros_like(centres).index_add_(0, _nearest(sample, centres), sample)
        lengths = sums.norm(dim=1, keepdim=True)
        centres = torch.where(lengths > 0, sums / lengths.clamp(min=torch.finfo(torch.float32).tiny), centres)
    return _nearest(units, centres)


def _nearest(units: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([(part @ centres.T).argmax(dim=1) for part in units.split(_BLOCK)])
