"""Arms, rewards and upper confidence bounds: the arithmetic of a bandit over groups of candidates.

Shape letters: ``K`` arms, ``k`` arms pulled together. All tensors are on CPU and float64 unless said otherwise, so that
every rank computes the same bits.
"""

import math

import torch
from torch import Tensor


def arm_means(rewards: Tensor, pulls: Tensor) -> Tensor:
    """Return the mean reward of each arm, ``(K,)``; 0 for an arm without credit.

    Args:
        rewards: ``(K,)`` sums of credited rewards.
        pulls: ``(K,)`` credited pulls; fractions come from neighbours and from forgetting.
    """
    return torch.where(pulls > 0, rewards / pulls.clamp(min=torch.finfo(pulls.dtype).tiny), 0.0)


def exploration_bonus(pulls: Tensor, alpha: float, released: bool = False) -> Tensor:
    r"""Return ``alpha * sqrt(2 ln(sum_j T_j) / T_i)`` for each arm, ``(K,)``; +inf for an arm that was never pulled.

    The upper confidence bound of Auer, Cesa-Bianchi and Fischer (2002) as Quad uses it (arXiv 2409.16986).

    Args:
        pulls: ``(K,)`` credited pulls :math:`T`.
        alpha: width of the bound in the unit of the rewards; theory asks for twice the sd of a pull's reward.
        released: divide by ``T_i + 1`` as the released code does: no bound is infinite, and with a small ``alpha`` an
            arm that was never pulled may stay so for ever.
    """
    log_total = math.log(max(float(pulls.sum()), 1.0))  # the first round has no pulls: no bonus rather than NaN
    if released:
        return alpha * torch.sqrt(2 * log_total / (pulls + 1))
    bonus = alpha * torch.sqrt(2 * log_total / pulls.clamp(min=torch.finfo(pulls.dtype).tiny))
    return torch.where(pulls > 0, bonus, torch.inf)


def ucb_scores(rewards: Tensor, pulls: Tensor, alpha: float, released: bool = False) -> Tensor:
    """Return Quad's cluster scores ``CS_i = mean_i + bonus_i``, ``(K,)``; +inf for an arm that was never pulled.

    Arguments are those of :func:`arm_means` and :func:`exploration_bonus`.
    """
    return arm_means(rewards, pulls) + exploration_bonus(pulls, alpha, released)


def top_arms(scores: Tensor, k: int, generator: torch.Generator, open_arms: Tensor | None = None) -> Tensor:
    """Return the arms of the ``k`` largest scores, best first, ``(<= k,)`` int64; equal scores in a seeded order.

    Args:
        scores: ``(K,)``; +inf is allowed, so that arms never pulled come first, in an order that the generator draws.
        k: number of arms.
        generator: advanced by one permutation of K.
        open_arms: ``(K,)`` bool, the arms that may be returned; fewer than ``k`` of them give fewer arms.
    """
    order = torch.randperm(len(scores), generator=generator)
    if open_arms is not None:
        order = order[open_arms[order]]
    return order[scores[order].argsort(descending=True, stable=True)][:k]


def neighbour_weights(distances: Tensor, cutoff: float) -> Tensor:
    """Return the share of a pull's outcome that arms at ``distances (...)`` get: ``1 - d / cutoff``, at least 0.

    Raises:
        ValueError: the cutoff is not positive.
    """
    if cutoff <= 0:
        raise ValueError(f"expected a positive neighbour cutoff (a cosine distance such as 0.2), got {cutoff}")
    return (1.0 - distances / cutoff).clamp(min=0.0)


