"""Leftovers: what a pass over the pool has not used yet is trained on before anything is used again."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from liveselect.protocols import RoundContext, Selection
from liveselect.selectors.uniform import check_budget

LEFT_OVER = "used less often than the others, so its turn came first"


def fill_up(context: RoundContext, budget: int, choose: Callable[[RoundContext, int], Selection]) -> Selection:
    """Take the candidates that a pass has left over, and let ``choose`` take the rest of the budget from the next pass.

    There are leftovers only in a round that ends a pass over the pool, and fewer than the budget: there was nothing to
    choose between them. They go to random places of the training order.

    Args:
        context: of the round.
        budget: candidates that the round trains on.
        choose: selects from the context that it is given, whose candidates were used equally often, as many as it is
            told.

    Raises:
        ValueError: there are fewer candidates than the budget.
    """
    check_budget(context, budget)
    leftovers, equal = split_by_use(context.candidates, context.source.pool.uses[context.candidates], budget)
    left = len(leftovers)
    selection = choose(replace(context, candidates=equal), budget - left)
    if not left:
        return selection
    places = torch.randperm(budget, generator=context.generator("leftovers"))
    ids = torch.empty(budget, dtype=torch.int64)
    ids[places[:left]] = leftovers
    ids[places[left:].sort().values] = selection.ids
    return replace(
        selection,
        ids=ids,
        metrics={**selection.metrics, "left_over": float(left)},
        reasons={LEFT_OVER: leftovers, **selection.reasons},
    )


def split_by_use(candidates: Tensor, uses: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Return which of ``candidates (n,)`` a round of ``budget`` takes in any case, and which it may choose the rest of.

    ``uses (n,)`` of the second are all equal, and larger than those of the first. First and second hold at least
    ``budget`` candidates, the first alone fewer, or none when ``budget`` is 0.
    """
    if not len(uses) or bool((uses == uses[0]).all()):
        return candidates[:0], candidates
    levels, counts = uses.unique(return_counts=True)  # ascending
    level = levels[min(int((counts.cumsum(0) < budget).sum()), len(levels) - 1)]
    return candidates[uses < level], candidates[uses == level]
