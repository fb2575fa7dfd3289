"""A regressor of negligible cost: hashed token n-grams and a ridge regression in closed form."""

from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.functional.correlation import spearman
from liveselect.functional.ngrams import hashed_ngrams
from liveselect.functional.ridge import fit_ridge
from liveselect.grammar import Batch, InfluenceRegressor, Round, State
from liveselect.regressors.targets import distinct_targets, standardized

_MAX_FOLDS = 10  # more would hardly change the chosen penalty, and each costs a solve for every penalty
_MIN_FOLD_EXAMPLES = 4  # a rank correlation needs 3, and two always correlate perfectly
_PENALTIES = torch.logspace(-2, 3, 11, dtype=torch.float64)  # from nearly none to predictions near the mean


class HashedRidgeRegressor(InfluenceRegressor):
    """Predicts influence, in units of its standard deviation, from the tokens and token pairs of a candidate.

    A row becomes the normalised ``log(1 + count)`` of its hashed tokens and pairs of neighbours. Tokens outside of
    ``attention_mask``, where a batch has one, do not count. The penalty is the one with the lowest squared error on ten
    held-out folds. Every fit starts afresh.

    ``spearman`` is the mean over the folds of the rank correlation within a fold, between targets and the predictions
    of a fit that did not see the fold. (Pooled over folds, or with single examples left out, it would lie below zero
    where nothing can be learned, because the mean of the others is low where the left-out target is high.)

    The fit runs on CPU: of m candidates it takes a few times ``4 m buckets`` bytes, and time that grows with
    ``min(m, buckets)^3``, seconds up to two thousand. A prediction is one gather and one sum for each row.

    Args:
        buckets: number of features, a power of two.
    """

    def __init__(self, buckets: int = 2**14) -> None:
        check_plain(HashedRidgeRegressor, locals())
        hashed_ngrams(torch.zeros(1, 1, dtype=torch.int64), buckets)  # refuses a wrong number now, not in a round
        self.buckets = buckets
        self._weights: Tensor | None = None
        self._intercept = 0.0

    def fit(self, round: Round, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from ``ids (m,)`` and ``influence (m,)``; repeated ids are averaged.

        Returns ``spearman`` (NaN when all targets are equal, and predictions are then 0), ``r2`` of the held-out
        predictions, and the chosen ``penalty``.

        Raises:
            ValueError: an influence is not finite, or there are fewer than 8 distinct candidates.
        """
        known = distinct_targets(ids, influence)
        std = float(known.influence.std(correction=0))
        targets = standardized(known.influence, float(known.influence.mean()), std)
        if std == 0.0:
            self._weights, self._intercept = torch.zeros(self.buckets, dtype=torch.float32), 0.0
            return {"spearman": float("nan"), "r2": float("nan"), "penalty": float("nan")}
        m = len(targets)
        count = min(_MAX_FOLDS, m // _MIN_FOLD_EXAMPLES)
        folds = torch.randperm(m, generator=round.generator("regressor/folds")) % count
        with round.meter.tracked("fit regressor", m, "candidates") as advance:
            features = torch.zeros(m, self.buckets, dtype=torch.float32)
            row = 0
            for batch in round.source.candidates(known.ids):
                bucket, weight = self._features(batch)
                features[row : row + len(bucket)].scatter_add_(1, bucket, weight)
                row += len(bucket)
                advance(len(bucket))
            with round.meter.counting():
                found = fit_ridge(features, targets, folds, _PENALTIES)
        self._weights, self._intercept = found.weights, found.intercept
        within = [spearman(found.held_out[folds == f], targets[folds == f]) for f in range(count)]
        defined = [value for value in within if value == value]
        return {
            "spearman": sum(defined) / len(defined) if defined else float("nan"),
            "r2": 1.0 - float((targets - found.held_out).square().mean()),
            "penalty": found.penalty,
        }

    def predict(self, round: Round, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)`` float32 on CPU, standardised.

        Raises:
            RuntimeError: nothing was fitted or restored.
        """
        if self._weights is None:
            raise RuntimeError("HashedRidgeRegressor.predict was called before fit: call fit(round, ids, influence)")
        bucket, weight = self._features(batch)
        return ((self._weights.to(bucket.device)[bucket] * weight).sum(dim=1) + self._intercept).cpu()

    def state_dict(self) -> State:
        """Return the fitted function as tensors and builtins."""
        return {
            "buckets": self.buckets,
            "weights": None if self._weights is None else self._weights.clone(),
            "intercept": self._intercept,
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

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return hashed_ngrams(batch["input_ids"], self.buckets, batch.get("attention_mask"))
