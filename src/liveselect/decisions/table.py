"""The decisions of one round as rows, in pieces, so that a round of any size is written in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from liveselect.ledger import RoundRecord
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.protocols import Selection

PIECE = 1 << 16  # rows; the noise of a draw is made in pieces of this size too

BY_SCORE = "its score, bonus and noise were among the highest"
BELOW = "below the threshold"
PASSED = "above the threshold, not drawn in this round"
ONLY_MEASURED = "measured, but not among the candidates that were compared"
GROUP_BELOW = "its group was below the threshold"
GROUP_PASSED = "its group was above the threshold, but others of it were drawn"
BY_SELECTOR = "chosen by the selector, without a score"
_REASONS = (BY_SCORE, BELOW, PASSED, ONLY_MEASURED, BY_SELECTOR, GROUP_BELOW, GROUP_PASSED)

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class RoundDecisions:
    """Everything that a round decided, and what it knew.

    Attributes:
        record: the round's line in the ledger.
        pool: the candidates.
        selection: what the selector returned.
        plan: what was made of it.
        measured: ``(m,)`` ids whose influence was measured.
        influence: ``(m,)`` their influence.
        flops_before: what training and selection had cost when the round began, FLOPs over all ranks.
    """

    record: RoundRecord
    pool: CandidatePool
    selection: Selection
    plan: Plan
    measured: Tensor
    influence: Tensor
    flops_before: float = 0.0


class DecisionTable:
    """The rows of a round.

    Compared candidates come first, in the order in which the selector compared them, then those that were chosen or
    measured without being compared. Beside what the selector returned it needs 8 bytes for each compared candidate and
    some 60 for each chosen one.

    Args:
        decisions: of the round.
        most_rejected: of the rejected candidates only so many are told, those that came nearest.

    Attributes:
        threshold: the lowest sum of score, bonus and noise that was let through; NaN without scores.
        left_out: rejected candidates that are not told.
        words: the texts of the columns ``group`` and ``reason``, which hold their places.
    """

    def __init__(self, decisions: RoundDecisions, most_rejected: int) -> None:
        self._round = decisions
        selection = decisions.selection
        self._by_group = {"reward", "bonus"} <= selection.group_metrics.keys()
        self._group_values()
        scored = selection.scored
        if self._by_group or scored is None or selection.scores is None:
            scored = torch.empty(0, dtype=torch.int64)
        self._scored = scored.numpy()
        self._chosen = _Lookup(decisions.plan.ids.numpy())
        self._measured = _Lookup(decisions.measured.numpy())
        self._forced = {why: _Lookup(ids.numpy()) for why, ids in selection.reasons.items()}
        self._eligible = _Lookup((decisions.plan.ids if selection.eligible is None else selection.eligible).numpy())
        self.words = {
            "group": list(decisions.pool.group_names),
            "reason": [*_REASONS, *self._forced],
        }
        self._sorted = np.empty(0)
        self.threshold = np.nan
        self._lowest = -np.inf
        self.left_out = 0
        self._compare(most_rejected)

    def pieces(self) -> Iterator[Columns]:
        """Yield the columns, at most ``PIECE`` rows at a time."""
        others = _distinct(np.concatenate([self._round.plan.ids.numpy(), self._round.measured.numpy()]))
        among_others = _Lookup(others)
        is_new = np.ones(len(others), dtype=np.bool_)
        for start in range(0, len(self._scored), PIECE):
            ids, scores, noise, keys = self._compared(start)
            places = among_others.places(ids)
            is_new[places[places >= 0]] = False
            told = (places >= 0) | (_comparable(keys) >= self._lowest)
            ranks = len(self._sorted) - np.searchsorted(self._sorted, _comparable(keys), side="right")
            columns = self._columns(ids, scores, np.full(len(ids), np.nan), noise, ranks, keys)
            yield {name: values[told] for name, values in columns.items()}
        others = others[is_new]
        for start in range(0, len(others), PIECE):
            ids = others[start : start + PIECE]
            scores, bonus, ranks = self._of_groups(ids)
            yield self._columns(ids, scores, bonus, np.full(len(ids), np.nan), ranks, scores + bonus)

    def _compare(self, most_rejected: int) -> None:
        """Find the threshold and the ranks of the compared candidates."""
        if self._by_group:
            chosen = self._round.plan.ids.numpy()
            scores, bonus, _ = self._of_groups(chosen[~self._is_forced(chosen)])
            self.threshold = _lowest(scores + bonus)
            return
        if not len(self._scored):
            return
        keys = np.empty(len(self._scored))
        lowest = np.inf
        for start in range(0, len(keys), PIECE):
            ids, _, _, piece = self._compared(start)
            keys[start : start + PIECE] = _comparable(piece)
            passed = self._eligible.holds(ids) & ~self._is_forced(ids)
            lowest = min([lowest, *piece[passed & ~np.isnan(piece)].tolist()])
        keys.sort()
        self._sorted = keys
        self.threshold = lowest if lowest < np.inf else np.nan
        told = len(self._chosen) + most_rejected
        if len(keys) > told:
            self._lowest, self.left_out = float(keys[-told]), len(keys) - told

    def _compared(self, start: int) -> tuple[npt.NDArray[Any], ...]:
        """Return ids, scores, noise and their sum for a piece of the compared candidates."""
        selection = self._round.selection
        ids = self._scored[start : start + PIECE]
        scores = np.full(len(ids), np.nan)
        if selection.scores is not None:
            scores = selection.scores[start : start + PIECE].double().numpy()
        if selection.noise is None:
            return ids, scores, np.full(len(ids), np.nan), scores
        noise = selection.noise(start, start + len(ids)).double().numpy()
        return ids, scores, noise, scores + noise

    def _group_values(self) -> None:
        if not self._by_group:
            return
        metrics = self._round.selection.group_metrics
        self._rewards, self._bonuses = (metrics[name].double().numpy() for name in ("reward", "bonus"))
        keys = _comparable(self._rewards + self._bonuses)
        self._group_ranks = len(keys) - np.searchsorted(np.sort(keys), keys, side="right")

    def _of_groups(self, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
        """Return score, bonus and rank of the group of each id."""
        if not self._by_group:
            return np.full(len(ids), np.nan), np.full(len(ids), np.nan), np.full(len(ids), -1)
        codes = self._codes(ids)
        return self._rewards[codes], self._bonuses[codes], self._group_ranks[codes]

    def _codes(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        groups = self._round.pool.groups
        return np.zeros(len(ids), dtype=np.int64) if groups is None else groups[torch.from_numpy(ids)].long().numpy()

    def _is_forced(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.any([np.zeros(len(ids), dtype=bool), *(held.holds(ids) for held in self._forced.values())], axis=0)

    def _columns(
        self,
        ids: npt.NDArray[np.int64],
        scores: npt.NDArray[Any],
        bonus: npt.NDArray[Any],
        noise: npt.NDArray[Any],
        ranks: npt.NDArray[Any],
        keys: npt.NDArray[Any],
    ) -> Columns:
        record = self._round.record
        chosen = self._chosen.holds(ids)
        places = self._measured.places(ids)
        influence = np.full(len(ids), np.nan)
        influence[places >= 0] = self._round.influence.double().numpy()[places[places >= 0]]
        return {
            "round": np.full(len(ids), record.round, dtype=np.int32),
            "step": np.full(len(ids), record.step, dtype=np.int64),
            "id": ids,
            "group": self._codes(ids),
            "chosen": chosen,
            "place": self._chosen.places(ids),
            "score": scores,
            "bonus": bonus,
            "noise": noise,
            "rank": ranks,
            "threshold": np.full(len(ids), self.threshold),
            "influence": influence,
            "reason": self._reasons(ids, chosen, keys),
            "round_flops": np.full(len(ids), record.total_flops),
            "flops_before": np.full(len(ids), self._round.flops_before),
        }

    def _reasons(
        self, ids: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_], keys: npt.NDArray[Any]
    ) -> npt.NDArray[np.int64]:
        """Return the place of each reason among the words."""
        code = {reason: place for place, reason in enumerate(_REASONS)}
        has_key = ~np.isnan(keys)
        if self._by_group:
            passed = _comparable(keys) >= self.threshold
            otherwise = np.where(passed, code[GROUP_PASSED], np.where(has_key, code[GROUP_BELOW], code[ONLY_MEASURED]))
        else:
            otherwise = np.where(has_key, code[BELOW], code[ONLY_MEASURED])
        if self._round.selection.eligible is not None:
            otherwise[self._eligible.holds(ids)] = code[PASSED]
        reasons = np.where(chosen, np.where(has_key, code[BY_SCORE], code[BY_SELECTOR]), otherwise)
        for place, held in enumerate(self._forced.values(), len(_REASONS)):
            reasons[chosen & held.holds(ids)] = place
        return reasons


class _Lookup:
    """Finds ids among others, by their order in it."""

    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self._order = ids.argsort(kind="stable")
        self._ids = ids[self._order]

    def __len__(self) -> int:
        return len(self._ids)

    def places(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the place of each id, -1 where it is not held."""
        if not len(self._ids):
            return np.full(len(ids), -1)
        found = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        return np.where(self._ids[found] == ids, self._order[found], -1)

    def holds(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether each id is held."""
        return self.places(ids) >= 0


def _distinct(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each id once, in the order in which they first come."""
    return ids[np.sort(np.unique(ids, return_index=True)[1])]


def _comparable(keys: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return keys that sort: what is not known comes last."""
    return np.where(np.isnan(keys), -np.inf, keys)


def _lowest(keys: npt.NDArray[Any]) -> float:
    known = keys[~np.isnan(keys)]
    return float(known.min()) if len(known) else np.nan
