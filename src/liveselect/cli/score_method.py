"""``liveselect score --method NAME``: scores of every sequence of a pool by one of the known methods."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cli.score_job import PoolJob, agreed, read_or_refuse, wait_for_all
from liveselect.cli.score_methods import BuiltMethod
from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import REFERENCE_SET, Batch, CandidateSource, InfluenceEstimator, text_tokens
from liveselect.json_lines import whole_file
from liveselect.losses import token_weights
from liveselect.preserve import measuring
from liveselect.scoring.scorer import Rows, Scorer

FITTED = "fitted.pt"


@dataclass(kw_only=True)
class MethodJob(PoolJob):
    """Scores a pool with a method: a :class:`Scorer`, or an estimator that is asked for every candidate.

    Attributes:
        method: the method with its settings; an estimator needs ``model``.
    """

    method: BuiltMethod

    def _refuse_settings(self) -> None:
        super()._refuse_settings()
        if isinstance(self.method.part, InfluenceEstimator) and self.model is None:
            raise ValueError(
                f"expected a model to score with, which {self.method.card.name} needs: pass --config with a file of "
                "`liveselect fit`"
            )

    def _depends_on(self) -> list[object]:
        return [
            self.method.card.name,
            {name: str(value) for name, value in self.method.chosen.items()},
            *super()._depends_on(),
        ]

    def _prepared(self) -> dict[str, object]:
        about: dict[str, object] = {"method": {**self.method.card.as_json(), "settings": _builtins(self.method.chosen)}}
        with self.round.meter.phase("fit method"):
            metrics = (
                self._fit_scorer(self.method.part) if isinstance(self.method.part, Scorer) else self._fit_estimator()
            )
        self._spent.keep()
        self.report(f"{self.method.card.name}: ready to score {self.round.pool.size} candidates")
        return {**about, "metrics": {name: float(value) for name, value in metrics.items()}}

    def _fit_scorer(self, scorer: Scorer) -> Mapping[str, float]:
        round, size = self.round, self.round.pool.size
        count = min(scorer.pool_rows, size)
        ids = uniform_subset(size, count, round.generator("fit method"))
        if scorer.shares_pool:
            ids = ids[distributed.shard(len(ids))]
        pool = (rows_of(batch, scorer.reads, round.source) for batch in self._rows(ids))
        batches = list(round.source.reference())
        _refuse_weights(batches, round.source.reference_names)
        reference = (rows_of(batch, scorer.reads, round.source) for batch in batches)
        with round.meter.forwards(*scorer.networks):
            scorer.fit(reference, pool, distributed.sum_over_ranks)
        for name in scorer.uncounted:
            round.meter.uncounted[name] += 1
        return {"pool_rows_fitted": count}

    def _fit_estimator(self) -> Mapping[str, float]:
        method, model, file = self.method.part, self.model, self.work / FITTED
        if model is None or not isinstance(method, InfluenceEstimator):
            raise TypeError(f"expected a Scorer, or an InfluenceEstimator with a model, got {type(method).__name__}")
        if agreed(file.exists()):
            kept = read_or_refuse(file, lambda: torch.load(file, map_location="cpu", weights_only=True))
            method.load_fitted_state(kept["state"])
            return dict(kept["metrics"])
        with measuring(model.module, model.optimizer):
            metrics = dict(method.fit(model, self.round))
        state = method.fitted_state()
        if state is not None and distributed.rank() == 0:  # a method without state is fitted again after a stop
            with whole_file(file) as stream:
                torch.save({"state": state, "metrics": metrics}, stream)
        wait_for_all()
        return metrics

    def _rows(self, ids: Tensor) -> Iterable[Batch]:
        if isinstance(self.method.part, Scorer):  # no model sees these
            return self.round.source.in_bulk(ids) if len(ids) else ()
        return super()._rows(ids)

    def _scores_of(self, batch: Batch) -> Tensor:
        method, model = self.method.part, self.model
        if isinstance(method, Scorer):
            with self.round.meter.forwards(*method.networks):
                return method(rows_of(batch, method.reads, self.round.source))
        if model is None:
            raise TypeError(f"expected a model for {type(method).__name__}, got none")
        with measuring(model.module, model.optimizer):
            scores = method.score(model, batch).float().cpu()
        return scores.nan_to_num(nan=-torch.inf)  # without a finite loss there is no score, and it is never drawn

    def _finished(self, values: np.ndarray) -> np.ndarray:
        found = torch.from_numpy(np.array(values))
        if isinstance(self.method.part, Scorer):
            with self.round.meter.counting():
                found = self.method.part.finished(found)
        return self.method.finish(found).numpy()


def _refuse_weights(batches: Iterable[Batch], names: Sequence[str]) -> None:
    """Raise ValueError where the sets of a mixture have unequal weights, for which cheap methods have no place."""
    weights = dict.fromkeys(range(len(names)), 0.0)
    for batch in batches if names else ():
        weights[int(batch[REFERENCE_SET][0])] += float(token_weights(batch).double().sum())
    total = sum(weights.values())
    if total and max(weights.values()) - min(weights.values()) > 1e-6 * total:
        shares = ", ".join(f"{names[number]}: {weight / total:.3g}" for number, weight in weights.items())
        raise ValueError(
            f"cheap methods take the examples of all reference sets alike, but these have weights ({shares}): leave "
            "the weights out, or score with an estimator (FirstOrderInfluence, LESSInfluence, PMPInfluence)"
        )


def rows_of(batch: Batch, reads: str, source: CandidateSource) -> Rows:
    """Return a batch of the data as a scorer reads it: its tokens, or their texts."""
    ids, mask = batch["input_ids"].cpu(), text_tokens(batch)
    if reads == "tokens":
        return Rows(input_ids=ids) if mask is None else Rows(input_ids=ids, attention_mask=mask)
    if mask is None:
        return Rows(text=source.decode(ids))
    return Rows(text=[source.decode(row[kept][None])[0] for row, kept in zip(ids, mask, strict=True)])


def _builtins(settings: Mapping[str, object]) -> dict[str, object]:
    plain = (str, int, float, bool, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
