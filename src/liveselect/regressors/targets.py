"""Distinct targets of unit variance, for all regressors."""

from typing import NamedTuple

import torch
from torch import Tensor

from liveselect.grammar import MIN_MEASUREMENTS


class Targets(NamedTuple):
    """Distinct measured candidates: ``ids (m,)`` ascending and ``influence (m,)`` float64."""

    ids: Tensor
    influence: Tensor


def distinct_targets(ids: Tensor, influence: Tensor) -> Targets:
    """Return every candidate once, with the mean of its measurements: a split must not put one on both sides.

    Raises:
        ValueError: the shapes differ, an influence is not finite, or there are fewer than 8 distinct candidates.
    """
    if ids.shape != influence.shape or ids.dim() != 1:
        raise ValueError(f"expected ids (m,) and influence (m,), got {tuple(ids.shape)} and {tuple(influence.shape)}")
    broken = int((~influence.isfinite()).sum())
    if broken:
        raise ValueError(
            f"expected finite influence, got {broken} of {len(ids)} that are not: leave them out of the fit"
        )
    unique, place, repeats = torch.unique(ids.cpu(), return_inverse=True, return_counts=True)
    if len(unique) < MIN_MEASUREMENTS:
        raise ValueError(
            f"expected at least {MIN_MEASUREMENTS} distinct measured candidates to learn from, got {len(unique)}: "
            "measure more (probes)"
        )
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, influence.double().cpu())
    return Targets(unique, sums / repeats)


def standardized(values: Tensor, mean: float, std: float) -> Tensor:
    """Return ``(values - mean) / std``; zeros when nothing varies."""
    return (values - mean) / std if std > 0 else torch.zeros_like(values)
