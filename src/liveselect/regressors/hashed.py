"""A regressor of negligible cost: hashed token n-grams and a ridge regression in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.functional.ngrams import counted_ngrams
from liveselect.functional.ridge import fit_ridge
from liveselect.grammar import Batch, InfluenceRegressor, Round, State
from liveselect.regressors.targets import (
    Memory,
    TargetScale,
    Weighted,
    check_learning,
    distinct_targets,
    held_out_metrics,
    robust_targets,
)

_MAX_FOLDS = 10  # more would hardly change the chosen penalty, and each costs a solve for every penalty
_MIN_FOLD_EXAMPLES = 4  # a rank correlation needs 3, and two always correlate perfectly
_PENALTIES = torch.logspace(-2, 3, 11, dtype=torch.float64)  # from nearly none to predictions near the mean


class HashedRidgeRegressor(InfluenceRegressor):
    """Predicts influence, in standard deviations, from the tokens and token pairs of a candidate.

    A row becomes the shares that its hashed tokens and pairs of neighbours have in it, each divided by the root of the
    share that is usual (the metric of chi-squared), so that a rare word counts beside a common one. Tokens outside of
    ``attention_mask``, where a batch has one, do not count. The penalty is the one with the lowest squared error on ten
    held-out folds.

    Measurements of earlier rounds are learned from too, with less weight for every round that has passed, and a fit
    moves what is predicted only a part of the way: influence after a round is partly a correction of that round.

    ``spearman`` and ``top_fifth`` are means over the folds of what the predictions for a fold, by a fit that did not
    see it, say of its targets; ``held_out`` is how many targets these were, all of this round. (Pooled over folds, or
    with single examples left out, the correlation would lie below zero where nothing can be learned, because the mean
    of the others is low where the left-out target is high.)

    The fit runs on CPU: of m candidates it takes a few times ``4 m buckets`` bytes, and time that grows with
    ``min(m, buckets)^3``, seconds up to two thousand. A prediction is one gather and one mean for each row.

    Args:
        buckets: number of features, a power of two.
        targets: ``rank_normal`` learns from the ranks of influence, ``standardized`` from its values, of which one in
            a hundred may hold nearly all of the variance.
        forgetting: share of its weight that a measurement keeps from one round to the next; 0 forgets earlier rounds.
        damping: how far a fit moves the predictions from those of the round before, above 0 and up to 1.
        remembered: most measurements that are learned from.
    """

    remembers = True

    def __init__(
        self,
        buckets: int = 2**14,
        targets: TargetScale = "rank_normal",
        forgetting: float = 0.8,
        damping: float = 0.6,
        remembered: int = 2048,
    ) -> None:
        check_plain(HashedRidgeRegressor, locals())
        counted_ngrams(torch.zeros(1, 1, dtype=torch.int64), buckets)  # refuses a wrong number now, not in a round
        check_learning(targets, damping)
        self.buckets = buckets
        self.targets: TargetScale = targets
        self.damping = damping
        self.remembers = forgetting > 0
        self._memory = Memory(forgetting, remembered)
        self._weights: Tensor | None = None
        self._intercept = 0.0

    def fit(self, round: Round, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from ``ids (m,)`` and ``influence (m,)``; repeated ids are averaged.

        Returns ``spearman``, ``top_fifth`` and ``held_out`` (see above; NaN when all targets are equal, and predictions
        are then 0), ``r2`` of the held-out predictions, the chosen ``penalty``, and how many were ``remembered``.

        Raises:
            ValueError: an influence is not finite, or there are fewer than 8 distinct candidates.
        """
        known = distinct_targets(ids, influence)
        targets = robust_targets(known.influence, self.targets)
        if not targets.any():
            self._weights, self._intercept = torch.zeros(self.buckets, dtype=torch.float32), 0.0
            unknown = float("nan")
            return {"spearman": unknown, "top_fifth": unknown, "held_out": 0.0, "r2": unknown, "penalty": unknown}
        rows = self._memory.with_earlier(round.index, known._replace(influence=targets))
        count = min(_MAX_FOLDS, rows.fresh // _MIN_FOLD_EXAMPLES)
        generator = round.generator("regressor/folds")
        parts = (rows.fresh, len(rows.ids) - rows.fresh)
        folds = torch.cat([torch.randperm(part, generator=generator) % count for part in parts])
        features, scale = self._read(round, rows)
        with round.meter.phase("fit regressor"), round.meter.counting():
            found = fit_ridge(features, rows.targets, folds, _PENALTIES, rows.weights)
        self._move_to(found.weights * scale, found.intercept)
        fresh = [(folds[: rows.fresh] == fold).nonzero().flatten() for fold in range(count)]
        within = [held_out_metrics(found.held_out[part], rows.targets[part]) for part in fresh]
        residual = (rows.targets - found.held_out)[: rows.fresh]
        return {
            **{name: _mean_of([each[name] for each in within]) for name in ("spearman", "top_fifth")},
            "held_out": float(rows.fresh),
            "r2": 1.0 - float(residual.square().mean()),
            "penalty": found.penalty,
            "remembered": float(len(rows.ids) - rows.fresh),
        }

    def predict(self, round: Round, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)`` float32 on CPU, standardised.

        Raises:
            RuntimeError: nothing was fitted or restored.
        """
        if self._weights is None:
            raise RuntimeError("HashedRidgeRegressor.predict was called before fit: call fit(round, ids, influence)")
        bucket, counted = counted_ngrams(batch["input_ids"], self.buckets, batch.get("attention_mask"))
        weights = self._weights.to(bucket.device)[bucket]
        if "attention_mask" not in batch:
            return (weights.mean(dim=1) + self._intercept).cpu()
        return ((weights * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1) + self._intercept).cpu()

    def predict_tokens(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what each token adds to the prediction of its row, ``(B, T)``; with the intercept they sum up to it.

        Half of a pair counts to each of its tokens.
        """
        if self._weights is None:
            return None
        bucket, counted = counted_ngrams(batch["input_ids"].cpu(), self.buckets, batch.get("attention_mask"))
        shares = self._weights[bucket] * counted / counted.sum(dim=1, keepdim=True).clamp(min=1)
        width = batch["input_ids"].shape[1]
        single, pairs = shares[:, :width], shares[:, width:] / 2
        return single + torch.nn.functional.pad(pairs, (0, 1)) + torch.nn.functional.pad(pairs, (1, 0))

    def state_dict(self) -> State:
        """Return the fitted function, and what it was fitted on, as tensors and builtins."""
        return {
            "buckets": self.buckets,
            "weights": None if self._weights is None else self._weights.clone(),
            "intercept": self._intercept,
            "memory": self._memory.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore a fitted function.

        Raises:
            ValueError: it was fitted with another number of buckets.
        """
        if state["buckets"] != self.buckets:
            raise ValueError(
                f"the checkpoint holds a regressor with {state['buckets']} buckets, this one has {self.buckets}: "
                f"resume with HashedRidgeRegressor(buckets={state['buckets']})"
            )
        self._weights = None if state["weights"] is None else state["weights"].clone()
        self._intercept = float(state["intercept"])
        self._memory.load_state_dict(state["memory"])

    def _read(self, round: Round, rows: Weighted) -> tuple[Tensor, Tensor]:
        """Return the features ``(m, buckets)`` of the rows, and what a share was multiplied with, ``(buckets,)``."""
        shares = torch.zeros(len(rows.ids), self.buckets, dtype=torch.float32)
        ngrams, row = 0.0, 0
        with round.meter.tracked("fit regressor", len(rows.ids), "candidates") as advance:
            for batch in round.source.in_bulk(rows.ids):
                bucket, counted = counted_ngrams(batch["input_ids"], self.buckets, batch.get("attention_mask"))
                found = counted.sum(dim=1, keepdim=True).clamp(min=1)
                shares[row : row + len(bucket)].scatter_add_(1, bucket.cpu(), (counted.float() / found).cpu())
                ngrams += float(found.sum())
                row += len(bucket)
                advance(len(bucket))
        # what a row has once is as usual as no more than that, however rarely it occurs
        scale = (shares.mean(dim=0) + len(rows.ids) / ngrams).rsqrt()
        return shares.mul_(scale), scale

    def _move_to(self, weights: Tensor, intercept: float) -> None:
        if self._weights is None or not self._weights.any():
            self._weights, self._intercept = weights, intercept
            return
        self._weights = torch.lerp(self._weights, weights, self.damping)
        self._intercept += self.damping * (intercept - self._intercept)


def _mean_of(values: list[float]) -> float:
    defined = [value for value in values if value == value]
    return sum(defined) / len(defined) if defined else float("nan")
