"""The decisions of one round as rows: why every candidate was chosen or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from liveselect.grammar import Selection
from liveselect.ledger import RoundRecord, writable
from liveselect.plan import Plan
from liveselect.pool import CandidatePool

BY_SCORE = "its score, bonus and noise were among the highest"
BELOW = "below the threshold"
PASSED = "above the threshold, not drawn in this round"
ONLY_MEASURED = "measured, but not among the candidates that were compared"
GROUP_BELOW = "its group was below the threshold"
GROUP_PASSED = "its group was above the threshold, but others of it were drawn"
BY_SELECTOR = "chosen by the selector, without a score"

Row = Mapping[str, Any]
"""A row as pyarrow returns it, by the names of :data:`SCHEMA`."""

_REASONS = (BY_SCORE, BELOW, PASSED, ONLY_MEASURED, BY_SELECTOR, GROUP_BELOW, GROUP_PASSED)

SCHEMA = pa.schema(
    [
        ("round", pa.int32()),
        ("step", pa.int64()),
        ("id", pa.int64()),
        ("group", pa.string()),
        ("chosen", pa.bool_()),
        ("place", pa.int32()),
        ("score", pa.float64()),
        ("bonus", pa.float64()),
        ("noise", pa.float64()),
        ("rank", pa.int32()),
        ("threshold", pa.float64()),
        ("influence", pa.float64()),
        ("reason", pa.string()),
        ("round_flops", pa.float64()),
        ("flops_before", pa.float64()),
    ]
)
"""One row for each candidate that a round compared, measured or chose.

``place`` is its place in training order, ``rank`` how many compared candidates had a larger sum of score, bonus and
noise; for selectors that compare groups, score, bonus and rank are those of its group. ``round_flops`` is what the
round cost and ``flops_before`` what the run had cost until then, over all ranks. What does not apply is null.
"""


@dataclass(frozen=True)
class RoundDecisions:
    """The decisions of a round, and the data they were made from.

    Attributes:
        record: the round's line in the ledger.
        pool: the candidates.
        selection: what the selector returned.
        plan: the plan made from it.
        measured: ``(m,)`` ids whose influence was measured.
        influence: ``(m,)`` their influence.
        flops_before: cost of training and selection before the round, FLOPs over all ranks.
        run_id: of the run.
    """

    record: RoundRecord
    pool: CandidatePool
    selection: Selection
    plan: Plan
    measured: Tensor
    influence: Tensor
    flops_before: float = 0.0
    run_id: str = ""

    @property
    def compares_groups(self) -> bool:
        """Whether scores are those of groups rather than of candidates."""
        return {"reward", "bonus"} <= self.selection.group_metrics.keys()

    def groups_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the group code of each id."""
        groups = self.pool.groups
        return np.zeros(len(ids), np.int64) if groups is None else groups.numpy()[ids].astype(np.int64)


@dataclass
class _Scores:
    """The numbers by which candidates ``ids (n,)`` were compared, NaN for others; the sums ``keys`` decide.

    ``ranked`` are the keys of all compared candidates, or of all groups: ranks are counted among them.
    """

    ids: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    bonus: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]
    keys: npt.NDArray[np.float64]
    ranked: npt.NDArray[np.float64]

    def take(self, rows: npt.NDArray[np.int64]) -> "_Scores":
        """Return the numbers of some candidates."""
        score, bonus, noise = self.score[rows], self.bonus[rows], self.noise[rows]
        return _Scores(self.ids[rows], score, bonus, noise, self.keys[rows], self.ranked)


