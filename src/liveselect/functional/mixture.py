"""Weights of a mixture: shrunken means of what its cells are worth, the mirror step towards them, floors and caps.

Shape letters: ``K`` cells. All tensors are on CPU and float64, so that every rank computes the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def within_bounds(weights: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Return the weights that sum to 1, keep to their bounds, and are nearest to ``weights`` in relative entropy.

    They are ``weights`` times one factor, cut at the bounds, which therefore hold exactly.

    Args:
        weights: ``(K,)`` of at least 0, not all of them; where one is 0, its lower bound is taken.
        least: ``(K,)`` of at least 0, with a sum of at most 1.
        most: ``(K,)``, no smaller; those of positive weights and the lower bounds of the others sum to at least 1.

    Raises:
        ValueError: no weights are within the bounds.
    """
    moves = weights > 0
    below, above = float(least.sum()), float(torch.where(moves, most, least).sum())
    slack = 1e-9
    if below > 1 + slack or above < 1 - slack:
        raise ValueError(
            f"expected bounds that shares with the sum 1 can keep, got least shares that sum to {below:g} and largest "
            f"ones that sum to {above:g}: lower the floor, or raise the cap"
        )
    own = torch.where(moves, weights, 1.0)
    # the sum of the cut weights grows with the factor, in straight pieces that begin and end where one meets a bound
    ends = torch.cat([(least / own)[moves], (most / own)[moves]]).unique()
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        if float(_cut(weights * ends[middle], least, most).sum()) < 1:
            low = middle + 1
        else:
            high = middle
    start, stop = float(ends[max(0, low - 1)]), float(ends[low])
    inside = _cut(weights * (start + stop) / 2, least, most)
    free = moves & (inside > least) & (inside < most)
    factor = stop
    if free.any():
        factor = (1 - float(inside[~free].sum())) / float(weights[free].sum())
    return _cut(weights * factor, least, most)


def shrunken_means(
    sums: Tensor, counts: Tensor, factors: Sequence[Tensor], shrinkage: float, variance: float = 1.0
) -> Tensor:
    r"""Return what each cell is worth, ``(K,)``: the effects of the factors, and the cell's own on top of them.

    Factor by factor, and at last cell by cell, the mean of what the earlier ones leave is taken and multiplied with
    :math:`N / (N + k)`, N values in it. As in the estimator of James and Stein, :math:`k` is the variance of one value
    over that of the true means, which follows from how far the means lie apart: where that is no farther than chance
    brings them, all are 0.

    Args:
        sums: ``(K,)`` sums of values whose mean over all cells is near 0.
        counts: ``(K,)`` how many values these were; fractions come from forgetting.
        factors: each ``(K,)`` int64, the level of a factor that a cell belongs to.
        shrinkage: least k.
        variance: of one value.

    Source: James and Stein 1961; the variance of the true means by moments, DerSimonian and Laird 1986.
    """
    worth = torch.zeros_like(sums)
    for codes in (*factors, torch.arange(len(sums))):
        levels = int(codes.max()) + 1 if len(codes) else 0
        left = torch.bincount(codes, sums - counts * worth, levels)
        number = torch.bincount(codes, counts, levels)
        worth = worth + _shrunken(left, number, shrinkage, variance)[codes]
    return worth


def mirror_step(weights: Tensor, base: Tensor, worth: Tensor, strength: float, rate: float) -> Tensor:
    r"""Return the weights, ``(K,)`` with the sum 1, after a step of entropic mirror ascent.

    The step goes up :math:`\langle w, m\rangle - \mathrm{KL}(w \,\|\, b) / \text{strength}`, whose maximum is
    :math:`w \propto b\, e^{\,\text{strength} \cdot m}`; in logarithms of weights it goes the share ``rate`` of the way.

    Args:
        weights: ``(K,)``, before.
        base: ``(K,)``, the mixture where nothing is known; cells of weight 0 keep it.
        worth: ``(K,)``, m.
        strength: how far weights follow.
        rate: above 0 and up to 1.

    Source: exponentiated gradient, Kivinen and Warmuth 1997; as mirror ascent, Beck and Teboulle 2003.
    """
    moves = (base > 0) & (weights > 0)
    target = torch.where(moves, base, 1.0).log() + strength * worth
    logarithms = (1 - rate) * torch.where(moves, weights, 1.0).log() + rate * target
    stepped = torch.where(moves, (logarithms - logarithms[moves].max()).exp(), 0.0)
    return stepped / stepped.sum()


def _cut(weights: Tensor, least: Tensor, most: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(weights, least), most)


def _shrunken(sums: Tensor, counts: Tensor, shrinkage: float, variance: float) -> Tensor:
    known = counts > 0
    total = float(counts.sum())
    if not known.any():
        return torch.zeros_like(sums)
    means = torch.where(known, sums / counts.clamp(min=torch.finfo(counts.dtype).tiny), 0.0)
    # around 0, not around their mean: values are relative to random candidates already
    spread = float((counts * means.square()).sum()) - int(known.sum()) * variance
    apart = spread / total
    if apart <= 0:
        return torch.zeros_like(sums)
    return sums / (counts + max(shrinkage, variance / apart))
