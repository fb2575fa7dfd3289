"""How much what was measured may count: less where it predicts badly, and where selection goes back and forth."""

import math

import torch
from torch import Tensor

from liveselect.grammar import Round, State

TURN = 0.7
"""Change of the mixture of groups, 0..1, from one plan to the next that is more than following the model."""

TURNS = 2
"""Rounds running with such a change after which it is no accident."""

_LEAST_WEIGHT = 0.125
_KEPT = 0.8  # of what was held out in earlier rounds, from one round to the next
_FULL_CORRELATION = 0.5
_UNKNOWN = 8.0  # held-out measurements without correlation that are added
_EXAMPLES_PER_GROUP = 4  # of a plan: with fewer two draws of one mixture differ by chance


class Steadiness:
    """Looks at the last plans, and halves the weight of what was measured while they take turns.

    Attributes:
        weight: how much predictions count, up to 1.
    """

    def __init__(self) -> None:
        self.weight = 1.0
        self._turns = 0
        self._mixture: Tensor | None = None  # of the plan before the last one
        self._looked = -1

    def look(self, round: Round, ids: Tensor, influence: Tensor) -> dict[str, float]:
        """Look at the plan that was trained on last, and at what was measured of it; returns metrics."""
        trained, pool = round.trained, round.pool
        if trained is None:
            return {}
        metrics = _worth(trained, ids, influence)
        enough = len(pool.group_names) * _EXAMPLES_PER_GROUP <= len(trained)
        if pool.groups is None or not enough or self._looked == round.index:
            return metrics
        self._looked = round.index
        counts = torch.bincount(pool.groups[trained].long(), minlength=len(pool.group_names)).double()
        mixture, before = counts / counts.sum(), self._mixture
        self._mixture = mixture
        if before is None:
            return metrics
        change = float((mixture - before).abs().sum() / 2)
        self._turns = self._turns + 1 if change > TURN else 0
        self.weight = max(_LEAST_WEIGHT, self.weight / 2) if self._turns >= TURNS else min(1.0, self.weight * 1.25)
        return {**metrics, "mixture_change": change, "live_weight": self.weight}

    def state_dict(self) -> State:
        """Return what is remembered of earlier plans."""
        mixture = None if self._mixture is None else self._mixture.clone()
        return {"weight": self.weight, "turns": self._turns, "mixture": mixture, "looked": self._looked}

    def load_state_dict(self, state: State) -> None:
        """Restore it."""
        self.weight, self._turns, self._looked = state["weight"], state["turns"], state["looked"]
        self._mixture = None if state["mixture"] is None else state["mixture"].clone()


class Trust:
    """How much predictions count beside a prior, by what held-out measurements of the last rounds say of them.

    A cheap round measures two dozen candidates, and a rank correlation of so few is mostly chance. So those of earlier
    rounds count as well, less with every round, and until enough are known predictions count less.
    """

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def learn(self, spearman: float, held_out: float) -> None:
        """Take the held-out rank correlation of a round; NaN says nothing."""
        self._sum, self._weight = _KEPT * self._sum, _KEPT * self._weight
        if not math.isnan(spearman):
            self._sum += held_out * spearman
            self._weight += held_out

    @property
    def correlation(self) -> float:
        """The rank correlation of the last rounds, weighted by what was held out; NaN before the first."""
        return self._sum / self._weight if self._weight else math.nan

    @property
    def weight(self) -> float:
        """How much predictions count, 0..1: all from a rank correlation of a half on."""
        return min(1.0, max(0.0, self._sum / (_FULL_CORRELATION * (self._weight + _UNKNOWN))))

    def state_dict(self) -> State:
        """Return what is remembered of earlier rounds."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state: State) -> None:
        """Restore it."""
        self._sum, self._weight = state["sum"], state["weight"]


def _worth(trained: Tensor, ids: Tensor, influence: Tensor) -> dict[str, float]:
    """Return the mean influence of what was trained on last and of random candidates, where both were measured.

    ``excess`` is by how much random candidates are worth more, in standard errors of this difference.
    """
    again = torch.isin(ids, trained)
    parts = {"trained": influence[again].double(), "random": influence[~again].double()}
    if min(map(len, parts.values())) < 2:
        return {}
    means = {name: float(values.mean()) for name, values in parts.items()}
    error = math.sqrt(sum(float(values.var()) / len(values) for values in parts.values()))
    excess = (means["random"] - means["trained"]) / error if error else 0.0
    return {**{f"influence/{name}": mean for name, mean in means.items()}, "influence/excess": excess}