def credit_pulls(
    rewards: Tensor,
    pulls: Tensor,
    arms: Tensor,
    outcomes: Tensor,
    neighbours: tuple[Tensor, Tensor, Tensor] | None = None,
    released: bool = False,
) -> None:
    """Credit the outcomes of pulls to the arms and to their neighbours, in place.

    An arm j at weight w from the pulled arm gets ``R_j += w * outcome`` and ``T_j += w``: neighbours learn as much as
    they are alike, and their means are not biased.

    Args:
        rewards: ``(K,)`` sums of rewards R.
        pulls: ``(K,)`` credited pulls T.
        arms: ``(k,)`` int64 arms that were pulled.
        outcomes: ``(k,)`` reward of each pull.
        neighbours: the weights in 0..1 of near arms as compressed rows: ``starts (K + 1,)``, ``columns (nnz,)`` and
            ``weights (nnz,)``. Row i says who learns from arm i; that arm's weight for itself is always 1.
        released: count a neighbour's pull as a whole one, as the released code does; it draws the means of
            neighbours towards 0.
    """
    rewards.index_add_(0, arms, outcomes)
    pulls.index_add_(0, arms, torch.ones_like(outcomes))
    if neighbours is None:
        return
    starts, columns, weights = neighbours
    for arm, outcome in zip(arms.tolist(), outcomes.tolist(), strict=True):
        row = slice(int(starts[arm]), int(starts[arm + 1]))
        near = (columns[row] != arm) & (weights[row] > 0)
        others, weight = columns[row][near], weights[row][near].to(rewards.dtype)
        rewards.index_add_(0, others, weight * outcome)
        pulls.index_add_(0, others, torch.ones_like(weight) if released else weight)


def allocate(weights: Tensor, room: Tensor, budget: int) -> Tensor:
    """Share ``budget`` out in proportion to ``weights``, never more than ``room``; returns ``(K,)`` int64.

    The shares of full arms go to the others in their proportions. Remainders go to the largest fractions, of equal ones
    to the first arm. The result sums to ``budget``, or to all the room of arms with a positive
    weight when that is less.

    Args:
        weights: ``(K,)`` non-negative.
        room: ``(K,)`` int64, the limit of each arm.
        budget: the number to share out.
    """
    counts = torch.zeros_like(room)
    is_open = (weights > 0) & (room > 0)
    while is_open.any():
        left = budget - int(counts.sum())
        share = torch.where(is_open, weights, 0.0) * (left / float(weights[is_open].sum()))
        full = is_open & (share >= room)
        if not full.any():
            whole = share.floor().long()
            order = (share - whole).argsort(descending=True, stable=True)
            whole[order[is_open[order]][: left - int(whole.sum())]] += 1
            return counts + whole
        counts[full] = room[full]
        is_open &= ~full
    return counts


def follow_moments(
    moments: tuple[float, float] | None, values: Tensor, decay: float = 0.9, center: float | None = None
) -> tuple[float, float]:
    """Return the running mean and variance after new ``values (m,)``: an exponential average over calls.

    Args:
        moments: mean and variance so far; None before the first call, whose values then stand alone.
        values: at least one.
        decay: weight of the past.
        center: the mean, when it is known; 0 makes the variance a mean square.

    Raises:
        ValueError: a value is not finite.
    """
    if not len(values) or not values.isfinite().all():
        raise ValueError(
            f"expected at least one value and only finite ones, got {values.tolist()}: influence that is NaN or "
            "infinite means that the reference loss is; lower the learning rate or check the reference set"
        )
    fresh_mean = float(values.mean()) if center is None else center
    if moments is None:
        spread = (
            float(values.var()) if center is None and len(values) > 1 else float((values - fresh_mean).square().mean())
        )
        return fresh_mean, spread
    mean = decay * moments[0] + (1 - decay) * fresh_mean
    return mean, decay * moments[1] + (1 - decay) * float((values - mean).square().mean())


def follow_controls(
    moments: tuple[float, float] | None, values: Tensor, level_memory: float = 16.0, spread_memory: float = 2.0
) -> tuple[float, float]:
    """Return level and variance of the influence of random candidates after a round's ``values (m,)``.

    The scale of influence may change by orders of magnitude from one round to the next, as the gradient that it is
    compared with does, and an average over rounds would be that of the loudest. So the spread is mostly the round's
    own, averaged by its logarithm, and a past level counts less the larger its spread was. A common shift or factor of
    all values shifts or scales the result.

    Args:
        moments: level and variance in the round before; None in the first one, whose values then stand alone.
        values: at least two.
        level_memory: in the level the past counts as much as this many values, if its spread was no larger.
        spread_memory: the same for the spread.

    Raises:
        ValueError: a value is not finite.
    """
    level, variance = follow_moments(None, values)
    if moments is None or moments[1] == 0.0:
        return level, variance
    if variance == 0.0:  # all alike, which shows no scale
        return level, moments[1]
    past = level_memory * min(1.0, variance / moments[1])
    level = (len(values) * level + past * moments[0]) / (len(values) + past)
    fresh = len(values) / (len(values) + spread_memory)
    return level, math.exp(fresh * math.log(variance) + (1 - fresh) * math.log(moments[1]))
