"""A bandit's plays against arms of known means: for tests, and for ``benchmarks/bandit.py``."""

import math

import torch
from torch import Tensor

from liveselect.functional.bandit import credit_pulls, top_arms, ucb_scores


def simulate_pulls(
    means: Tensor,
    k: int,
    alpha: float,
    generator: torch.Generator,
    noise: float = 1.0,
    discount: float = 1.0,
    released: bool = False,
) -> Tensor:
    """Play rounds of ``k`` parallel pulls against arms with known means; returns the pulled arms, ``(rounds, k)``.

    Args:
        means: ``(rounds, K)`` mean reward of each arm in each round.
        k: arms pulled in a round; their outcomes are known to the next round.
        alpha: width of the bound.
        generator: drives ties and the Gaussian noise.
        noise: sd of a pull's reward around the arm's mean.
        discount: what remains of old rewards and pulls after each round.
        released: score as the released code does, which also begins with the first ``k`` arms.
    """
    rewards, pulls = torch.zeros(2, means.shape[1], dtype=torch.float64)
    rounds = []
    for index, truth in enumerate(means.double()):
        rewards *= discount
        pulls *= discount
        arms = top_arms(ucb_scores(rewards, pulls, alpha, released), k, generator)
        if released and index == 0:
            arms = torch.arange(k)
        outcomes = truth[arms] + noise * torch.randn(k, generator=generator, dtype=torch.float64)
        credit_pulls(rewards, pulls, arms, outcomes)
        rounds.append(arms)
    return torch.stack(rounds)


def ucb1_regret_bound(gaps: Tensor, pulls: int) -> float:
    r"""Return the bound on the expected regret of UCB1 with rewards in [0, 1] and ``alpha = 1`` after ``pulls`` pulls.

    .. math:: 8 \sum_{i: \Delta_i > 0} \frac{\ln n}{\Delta_i} + \left(1 + \frac{\pi^2}{3}\right) \sum_i \Delta_i

    (Auer, Cesa-Bianchi and Fischer 2002, theorem 1), with ``gaps (K,)`` the :math:`\Delta_i` to the best mean.
    """
    positive = gaps[gaps > 0]
    return float(8 * math.log(pulls) * (1 / positive).sum() + (1 + math.pi**2 / 3) * positive.sum())


def pull_regret(means: Tensor, pulled: Tensor) -> Tensor:
    """Return the mean regret of the pulls of each round, ``(rounds,)``: what the k best arms give, less what was got.

    Args:
        means: ``(K,)`` true means, or ``(rounds, K)`` where they drift.
        pulled: ``(rounds, k)`` int64 distinct arms.
    """
    means = means.expand(len(pulled), -1)
    best = means.topk(pulled.shape[1], dim=1).values.mean(dim=1)
    return best - means.gather(1, pulled).mean(dim=1)
