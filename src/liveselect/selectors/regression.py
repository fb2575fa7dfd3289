"""Regression selection: measure a few candidates, learn to predict the rest, draw by predicted influence."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from liveselect.arguments import check_plain
from liveselect.distributed import gather_objects, gather_shards, shard
from liveselect.functional.correlation import rank_normal
from liveselect.functional.sampling import Noise as DrawnNoise
from liveselect.functional.sampling import capped_topk, gumbel_topk, released_bottomk, uniform_subset
from liveselect.grammar import (
    MIN_MEASUREMENTS,
    NO_IDS,
    Batch,
    InfluenceRegressor,
    Round,
    Selection,
    SelectionWarning,
    Selector,
    State,
)
from liveselect.parts import check_part, restore_part, save_part
from liveselect.selectors.steadiness import Steadiness, Trust
from liveselect.selectors.trial import check_predictions, try_regressor, warn_of_few
from liveselect.selectors.uniform import uniform_selection

Noise = Literal["gumbel_topk", "released_bottomk"]

_DRAW: dict[str, Callable[[Tensor, int, float, torch.Generator], Tensor]] = {
    "gumbel_topk": gumbel_topk,
    "released_bottomk": released_bottomk,
}
_SIGN: dict[str, float] = {"gumbel_topk": 1.0, "released_bottomk": -1.0}


_MOST_OF_A_SHARE = 2048
"""Probes of a round where they are a share of its budget: more would hardly teach more."""

_HARD = 0.1
"""Temperature, in standard deviations of the predictions, up to which a choice is as good as that of the best."""


@dataclass
class _Found:
    """Influence that is known: ``ids (m,)``, ``influence (m,)``, and that of single tokens, ``(m, T)``, if any."""

    ids: Tensor = field(default_factory=lambda: NO_IDS)
    influence: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def add(self, ids: Tensor, influence: Tensor) -> None:
        self.ids = torch.cat([self.ids, ids.cpu()])
        self.influence = torch.cat([self.influence, influence.float().cpu()])
        self.tokens = _rows(self.tokens, len(self.ids))

    def add_tokens(self, tokens: Tensor) -> None:
        """Take the tokens of the candidates that come next."""
        self.tokens = torch.cat([_columns(self.tokens, tokens.shape[1]), _columns(tokens, self.tokens.shape[1])])

    def saved(self) -> list[Tensor]:
        return [self.ids.clone(), self.influence.clone(), self.tokens.clone()]


def _rows(tokens: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, rows - len(tokens)), value=torch.nan)


def _columns(tokens: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, max(0, width - tokens.shape[1])), value=torch.nan)


class RegressionSelector(Selector):
    """Selects by the influence that a regressor predicts; the policy of MATES and PDS.

    Each round measures ``probes`` random candidates, fits the regressor, predicts the influence of a random window of
    ``budget / ratio`` candidates, and draws the budget from it with noise. A round is drawn uniformly, and says so in
    its notes, when there is nothing to go by: fewer than 8 finite measurements, no differences among the measured or
    the predicted influences, or a regressor whose held-out rank correlation is not above ``min_spearman``.

    Only ``temperature / std(predictions)`` decides how hard a round selects. Regressors predict targets of unit
    variance, shrunk by what they do not know: left alone, a poor regressor selects softly; ``standardize`` selects
    equally hard in every case.

    What training steps have shown of their own examples since the last round (:meth:`observe_step`) is learned from as
    well. Where a prior lies beneath (``PriorSelector(..., offset=1.0)``), the normal scores of the predictions' ranks
    are added to it, and count as the held-out rank correlations of the last rounds say: fully from a half on, and not
    at all at 0, where only the prior chooses.

    A hard choice by what was measured last goes back and forth: one kind of text fills a round, and the next flees it.
    Where the mixture of groups changes by more than 0.7 in two rounds running, predictions count half as much (without
    a prior, noise takes their place), until it is quiet again.

    Args:
        regressor: learns from the measured influence.
        probes: candidates measured in each round, at least 8; below 1 a share of the round's budget, up to 2048 of
            them.
        ratio: share of the window that is chosen, 0..1. With fewer candidates than the window needs, all are compared.
        temperature: strength of the noise, in units of the predictions; 0 takes the best.
        noise: ``gumbel_topk`` is the exact Plackett-Luce draw with weights ``exp(prediction / temperature)``;
            ``released_bottomk`` is the form of the released MATES code, which selects harder.
        standardize: whether predictions are scaled to unit variance over the window before the noise.
        min_spearman: a held-out rank correlation at or below this, or NaN, leads to a uniform draw; None never does.
            A regressor that knows nothing is above 0 in every second round, and above ``2 / sqrt(n)``, for n held-out
            measurements, in one of forty.
        trained_share: share of the probes, 0..1, that are candidates of the last plan: whether random ones are worth
            more than what was trained on is the first sign of going back and forth.
        max_group_share: most that one group may fill of a plan, above 0 and up to 1.

    Sources: Yu et al. 2024, "MATES", arXiv 2406.06046 (ratio 0.2, temperature 0.5 in the code and 1.0 in the paper);
    Gu et al. 2024, "PDS", arXiv 2410.07064 (ratio 0.4, temperature 0.1).
    """

    needs_estimator = True

    def __init__(
        self,
        regressor: InfluenceRegressor,
        probes: int | float = 1024,
        ratio: float = 0.2,
        temperature: float = 0.5,
        noise: Noise = "gumbel_topk",
        standardize: bool = False,
        min_spearman: float | None = 0.0,
        trained_share: float = 0.0,
        max_group_share: float = 1.0,
    ) -> None:
        check_plain(RegressionSelector, locals())
        if not 0 < probes < 1 and (probes < MIN_MEASUREMENTS or probes != int(probes)):
            raise ValueError(
                f"expected at least {MIN_MEASUREMENTS} probes in a round to learn from, or a share of its budget "
                f"between 0 and 1, got {probes}"
            )
        if not 0.0 <= trained_share < 1.0:
            raise ValueError(f"expected trained_share, a share of the probes, from 0 to below 1, got {trained_share}")
        if not 0.0 < max_group_share <= 1.0:
            raise ValueError(f"expected max_group_share, a share of a plan, above 0 and up to 1, got {max_group_share}")
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"expected ratio, the share that is chosen, above 0 and up to 1, got {ratio}")
        if min_spearman is not None and not -1.0 <= min_spearman < 1.0:
            raise ValueError(
                f"expected min_spearman, a rank correlation, from -1 to below 1, or None, got {min_spearman}"
            )
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"expected a finite temperature of at least 0, got {temperature}")
        if noise not in _DRAW:
            raise ValueError(f"expected noise to be one of {get_args(Noise)}, got {noise!r}")
        self.regressor = check_part(regressor, InfluenceRegressor, "regressor")
        self.probes = probes
        self.ratio = ratio
        self.temperature = temperature
        self.noise: Noise = noise
        self.standardize = standardize
        self.min_spearman = min_spearman
        self.trained_share = trained_share
        self.max_group_share = max_group_share
        self.uses_groups = max_group_share < 1
        self.learns_tokens = regressor.learns_tokens
        if not regressor.remembers and temperature <= (_HARD if standardize else 0.0):
            warnings.warn(
                f"{type(regressor).__name__} forgets earlier rounds, and a temperature of {temperature:g} takes the "
                "best of what it predicts: such a choice goes back and forth between kinds of text. Let it remember "
                "(forgetting=0.8), or choose more softly (temperature=0.5)",
                SelectionWarning,
                stacklevel=2,
            )
        self._steadiness, self._trust = Steadiness(), Trust()
        self._asked = -1  # round of the last question
        self._measured = _Found()
        self._captured = _Found()  # from training steps since the last round

    def check(self, round: Round, budget: int) -> None:
        """Try the regressor on few candidates, before anything is measured; warn of more probes than candidates."""
        if self.probes >= 1:  # a share of the budget fits by itself
            warn_of_few(round.pool, int(self.probes), f"probes={self.probes}")
        try_regressor(self.regressor, round)

    def propose(self, round: Round) -> Tensor:
        """Return random candidates, ``(m,)`` ascending, once in a round."""
        if self._asked == round.index:
            return NO_IDS
        self._asked, self._measured = round.index, _Found()
        wanted = self.probes
        if wanted < 1:
            wanted = min(max(MIN_MEASUREMENTS, _round_up(self.probes * round.budget)), _MOST_OF_A_SHARE)
        trained = NO_IDS if round.trained is None else round.trained.unique()
        again = min(len(trained), int(self.trained_share * wanted))
        probes = min(int(wanted) - again, len(round.candidates))
        fresh = round.candidates[uniform_subset(len(round.candidates), probes, round.generator("probes"))]
        if not again:
            return fresh
        once_more = trained[uniform_subset(len(trained), again, round.generator("probes of the last plan"))]
        return torch.cat([fresh, once_more]).unique()

    def observe_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Keep the influence of single tokens, ``(m, T)``, for the fit."""
        self._measured.add_tokens(tokens)

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Keep the influence ``(m,)`` of ``ids (m,)`` for the fit."""
        self._measured.add(ids, influence)

    def observe_step(self, ids: Tensor, influence: Tensor) -> None:
        """Keep the influence ``(m,)`` of candidates ``ids (m,)`` that were trained on since the last round.

        The next round learns from it beside what it measures; so it should come from the same estimator.
        """
        self._captured.add(ids, influence)

    def observe_step_tokens(self, ids: Tensor, tokens: Tensor) -> None:
        """Keep what training steps have shown of single tokens, ``(m, T)``, for the fit."""
        self._captured.add_tokens(tokens)

    def select(self, round: Round, budget: int) -> Selection:
        """Fit, predict and draw ``budget`` of the round's candidates.

        Raises:
            ValueError: the regressor returned another number of predictions than it was given candidates.
        """
        selection = self._choose(round, budget)
        if (number := len(round.candidates)) >= self.probes:
            return selection
        few = f"no more than {number} candidates could be measured in this round, fewer than probes={self.probes}"
        return replace(selection, notes=(few, *selection.notes))

    def _choose(self, round: Round, budget: int) -> Selection:
        # used once: another run may use this selector next
        measured, captured = self._measured, self._captured
        self._asked, self._measured, self._captured = -1, _Found(), _Found()
        ids, influence, tokens = measured.ids, measured.influence, measured.tokens
        metrics = _describe(influence)
        if round.trained is not None:
            metrics |= self._steadiness.look(round, ids, influence)
        if len(ids) < MIN_MEASUREMENTS:
            reason = f"{len(ids)} finite measurements are fewer than the {MIN_MEASUREMENTS} that a regressor needs"
            return uniform_selection(round, budget, metrics, (), reason)
        if bool((influence == influence[0]).all()):
            return uniform_selection(round, budget, metrics, (), "all measured influences are equal")
        others = ~torch.isin(captured.ids, ids)  # what is known at the model of today counts
        if len(captured.ids):
            metrics["overheard"] = float(others.sum())
        ids = torch.cat([ids, captured.ids[others]])
        influence = torch.cat([influence, captured.influence[others]])
        shown = captured.tokens[others]
        tokens = torch.cat([_columns(tokens, shown.shape[1]), _columns(shown, tokens.shape[1])])
        if tokens.shape[1]:
            learned = self.regressor.fit_tokens(round, ids, influence, tokens)
        else:
            learned = self.regressor.fit(round, ids, influence)
        # what the ranks report may differ in the last bits; the decision below must not
        fitted = gather_objects(dict(learned))[0]
        metrics |= {f"regressor/{name}": value for name, value in fitted.items()}
        spearman = fitted.get("spearman", float("nan"))
        self._trust.learn(spearman, fitted.get("held_out", float(len(ids))))
        of = ""
        if round.offset is not None:
            spearman, of = self._trust.correlation, " of the last rounds"
            metrics["trust"] = self._trust.weight
        if self._distrusts(spearman):
            reason = f"the regressor's held-out Spearman {spearman:.3f}{of} is not above {self.min_spearman}"
            return uniform_selection(round, budget, metrics, (), reason)
        return self._select_by_prediction(round, budget, metrics)

    def token_scores(self, round: Round, batch: Batch) -> Tensor | None:
        """Return what the regressor says of tokens."""
        return self.regressor.predict_tokens(round, batch)

    def state_dict(self) -> State:
        """Return the measurements of the current round, those captured from steps, and the regressor's state."""
        return {
            "asked": self._asked,
            "measured": self._measured.saved(),
            "captured": self._captured.saved(),
            "steadiness": self._steadiness.state_dict(),
            "trust": self._trust.state_dict(),
            "regressor": save_part(self.regressor),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned; raise ValueError when it was made with another regressor."""
        self._asked = state["asked"]
        self._measured = _Found(*(each.clone() for each in state["measured"]))
        self._captured = _Found(*(each.clone() for each in state["captured"]))
        self._steadiness.load_state_dict(state["steadiness"])
        self._trust.load_state_dict(state["trust"])
        restore_part(self.regressor, state["regressor"], "regressor")

    def _distrusts(self, spearman: float) -> bool:
        return self.min_spearman is not None and not spearman > self.min_spearman

    def _select_by_prediction(self, round: Round, budget: int, metrics: dict[str, float]) -> Selection:
        available, notes = len(round.candidates), tuple[str, ...]()
        wanted = max(budget, _window_size(budget, self.ratio))
        window = round.candidates[uniform_subset(available, min(wanted, available), round.generator("window"))]
        metrics["ratio"] = budget / max(1, len(window))
        if wanted > available:
            notes = (
                f"{budget} of all {available} candidates are chosen, a ratio of {metrics['ratio']:.3f} instead of "
                f"{self.ratio:g}, which would need {wanted} candidates",
            )
        predictions = self._predict(round, window)
        broken = int((~predictions.isfinite()).sum())
        if broken:
            reason = f"{broken} of {len(window)} predictions are not finite"
            return uniform_selection(round, budget, metrics, notes, reason)
        metrics["predictions/std"] = std = float(predictions.double().std(correction=0))
        if std == 0.0:
            return uniform_selection(round, budget, metrics, notes, "all predictions are equal")
        temperature = self.temperature * (std if self.standardize else 1.0)  # as if the predictions were divided by std
        live = self._steadiness.weight
        if live < 1:
            notes += (f"the mixture went back and forth: predictions count {live:g} times as much",)
        if round.offset is not None:
            predictions = (live * self._trust.weight * rank_normal(predictions)).float() + round.offset[window]
        else:
            temperature += (1 - live) * std
        metrics["temperature_over_std"] = temperature / float(predictions.double().std(correction=0))
        added = DrawnNoise(temperature, round.generator("select"), _SIGN[self.noise])
        groups = round.pool.groups
        if self.max_group_share < 1 and groups is not None:
            keys, most = predictions.double() + added(0, len(window)), max(1, _round_up(self.max_group_share * budget))
            drawn = capped_topk(keys, groups[window].long(), budget, most)
        else:
            drawn = _DRAW[self.noise](predictions, budget, temperature, round.generator("select"))
        return Selection(window[drawn], window, predictions, metrics, notes, noise=added)

    def _predict(self, round: Round, ids: Tensor) -> Tensor:
        """Return the predicted influence of ``ids (n,)``, ``(n,)`` float32, each rank predicting its share."""
        mine = ids[shard(len(ids))]
        parts = [torch.empty(0, dtype=torch.float32)]
        with round.meter.tracked("predict influence", len(mine), "candidates") as advance:
            for batch in round.in_bulk(mine):
                predicted = self.regressor.predict(round, batch)
                check_predictions(self.regressor, predicted, len(batch["input_ids"]))
                parts.append(predicted.float().cpu())
                advance(len(parts[-1]))
            return gather_shards(torch.cat(parts), len(ids))


def _round_up(number: float) -> int:
    return int(-(-number // 1)) if abs(number - round(number)) > 1e-9 else round(number)


def _window_size(budget: int, ratio: float) -> int:
    return round(budget / ratio)


def _describe(influence: Tensor) -> dict[str, float]:
    metrics = {"measured": float(len(influence))}
    if len(influence):
        values = influence.double()
        metrics |= {"influence/mean": float(values.mean()), "influence/std": float(values.std(correction=0))}
    return metrics
