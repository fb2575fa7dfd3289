"""Stratified selection: every group has its share of each round, drawn uniformly inside."""

from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import Round, Selection, Selector
from liveselect.pool import CandidatePool


class StratifiedSelector(Selector):
    """Draws uniformly inside of each group, and a fixed share of every round from each; measures nothing.

    Args:
        shares: of the round by name of the group, scaled to sum to 1; groups without one are never drawn. By default
            each group has as much of every round as it has of what may be chosen, so rounds differ less from the pool's
            mixture than uniform ones do. A group that has fewer candidates left than its share gives all of them, and
            the others fill the round in proportion.
    """

    uses_groups = True

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        values = [] if shares is None else list(shares.values())
        if shares is not None and (not values or min(values) < 0 or not 0 < sum(values) < float("inf")):
            raise ValueError(f"expected shares of at least 0 with a positive sum, got {dict(shares)}")
        self.shares = None if shares is None else dict(shares)

    def eligible(self, pool: CandidatePool, budget: int) -> Tensor | None:
        """Return which candidates are in a group with a share, ``(size,)`` bool; None for all.

        Raises:
            ValueError: the pool has no groups, or none of such a name.
        """
        weights = self._weights(pool)
        return None if weights is None else weights[_groups(pool)] > 0

    def check(self, round: Round, budget: int) -> None:
        """See that the pool has the groups."""
        _groups(round.pool)
        self._weights(round.pool)

    def select(self, round: Round, budget: int) -> Selection:
        """Choose ``budget`` of the round's candidates."""
        groups = _groups(round.pool)[round.candidates]
        sizes = torch.bincount(groups, minlength=len(round.pool.group_names))
        weights = self._weights(round.pool)
        counts = apportioned(budget, sizes.double() if weights is None else weights, sizes)
        generator = round.generator("select")
        drawn = []
        for group, count in enumerate(counts.tolist()):
            mine = (groups == group).nonzero()[:, 0]
            drawn.append(round.candidates[mine[uniform_subset(len(mine), count, generator)]])
        ids = torch.cat(drawn)
        return Selection(ids, reasons={"drawn uniformly from its group": ids})

    def _weights(self, pool: CandidatePool) -> Tensor | None:
        """Return the share of each group, ``(G,)`` float64."""
        if self.shares is None:
            return None
        unknown = sorted(set(self.shares) - set(pool.group_names))
        if unknown:
            raise ValueError(f"expected shares for groups of the pool, {list(pool.group_names)}, got {unknown}")
        return torch.tensor([self.shares.get(name, 0.0) for name in pool.group_names], dtype=torch.float64)


def _groups(pool: CandidatePool) -> Tensor:
    """Return the group of every candidate, ``(size,)`` int64."""
    if pool.groups is None:
        raise ValueError(
            "expected a pool with groups to draw from each of them: set groups in the data section (a column, sources, "
            "or clusters made by `liveselect cluster`)"
        )
    return pool.groups.long()


def apportioned(total: int, weights: Tensor, limits: Tensor) -> Tensor:
    """Return how many of ``total`` each group gets, ``(G,)`` int64: in proportion to its weight, up to its limit.

    The largest remainders get what rounding left over; ties go to the first group. What a group cannot give is shared
    out among the others again.

    Args:
        total: at most the sum of the limits of groups with a weight above 0.
        weights: ``(G,)`` float64 of at least 0.
        limits: ``(G,)`` int64.

    Raises:
        ValueError: the groups hold fewer than the budget.
    """
    able = int(limits[weights > 0].sum())
    if total > able:
        raise ValueError(f"expected at most {able} candidates to be asked of groups with a share, got {total}")
    counts = torch.zeros_like(limits)
    open_ = weights > 0
    while (left := total - int(counts.sum())) > 0:
        wanted = torch.where(open_, weights, 0.0)
        wanted = counts + left * wanted / wanted.sum()
        full = open_ & (wanted >= limits)
        if full.any():
            counts[full] = limits[full]
            open_ = open_ & ~full
            continue
        floors = torch.where(open_, wanted.floor().long(), counts)
        rest = total - int(floors.sum())
        remainders = torch.where(open_, wanted - floors, -1.0)
        floors[remainders.argsort(descending=True, stable=True)[:rest]] += 1
        return floors
    return counts
