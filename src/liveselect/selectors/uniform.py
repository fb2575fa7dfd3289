"""Uniform selection: the baseline, the warm-up, and what other selectors fall back to."""

from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect.functional.sampling import uniform_subset
from liveselect.protocols import RoundContext, Selection


class UniformSelector:
    """Draws candidates uniformly without replacement, in random training order; measures nothing.

    Candidates that were trained on less often come first, so that no candidate repeats before the pool is used up: an
    epoch of uniform selection is an epoch of ordinary shuffled training.
    """

    def propose(self, context: RoundContext) -> Tensor:
        """Return no ids, ``(0,)``: nothing needs to be measured."""
        return torch.empty(0, dtype=torch.int64)

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Take no note: all candidates are drawn alike."""

    def select(self, context: RoundContext, budget: int) -> Selection:
        """Choose ``budget`` of the context's candidates; among equally used ones all subsets are equally likely.

        Raises:
            ValueError: there are fewer candidates than the budget.
        """
        return uniform_selection(context, budget)


def uniform_selection(
    context: RoundContext, budget: int, metrics: Mapping[str, float] | None = None, notes: tuple[str, ...] = ()
) -> Selection:
    """Return a uniform draw of ``budget`` least used candidates in random order, with metrics and notes for the ledger.

    Raises:
        ValueError: there are fewer candidates than the budget.
    """
    check_budget(context, budget)
    generator = context.generator("select")
    uses = context.source.pool.uses[context.candidates]
    drawn = [context.candidates[:0]]
    for level in uses.unique():  # ascending
        equal = context.candidates[uses == level]
        left = budget - sum(len(part) for part in drawn)
        drawn.append(equal if len(equal) <= left else equal[uniform_subset(len(equal), left, generator)])
    ids = training_order(context, torch.cat(drawn))
    return Selection(ids, metrics=metrics or {}, notes=notes, reasons={"drawn uniformly": ids})


def training_order(context: RoundContext, ids: Tensor) -> Tensor:
    """Return ``ids (k,)`` shuffled, equally on all ranks."""
    return ids[torch.randperm(len(ids), generator=context.generator("order"))]


def check_budget(context: RoundContext, budget: int) -> None:
    """Raise ValueError when a round cannot choose ``budget`` distinct candidates."""
    if not 0 <= budget <= len(context.candidates):
        raise ValueError(
            f"cannot choose {budget} of {len(context.candidates)} candidates: shorten the rounds, or enlarge the pool"
        )
