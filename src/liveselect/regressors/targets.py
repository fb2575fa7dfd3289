"""What all regressors learn from: distinct, robust targets of unit variance, and those of earlier rounds."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from liveselect.functional.correlation import rank_normal, spearman
from liveselect.grammar import MIN_MEASUREMENTS, NO_IDS, State

TargetScale = Literal["rank_normal", "standardized"]
"""How influence becomes targets: by rank alone, or shifted and scaled."""

LEAST_WEIGHT = 0.05
"""Weight at which what was measured is forgotten."""

CHOSEN_SHARE = 0.2
"""Best part of the held-out candidates, by prediction, whose mean influence says what a choice would get."""


class Targets(NamedTuple):
    """Distinct measured candidates: ``ids (m,)`` ascending and ``influence (m,)`` float64."""

    ids: Tensor
    influence: Tensor


def distinct_targets(ids: Tensor, influence: Tensor) -> Targets:
    """Return every candidate once, with the mean of its measurements: a split must not put one on both sides.

    Raises:
        ValueError: the shapes differ, an influence is not finite, or there are fewer than 8 distinct candidates.
    """
    if ids.shape != influence.shape or ids.dim() != 1:
        raise ValueError(f"expected ids (m,) and influence (m,), got {tuple(ids.shape)} and {tuple(influence.shape)}")
    broken = int((~influence.isfinite()).sum())
    if broken:
        raise ValueError(
            f"expected finite influence, got {broken} of {len(ids)} that are not: leave them out of the fit"
        )
    unique, place, repeats = torch.unique(ids.cpu(), return_inverse=True, return_counts=True)
    if len(unique) < MIN_MEASUREMENTS:
        raise ValueError(
            f"expected at least {MIN_MEASUREMENTS} distinct measured candidates to learn from, got {len(unique)}: "
            "measure more (probes)"
        )
    sums = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, place, influence.double().cpu())
    return Targets(unique, sums / repeats)


def standardized(values: Tensor, mean: float, std: float) -> Tensor:
    """Return ``(values - mean) / std``; zeros when nothing varies."""
    return (values - mean) / std if std > 0 else torch.zeros_like(values)


def robust_targets(influence: Tensor, scale: TargetScale = "rank_normal") -> Tensor:
    """Return targets of mean 0 and variance 1 for ``influence (m,)``, ``(m,)`` float64; zeros when nothing varies.

    ``rank_normal`` gives the i-th of m values the normal quantile of ``(i - 1/2) / m``, equal ones their mean rank. Raw
    influence may have nearly all of its variance in a hundredth of the candidates, of which a regressor then learns and
    of nothing else.
    """
    values = influence.double()
    if scale == "rank_normal":
        values = rank_normal(values)
    return standardized(values, float(values.mean()), float(values.std(correction=0)))


def held_out_metrics(predicted: Tensor, targets: Tensor) -> dict[str, float]:
    """Return how predictions ``(n,)`` of held-out candidates agree with their targets ``(n,)``.

    ``held_out`` is n, ``spearman`` the rank correlation, and ``top_fifth`` the mean target of the fifth with the
    highest predictions, less that of all: what a choice of them would get, in standard deviations. A narrow choice can
    be as good as another whose rank correlation is four times higher.
    """
    return {
        "spearman": spearman(predicted, targets),
        "top_fifth": top_mean(predicted, targets),
        "held_out": float(len(targets)),
    }


def top_mean(predicted: Tensor, targets: Tensor) -> float:
    """Return the mean target of the fifth of examples with the highest predictions, less the mean of all."""
    if not len(targets):
        return float("nan")
    best = predicted.argsort(descending=True, stable=True)[: max(1, round(CHOSEN_SHARE * len(targets)))]
    return float(targets[best].double().mean() - targets.double().mean())


@dataclass
class Memory:
    """Targets of earlier rounds, which count less with every round that passes.

    Influence after a round is partly a correction of that round: a regressor that knows the last one alone sends the
    mixture back and forth.

    Args:
        keep: share of its weight that a measurement keeps from one round to the next, 0..1; 0 remembers nothing.
        most: measurements that are remembered, the newest.
    """

    keep: float = 0.8
    most: int = 4096
    _ids: Tensor = field(default_factory=lambda: NO_IDS)
    _targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    _rounds: Tensor = field(default_factory=lambda: NO_IDS)

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"expected keep, the share of a round's weight that stays, in 0..1, got {self.keep}")

    def with_earlier(self, index: int, known: Targets) -> "Weighted":
        """Return the targets of round ``index``, then those of earlier rounds, with their weights; and remember all.

        A candidate that was measured again counts with its last measurement only.
        """
        earlier = (self._rounds < index) & ~torch.isin(self._ids, known.ids)
        weights = self.keep ** (index - self._rounds).double()
        kept = (earlier & (weights > LEAST_WEIGHT)).nonzero().flatten()
        kept = kept[: max(0, self.most - len(known.ids))]
        self._ids = torch.cat([known.ids, self._ids[kept]])
        self._targets = torch.cat([known.influence, self._targets[kept]])
        self._rounds = torch.cat([torch.full((len(known.ids),), index), self._rounds[kept]])
        every = torch.cat([torch.ones(len(known.ids), dtype=torch.float64), weights[kept]])
        return Weighted(self._ids, self._targets, every, len(known.ids))

    def forget(self) -> None:
        """Remember nothing."""
        self._ids, self._targets, self._rounds = NO_IDS, torch.empty(0, dtype=torch.float64), NO_IDS

    def state_dict(self) -> State:
        """Return what is remembered."""
        return {"ids": self._ids.clone(), "targets": self._targets.clone(), "rounds": self._rounds.clone()}

    def load_state_dict(self, state: State) -> None:
        """Restore it."""
        self._ids, self._targets, self._rounds = (state[key].clone() for key in ("ids", "targets", "rounds"))


class Weighted(NamedTuple):
    """Targets of several rounds: ``ids (m,)``, ``targets (m,)``, ``weights (m,)``; the first ``fresh`` are new."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    fresh: int


def check_learning(targets: str, damping: float) -> None:
    """Raise ValueError when these cannot be arguments of a regressor."""
    if targets not in get_args(TargetScale):
        raise ValueError(f"expected targets to be one of {get_args(TargetScale)}, got {targets!r}")
    if not 0.0 < damping <= 1.0:
        raise ValueError(f"expected damping, how far a fit moves what is predicted, above 0 and up to 1, got {damping}")
