"""Ranks: their correlation, and the normal values in their place."""

import math

import torch
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two samples ``(n,)``, with mean ranks for ties.

    NaN where it is meaningless: fewer than 3 values (two always correlate perfectly), a constant sample, or a NaN among
    the values.

    Raises:
        ValueError: the samples are not ``(n,)`` or differ in length.
    """
    if a.shape != b.shape or a.dim() != 1:
        raise ValueError(f"expected two samples (n,) of equal length, got {tuple(a.shape)} and {tuple(b.shape)}")
    if len(a) < 3 or any(bool(values.isnan().any() or (values == values[0]).all()) for values in (a, b)):
        return math.nan
    from torchmetrics.functional import pearson_corrcoef  # takes seconds to import

    return float(pearson_corrcoef(_mean_ranks(a), _mean_ranks(b)))


def rank_normal(values: Tensor) -> Tensor:
    """Return the normal quantile of ``(rank - 1/2) / n`` for each of ``values (n,)``, float64 on CPU.

    Equal values share the mean of their ranks; a constant sample gives zeros. Whatever the tails of the values, those
    of the result are normal.
    """
    return torch.special.ndtri((_mean_ranks(values) - 0.5) / max(1, len(values)))


def _mean_ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, ``(n,)`` float64 on CPU, from 1; equal values share the mean of their ranks."""
    # Not spearman_corrcoef of torchmetrics: 1.9 sums the ranks of equal values in int32, which overflows where many of
    # 50,000 values are equal and then even changes the sign; older ones pass over the data once per tie (issue 3102).
    _, inverse, counts = torch.unique(values.cpu(), return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
