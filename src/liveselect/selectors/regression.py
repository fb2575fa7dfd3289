"""Regression selection: measure a few candidates, learn to predict the rest, draw by predicted influence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from liveselect.distributed import gather_objects, gather_shards, shard
from liveselect.functional.sampling import Noise as DrawnNoise
from liveselect.functional.sampling import gumbel_topk, released_bottomk, uniform_subset
from liveselect.protocols import InfluenceRegressor, RoundContext, Selection
from liveselect.selectors.leftovers import fill_up
from liveselect.selectors.trial import check_predictions, try_regressor
from liveselect.selectors.uniform import check_budget, training_order, uniform_selection

Noise = Literal["gumbel_topk", "released_bottomk"]

FEWEST_MEASURED = 8
"""With fewer finite measurements nothing is learned from them and the round is drawn uniformly."""

_DRAW: dict[str, Callable[[Tensor, int, float, torch.Generator], Tensor]] = {
    "gumbel_topk": gumbel_topk,
    "released_bottomk": released_bottomk,
}
_SIGN: dict[str, float] = {"gumbel_topk": 1.0, "released_bottomk": -1.0}


@dataclass
class _Measured:
    """What one round has measured so far: ``ids (m,)`` and ``influence (m,)``."""

    round: int = -1
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    influence: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))


class RegressionSelector:
    """Selects by the influence that a regressor predicts; the policy of MATES and PDS.

    Each round measures ``probes`` random candidates, fits the regressor, predicts the influence of a random window of
    ``budget / ratio`` candidates, and draws the budget from it with noise. A round is drawn uniformly, and says so in
    its notes, when there is nothing to go by: fewer than 8 finite measurements, no differences among the measured or
    the predicted influences, or a regressor whose held-out rank correlation is not above ``min_spearman``.

    Only ``temperature / std(predictions)`` decides how hard a round selects. Regressors predict targets of unit
    variance, shrunk by what they do not know: left alone, a poor regressor selects softly; ``standardize`` selects
    equally hard whatever it knows.

    What training steps told of their own examples since the last round (:meth:`overhear`) is learned from as well.

    Args:
        regressor: learns from the measured influence.
        probes: candidates measured in each round, at least 8.
        ratio: share of the window that is chosen, 0..1. With fewer candidates than the window needs, all are compared.
        temperature: strength of the noise, in units of the predictions; 0 takes the best.
        noise: ``gumbel_topk`` is the exact Plackett-Luce draw with weights ``exp(prediction / temperature)``;
            ``released_bottomk`` is the form of the released MATES code, which selects harder.
        standardize: whether predictions are scaled to unit variance over the window before the noise.
        min_spearman: a held-out rank correlation at or below this, or NaN, leads to a uniform draw; None never does.
            A regressor that knows nothing is above 0 in every second round, and above ``2 / sqrt(n)``, for n held-out
            measurements, in one of forty.

    Sources: Yu et al. 2024, "MATES", arXiv 2406.06046 (ratio 0.2, temperature 0.5 in the code and 1.0 in the paper);
    Gu et al. 2024, "PDS", arXiv 2410.07064 (ratio 0.4, temperature 0.1).
    """

    measures = True
    """It proposes candidates, so a run of it needs an estimator."""

    def __init__(
        self,
        regressor: InfluenceRegressor,
        probes: int = 1024,
        ratio: float = 0.2,
        temperature: float = 0.5,
        noise: Noise = "gumbel_topk",
        standardize: bool = False,
        min_spearman: float | None = 0.0,
    ) -> None:
        if probes < FEWEST_MEASURED:
            raise ValueError(f"expected at least {FEWEST_MEASURED} probes in a round to learn from, got {probes}")
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"expected ratio, the share that is chosen, above 0 and up to 1, got {ratio}")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"expected a finite temperature of at least 0, got {temperature}")
        if noise not in _DRAW:
            raise ValueError(f"expected noise to be one of {get_args(Noise)}, got {noise!r}")
        self.regressor = regressor
        self.probes = probes
        self.ratio = ratio
        self.temperature = temperature
        self.noise: Noise = noise
        self.standardize = standardize
        self.min_spearman = min_spearman
        self._measured = _Measured()
        self._heard = _Measured()  # since the last round

    def check(self, context: RoundContext) -> None:
        """Try the regressor on few candidates, before anything is measured."""
        try_regressor(self.regressor, context)

    def propose(self, context: RoundContext) -> Tensor:
        """Return random candidates, ``(m,)`` ascending, and nothing more once they were measured in this round."""
        if self._measured.round == context.round and len(self._measured.ids):
            return torch.empty(0, dtype=torch.int64)
        self._measured = _Measured(context.round)
        probes = min(self.probes, len(context.candidates))
        return context.candidates[uniform_subset(len(context.candidates), probes, context.generator("probes"))]

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Take note of the influence ``(m,)`` of ``ids (m,)``; NaN and infinities are left out of the fit."""
        known = self._measured
        self._measured = _Measured(
            known.round, torch.cat([known.ids, ids.cpu()]), torch.cat([known.influence, influence.float().cpu()])
        )

    def overhear(self, ids: Tensor, influence: Tensor) -> None:
        """Take note of the influence ``(m,)`` of candidates ``ids (m,)`` that were trained on since the last round.

        The next round learns from it beside what it measures; so it should come from the same estimator. What is not
        finite is left out.
        """
        finite, known = influence.isfinite(), self._heard
        self._heard = _Measured(
            ids=torch.cat([known.ids, ids[finite].cpu()]),
            influence=torch.cat([known.influence, influence[finite].float().cpu()]),
        )

    def select(self, context: RoundContext, budget: int) -> Selection:
        """Fit, predict and draw ``budget`` of the context's candidates, in random training order.

        Raises:
            ValueError: there are fewer candidates than the budget, or the regressor returned another number of
                predictions than it was given candidates.
        """
        check_budget(context, budget)
        return fill_up(context, budget, self._fit_and_draw)

    def _fit_and_draw(self, context: RoundContext, budget: int) -> Selection:
        measured, self._measured = self._measured, _Measured()  # told once: another run may use this selector next
        heard, self._heard = self._heard, _Measured()
        finite = measured.influence.isfinite()
        ids, influence = measured.ids[finite], measured.influence[finite]
        metrics = _describe(influence, dropped=len(finite) - len(ids))
        notes = _note_dropped(len(finite) - len(ids), len(finite))
        if len(ids) < FEWEST_MEASURED:
            reason = f"{len(ids)} finite measurements are fewer than the {FEWEST_MEASURED} that a regressor needs"
            return _uniform(context, budget, metrics, notes, reason)
        if bool((influence == influence[0]).all()):
            return _uniform(context, budget, metrics, notes, "all measured influences are equal")
        others = ~torch.isin(heard.ids, ids)  # what is known at the model of today counts
        if len(heard.ids):
            metrics["overheard"] = float(others.sum())
        ids = torch.cat([ids, heard.ids[others]])
        influence = torch.cat([influence, heard.influence[others]])
        # what the ranks report may differ in the last bits; the decision below must not
        fitted = gather_objects(dict(self.regressor.fit(context, ids, influence)))[0]
        metrics |= {f"regressor/{name}": value for name, value in fitted.items()}
        if self._distrusts(spearman := fitted.get("spearman", float("nan"))):
            reason = f"the regressor's held-out Spearman {spearman:.3f} is not above {self.min_spearman}"
            return _uniform(context, budget, metrics, notes, reason)
        return self._select_by_prediction(context, budget, metrics, notes)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements of the current round, what was overheard, and the regressor's state if it has one."""
        stateful = hasattr(self.regressor, "state_dict")
        return {
            "round": self._measured.round,
            "ids": self._measured.ids.clone(),
            "influence": self._measured.influence.clone(),
            "heard": [self._heard.ids.clone(), self._heard.influence.clone()],
            "regressor": self.regressor.state_dict() if stateful else None,  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: the state was made with a regressor that keeps state and this one does not, or the reverse.
        """
        stateful = hasattr(self.regressor, "load_state_dict")
        if stateful != (state["regressor"] is not None):
            raise ValueError(
                f"the checkpoint holds {'no' if stateful else 'a'} regressor state, which does not fit "
                f"{type(self.regressor).__name__}: resume with the regressor that the run began with"
            )
        self._measured = _Measured(state["round"], state["ids"].clone(), state["influence"].clone())
        self._heard = _Measured(-1, *(each.clone() for each in state["heard"]))
        if stateful:
            self.regressor.load_state_dict(state["regressor"])  # type: ignore[attr-defined]

    def _distrusts(self, spearman: float) -> bool:
        return self.min_spearman is not None and not spearman > self.min_spearman

    def _select_by_prediction(
        self, context: RoundContext, budget: int, metrics: dict[str, float], notes: tuple[str, ...]
    ) -> Selection:
        available = len(context.candidates)
        wanted = max(budget, round(budget / self.ratio))
        window = context.candidates[uniform_subset(available, min(wanted, available), context.generator("window"))]
        metrics["ratio"] = budget / max(1, len(window))
        if wanted > available:
            notes += (
                f"{budget} of all {available} candidates are chosen, a ratio of {metrics['ratio']:.3f} instead of "
                f"{self.ratio:g}, which would need {wanted} candidates",
            )
        predictions = self._predict(context, window)
        broken = int((~predictions.isfinite()).sum())
        if broken:
            reason = f"{broken} of {len(window)} predictions are not finite"
            return _uniform(context, budget, metrics, notes, reason)
        metrics["predictions/std"] = std = float(predictions.double().std(correction=0))
        if std == 0.0:
            return _uniform(context, budget, metrics, notes, "all predictions are equal")
        temperature = self.temperature * (std if self.standardize else 1.0)  # as if the predictions were divided by std
        metrics["temperature_over_std"] = temperature / std
        drawn = _DRAW[self.noise](predictions, budget, temperature, context.generator("select"))
        added = DrawnNoise(temperature, context.generator("select"), _SIGN[self.noise])
        return Selection(training_order(context, window[drawn]), window, predictions, metrics, notes, noise=added)

    def _predict(self, context: RoundContext, ids: Tensor) -> Tensor:
        """Return the predicted influence of ``ids (n,)``, ``(n,)`` float32, each rank predicting its share."""
        mine = ids[shard(len(ids))]
        parts = [torch.empty(0, dtype=torch.float32)]
        with context.phase("predict influence", len(mine), "candidates") as advance:
            for batch in context.candidate_batches(mine):
                predicted = self.regressor.predict(context, batch)
                check_predictions(self.regressor, predicted, len(batch["input_ids"]))
                parts.append(predicted.float().cpu())
                advance(len(parts[-1]))
            return gather_shards(torch.cat(parts), len(ids))


def _describe(influence: Tensor, dropped: int) -> dict[str, float]:
    metrics = {"measured": float(len(influence)), "dropped": float(dropped)}
    if len(influence):
        values = influence.double()
        metrics |= {"influence/mean": float(values.mean()), "influence/std": float(values.std(correction=0))}
    return metrics


def _note_dropped(dropped: int, measured: int) -> tuple[str, ...]:
    if not dropped:
        return ()
    return (f"{dropped} of {measured} measured influences are not finite and were left out",)


def _uniform(
    context: RoundContext, budget: int, metrics: dict[str, float], notes: tuple[str, ...], reason: str
) -> Selection:
    return uniform_selection(context, budget, metrics, (*notes, f"drawn uniformly: {reason}"))
