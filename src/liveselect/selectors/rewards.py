"""Rewards: what measured influence says about each arm, in units that stay the same while the model learns."""

import math

import torch
from torch import Tensor

from liveselect.functional.bandit import arm_means, credit_pulls, exploration_bonus, follow_controls, follow_moments
from liveselect.grammar import State

CONTROL = -1
"""Stands for the arm of a candidate that was measured as a control."""


class Rewards:
    r"""Sums of rewards and counts of pulls of every arm.

    A pull's outcome is the mean influence of its candidates; its reward says how many standard errors of a mean of
    ``probes`` random candidates that lies above their level. Level and spread are followed on the controls of each
    round, see :func:`~liveselect.functional.bandit.follow_controls`; without any, the level is 0 and the spread the
    running root mean square of outcomes.

    Args:
        arms: K.
        probes: candidates of a pull.
        has_controls: whether controls are measured.
        released: count a neighbour's pull as a whole one.

    Attributes:
        sums: ``(K,)`` float64 credited rewards.
        pulls: ``(K,)`` float64 credited pulls.
        moments: level and variance of the influence of one candidate, None until something was measured.
        neighbours: weights of near arms, see :func:`~liveselect.functional.bandit.credit_pulls`.
    """

    def __init__(self, arms: int, probes: int, has_controls: bool, released: bool = False) -> None:
        self.sums = torch.zeros(arms, dtype=torch.float64)
        self.pulls = torch.zeros(arms, dtype=torch.float64)
        self.moments: tuple[float, float] | None = None
        self.neighbours: tuple[Tensor, Tensor, Tensor] | None = None
        self._probes = probes
        self._has_controls = has_controls
        self._released = released

    @property
    def known(self) -> Tensor:
        """Which arms have a reward, ``(K,)`` bool."""
        return self.pulls > 0

    @property
    def means(self) -> Tensor:
        """Mean reward of each arm, ``(K,)``; 0 where nothing is known."""
        return arm_means(self.sums, self.pulls)

    def bonus(self, alpha: float) -> Tensor:
        """Return the width of each arm's confidence bound, ``(K,)``."""
        return exploration_bonus(self.pulls, alpha, self._released)

    def forget(self, discount: float) -> None:
        """Keep the share ``discount`` of all rewards and pulls."""
        self.sums = self.sums * discount
        self.pulls = self.pulls * discount

    def credit(self, asked: Tensor, influence: Tensor) -> None:
        """Credit one pull to each arm among ``asked (m,)`` for the ``influence (m,)`` float64 of its candidates.

        Controls among them are followed first. Before anything was followed, nothing can be credited.
        """
        is_control = asked == CONTROL
        arms, place = asked[~is_control].unique(return_inverse=True)
        outcomes = torch.zeros(len(arms), dtype=torch.float64).index_add_(0, place, influence[~is_control])
        outcomes /= place.bincount(minlength=len(arms))
        if self._has_controls and is_control.any():
            self.moments = follow_controls(self.moments, influence[is_control])
        elif not self._has_controls and len(outcomes):
            self.moments = follow_moments(self.moments, outcomes, center=0.0)
        if self.moments is None:
            return
        level, variance = self.moments
        unit = math.sqrt(variance / self._probes if self._has_controls else variance) or 1.0
        credit_pulls(self.sums, self.pulls, arms, (outcomes - level) / unit, self.neighbours, self._released)

    def state_dict(self) -> State:
        """Return sums, pulls and moments."""
        moments = None if self.moments is None else list(self.moments)
        return {"sums": self.sums.clone(), "pulls": self.pulls.clone(), "moments": moments}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.sums, self.pulls = state["sums"].clone(), state["pulls"].clone()
        self.moments = None if state["moments"] is None else (state["moments"][0], state["moments"][1])