def decision_rows(decisions: RoundDecisions, most_rejected: int, known: pa.Table | None = None) -> tuple[pa.Table, int]:
    """Return the rows of a round, and the number of rejected candidates without one because of ``most_rejected``.

    Candidates in ``known``, the ``id`` and ``reason`` of an earlier round with the same scores, have a row only if they
    were chosen or measured, or if their reason has changed.

    Compared candidates come first, in the selector's order, then those that were chosen or measured without being
    compared. Columns of few values are dictionaries, to be cast to :data:`SCHEMA`.
    """
    record, plan, measured = decisions.record, decisions.plan.ids.numpy(), decisions.measured.numpy()
    touched = pa.array(np.concatenate([plan, measured])).unique().to_numpy()
    scores = _scores_of_groups(decisions, touched) if decisions.compares_groups else _scores(decisions, touched)
    reasons, threshold = _reasons(decisions, scores)
    ranked = np.sort(_sortable(scores.ranked))
    left_out = 0 if decisions.compares_groups else max(0, len(ranked) - len(plan) - most_rejected)
    if left_out:
        kept = np.flatnonzero(_is_in(scores.ids, touched) | (_sortable(scores.keys) >= ranked[left_out]))
        scores, reasons = scores.take(kept), reasons[kept]
    if known is not None:
        names = pa.array([*_REASONS, *map(writable, decisions.selection.reasons)]).take(pa.array(reasons))
        before = known["reason"].take(pc.index_in(pa.array(scores.ids), value_set=known["id"].combine_chunks()))
        same = pc.fill_null(pc.equal(names, before), False).to_numpy(zero_copy_only=False)
        kept = np.flatnonzero(_is_in(scores.ids, touched) | ~same)
        scores, reasons = scores.take(kept), reasons[kept]
    ids = scores.ids
    place = pc.index_in(pa.array(ids), value_set=pa.array(plan))
    influence = pa.array(decisions.influence.double().numpy(), from_pandas=True)
    ranks = len(ranked) - np.searchsorted(ranked, _sortable(scores.keys), side="right")
    columns = {
        "round": _repeated("round", record.round, len(ids)),
        "step": _repeated("step", record.step, len(ids)),
        "id": ids,
        "group": pa.DictionaryArray.from_arrays(decisions.groups_of(ids), [*map(writable, decisions.pool.group_names)]),
        "chosen": place.is_valid(),
        "place": place,
        "score": pa.array(scores.score, from_pandas=True),
        "bonus": pa.array(scores.bonus, from_pandas=True),
        "noise": pa.array(scores.noise, from_pandas=True),
        "rank": pa.array(ranks, pa.int32(), mask=np.isnan(scores.keys)),
        "threshold": _repeated("threshold", threshold, len(ids)),
        "influence": influence.take(pc.index_in(pa.array(ids), value_set=pa.array(measured))),
        "reason": pa.DictionaryArray.from_arrays(reasons, [*_REASONS, *map(writable, decisions.selection.reasons)]),
        "round_flops": _repeated("round_flops", record.total_flops, len(ids)),
        "flops_before": _repeated("flops_before", decisions.flops_before, len(ids)),
    }
    return pa.table(columns), left_out


def _scores(decisions: RoundDecisions, touched: npt.NDArray[np.int64]) -> _Scores:
    """Return the scores of the compared candidates, then NaN for the ``touched`` ones that were not compared."""
    selection = decisions.selection
    if selection.scored is None or selection.scores is None:
        compared, score, noise = np.empty(0, np.int64), np.empty(0), None
    else:
        compared, score, noise = selection.scored.numpy(), selection.scores.double().numpy(), selection.noise
    drawn = None if noise is None else noise(0, len(compared)).double().numpy()
    keys = score if drawn is None else score + drawn
    others = touched[~_is_in(touched, compared)]
    unknown = np.full(len(others), np.nan)
    nothing = np.full(len(compared) + len(others), np.nan)
    return _Scores(
        ids=np.concatenate([compared, others]),
        score=np.concatenate([score, unknown]),
        bonus=nothing,
        noise=nothing if drawn is None else np.concatenate([drawn, unknown]),
        keys=np.concatenate([keys, unknown]),
        ranked=keys,
    )


def _scores_of_groups(decisions: RoundDecisions, touched: npt.NDArray[np.int64]) -> _Scores:
    """Return the scores of the groups of the ``touched`` candidates."""
    reward, bonus = (decisions.selection.group_metrics[name].double().numpy() for name in ("reward", "bonus"))
    codes, keys = decisions.groups_of(touched), reward + bonus
    return _Scores(touched, reward[codes], bonus[codes], np.full(len(codes), np.nan), keys[codes], keys)


def _reasons(decisions: RoundDecisions, scores: _Scores) -> tuple[npt.NDArray[np.int8], float]:
    """Return the index of each candidate's reason, and the threshold: the lowest key of an eligible candidate."""
    selection, plan = decisions.selection, decisions.plan.ids.numpy()
    chosen, has_key = _is_in(scores.ids, plan), ~np.isnan(scores.keys)
    eligible = chosen if selection.eligible is None else _is_in(scores.ids, selection.eligible.numpy())
    forced = np.full(len(scores.ids), -1, np.int8)
    for place, ids in enumerate(selection.reasons.values(), len(_REASONS)):
        forced[_is_in(scores.ids, ids.numpy())] = place
    passed = scores.keys[eligible & has_key & (forced < 0)]
    threshold = float(passed.min()) if len(passed) else np.nan
    cases = [
        (chosen & has_key, BY_SCORE),
        (chosen, BY_SELECTOR),
        (eligible, PASSED),
        (has_key & (decisions.compares_groups & (scores.keys >= threshold)), GROUP_PASSED),
        (has_key, GROUP_BELOW if decisions.compares_groups else BELOW),
    ]
    places = [_REASONS.index(reason) for _, reason in cases]
    reasons = np.select([mask for mask, _ in cases], places, _REASONS.index(ONLY_MEASURED)).astype(np.int8)
    return np.where(chosen & (forced >= 0), forced, reasons), threshold


def _is_in(ids: npt.NDArray[np.int64], among: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = pc.is_in(pa.array(ids), value_set=pa.array(among)).to_numpy(zero_copy_only=False)
    return found


def _sortable(keys: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the keys with -inf for unknown ones, which sort below all others."""
    return np.where(np.isnan(keys), -np.inf, keys)


def _repeated(column: str, value: float, length: int) -> pa.DictionaryArray:
    values = pa.array([value], SCHEMA.field(column).type, from_pandas=True)
    return pa.DictionaryArray.from_arrays(np.zeros(length, np.int8), values)
