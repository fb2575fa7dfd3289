"""The log-ratio of n-grams as an estimator: no model, refreshed against what was trained on."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.arguments import check_plain
from liveselect.functional.ngram_ratio import BUCKETS, SMOOTHING, add_ngrams, log_ratio, mean_log_ratio
from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, Round, text_tokens


class NgramRatioInfluence(InfluenceEstimator):
    """Prefers candidates whose n-grams are more likely in the reference set than in the pool, and in recent rounds.

    The score is the mean log-ratio of :mod:`liveselect.functional.ngram_ratio` against the pool, plus ``recent`` times
    the one against what the last round trained on: what has just been trained on counts for less. It costs no forward
    of the model; nats per token.

    Args:
        recent: weight of the ratio against what was trained on last; 0 never refreshes.
        smoothing: strength of the smoothing, in n-grams of the reference set.
        buckets: of tokens, and as many of pairs; a power of two.
        pool_rows: rows of the pool, drawn uniformly, that are counted at the most.
    """

    def __init__(
        self, recent: float = 0.5, smoothing: float = SMOOTHING, buckets: int = BUCKETS, pool_rows: int = 1 << 20
    ) -> None:
        check_plain(NgramRatioInfluence, locals())
        if not 0 <= recent < math.inf or pool_rows < 1:
            raise ValueError(f"expected recent of at least 0 and pool_rows of at least 1, got {recent} and {pool_rows}")
        self.recent, self.smoothing, self.buckets, self.pool_rows = recent, smoothing, buckets, pool_rows
        self._pool: Tensor | None = None  # counts, made once
        self._table: Tensor | None = None

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Count the reference set, the pool once, and what was trained on last."""
        with model.meter.phase("count n-grams"):
            reference = torch.zeros(2, self.buckets, dtype=torch.int64)
            for batch in round.source.reference():
                _add(reference, batch)
            if self._pool is None:
                count = min(self.pool_rows, round.pool.size)
                self._pool = self._counted(round, uniform_subset(round.pool.size, count, round.generator("n-grams")))
            table = log_ratio(reference, self._pool, self.smoothing)
            trained = 0 if round.trained is None or not self.recent else len(round.trained)
            if trained:
                table += self.recent * log_ratio(reference, self._counted(round, round.trained), self.smoothing)
        self._table = table
        return {"ngram_reference_tokens": float(reference[0].sum()), "ngram_trained_rows": float(trained)}

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the log-ratio of each example, ``(B,)`` nats per token."""
        if self._table is None:
            raise RuntimeError("NgramRatioInfluence.score was called before fit: call fit(model, round) in each round")
        with model.meter.phase("look up n-grams"):
            return mean_log_ratio(batch["input_ids"].cpu(), text_tokens(batch), self._table)

    def _counted(self, round: Round, ids: Tensor | None) -> Tensor:
        """Return the counts of candidates ``ids (m,)``, shared out over ranks."""
        counts = torch.zeros(2, self.buckets, dtype=torch.int64)
        if ids is not None:
            mine = ids[distributed.shard(len(ids))]
            for batch in round.source.in_bulk(mine) if len(mine) else ():
                _add(counts, batch)
        return distributed.sum_over_ranks(counts)


def _add(counts: Tensor, batch: Batch) -> None:
    add_ngrams(counts, batch["input_ids"].cpu(), text_tokens(batch))
