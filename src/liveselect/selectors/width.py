"""How wide a choice by scores should be, found from what is measured inside it."""

import math

import torch
from torch import Tensor

from liveselect.functional.correlation import spearman
from liveselect.grammar import NO_IDS, State

FEWEST = 8
"""Measurements of a round from which it is known whether better scores are worth more."""

_KEPT = 0.8  # of the evidence, from one round to the next
_AFTER_A_MOVE = 0.5  # of the evidence, which was that of another width
_DEAD = 2.0  # standard errors within which evidence is chance
_FULL = 2.0  # standard errors beyond them at which the width doubles or halves
_REACH = 16.0  # times wider or narrower than at first


class Width:
    r"""Finds which share of a pool scores should keep: that at whose edge better scores are worth no more than worse.

    Among candidates that scores let through, the rank correlation of scores and influence says whether those with
    better scores are worth more to the model as it is now. Then the share is too wide; where they are worth less,
    because the model has learned what they hold, it is too narrow. Correlations of the last rounds are added up by
    their measurements, :math:`z = \bar\rho \sqrt{n}`, and the share is divided by :math:`2^s` with
    :math:`s = (|z| - 2) / 2` within 0..1 and the sign of z. Chance moves it little, and a move spends half of the
    evidence.

    Attributes:
        first: the share at first, above 0 and up to 1.
        factor: by which the share is wider now.
    """

    def __init__(self, first: float) -> None:
        self.first, self.factor = first, 1.0
        self._sum = self._count = 0.0
        self._ids, self._influence = NO_IDS, torch.empty(0)

    @property
    def share(self) -> float:
        """The share of the pool that scores keep now."""
        return min(1.0, self.first * self.factor)

    @property
    def evidence(self) -> float:
        """By how many standard errors better scores are worth more than worse ones."""
        return self._sum / math.sqrt(self._count) if self._count else 0.0

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Take the influence ``(m,)`` of candidates ``ids (m,)`` of the coming round."""
        self._ids = torch.cat([self._ids, ids.cpu()])
        self._influence = torch.cat([self._influence, influence.float().cpu()])

    def move(self, candidates: Tensor, scores: Tensor) -> None:
        """Look at what was measured of the round's ``candidates (n,)``, by their ``scores (size,)``, and move.

        What was trained on already says what the model has learned of it, and not of its kind.
        """
        fresh = torch.isin(self._ids, candidates)
        ids, influence = self._ids[fresh], self._influence[fresh]
        self._ids, self._influence = NO_IDS, torch.empty(0)
        self._learn(scores[ids], influence)

    def _learn(self, scores: Tensor, influence: Tensor) -> None:
        self._sum, self._count = _KEPT * self._sum, _KEPT * self._count
        found = spearman(scores, influence) if len(scores) >= FEWEST else math.nan
        if math.isnan(found):
            return
        self._sum, self._count = self._sum + len(scores) * found, self._count + len(scores)
        evidence = self.evidence
        step = min(1.0, max(0.0, (abs(evidence) - _DEAD) / _FULL))
        if not step:
            return
        wider = self.factor * 2 ** (-math.copysign(step, evidence))
        self.factor = min(_REACH, 1 / self.first, max(1 / _REACH, wider))
        self._sum, self._count = _AFTER_A_MOVE * self._sum, _AFTER_A_MOVE * self._count

    def state_dict(self) -> State:
        """Return the width and its evidence."""
        measured = {"ids": self._ids.clone(), "influence": self._influence.clone()}
        return {"factor": self.factor, "sum": self._sum, "count": self._count, **measured}

    def load_state_dict(self, state: State) -> None:
        """Restore them."""
        self.factor, self._sum, self._count = state["factor"], state["sum"], state["count"]
        self._ids, self._influence = state["ids"].clone(), state["influence"].clone()
