"""Bands of perplexity: the lowest, the middle and the highest third."""

from typing import Literal

import torch
from torch import Tensor

Band = Literal["low", "middle", "high"]

_CUTS = (0.333, 0.666)  # as published, not thirds
_ORDER = {"low": (0, 1, 2), "middle": (1, 0, 2), "high": (2, 1, 0)}


def band_edges(losses: Tensor) -> tuple[float, float]:
    """Return the least loss of the middle and of the highest band of ``losses (n,)``, n of at least 3."""
    ordered = losses.sort().values
    first, second = (int(cut * len(ordered)) for cut in _CUTS)
    return float(ordered[first]), float(ordered[second])


def band_order(losses: Tensor, band: Band) -> Tensor:
    """Return scores that draw one band first: 2 in it, 1 in the band that comes next, 0 in the last.

    After ``low`` come middle and high; after ``middle`` low and high, as published; after ``high`` middle and low.
    Inside of a band all are equal, so a draw with noise (``temperature`` of about 0.1) is uniform there.

    Args:
        losses: ``(n,)``; +inf for what has none, which is never drawn.
        band: the band to draw first.

    Returns:
        ``(n,)`` float32.

    Source: the released code of arXiv 2410.16208, which cuts at ``int(0.333 n)`` and ``int(0.666 n)``.
    """
    known = (losses < torch.inf).nonzero()[:, 0]
    order = known[losses[known].argsort(stable=True)]
    first, second = (int(cut * len(order)) for cut in _CUTS)
    scores = torch.full((len(losses),), -torch.inf)
    thirds = (order[:first], order[first:second], order[second:])
    for value, place in zip((2.0, 1.0, 0.0), _ORDER[band], strict=True):
        scores[thirds[place]] = value
    return scores
