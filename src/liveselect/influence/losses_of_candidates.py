"""Estimators that need forwards only: perplexity, reducible loss, and loss drop."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.arguments import check_plain, refuse_missing_folder
from liveselect.functional.bands import Band, band_edges
from liveselect.functional.sampling import uniform_subset
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, State
from liveselect.influence.other_weights import OtherWeights, trained_on_reference
from liveselect.influence.reference import counting
from liveselect.losses import causal_lm_loss

_LEAST_LOSS = 1e-6  # nats per token: below it a relative drop is rounding


class PerplexityInfluence(InfluenceEstimator):
    """Prefers candidates of low, middle or high perplexity under the live model, or under another one.

    The score is minus the distance of the candidate's loss, nats per token, from the band: 0 inside. The edges of the
    band are thirds of the losses of a few candidates, measured again in each round; ``band=None`` returns minus the
    loss. Nothing is compared with the reference set.

    Args:
        band: ``low``, ``middle`` or ``high`` third; None for minus the loss.
        scorer: another language model, or the folder or name that Transformers loads it from; by default the live one.
        sampled: candidates whose losses set the edges.

    Source: the PPL selector of arXiv 2410.16208 prefers the middle third; Marion et al. 2023, arXiv 2309.04564, the
    middle; Ankner et al. 2024, arXiv 2405.20541, find the best band to depend on the data.
    """

    def __init__(
        self, band: Band | None = "middle", scorer: nn.Module | str | Path | None = None, sampled: int = 256
    ) -> None:
        check_plain(PerplexityInfluence, locals())
        if band is not None and band not in get_args(Band):
            raise ValueError(f"expected band to be one of {get_args(Band)} or None, got {band!r}")
        if sampled < 3:
            raise ValueError(f"expected sampled of at least 3, one for each band, got {sampled}")
        self.band: Band | None = band
        self.sampled = sampled
        self._other = _OtherModel(scorer)
        self._edges: tuple[float, float] | None = None

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Find the edges of the band.

        Raises:
            NotMeasurableError: fewer than three of the sampled candidates have a finite loss.
        """
        if self.band is None:
            return {}
        count = min(self.sampled, len(round.candidates))
        ids = round.candidates[uniform_subset(len(round.candidates), count, round.generator("perplexity band"))]
        with model.meter.phase("perplexity band"):
            share = model.view.take_share(ids)  # all of them where ranks hold parts, and must compute in step
            mine = [self._losses(model, batch) for batch in round.batches(share)]
            losses = torch.cat(mine).cpu() if mine else torch.empty(0)
            losses = losses if len(share) == count else distributed.gather_shards(losses, count)
        losses = losses[losses.isfinite()]
        if len(losses) < 3:
            raise NotMeasurableError(f"expected 3 of {count} sampled candidates to have finite losses, got {losses}")
        self._edges = band_edges(losses)
        return {"perplexity_low_edge": self._edges[0], "perplexity_high_edge": self._edges[1]}

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return minus the distance from the band, ``(B,)`` nats per token; NaN where the loss is not finite."""
        with model.meter.phase("losses of candidates"):
            losses = self._losses(model, batch)
        losses = losses.where(losses.isfinite(), math.nan)
        if self.band is None:
            return -losses
        if self._edges is None:
            raise RuntimeError("PerplexityInfluence.score was called before fit: call fit(model, round) in each round")
        low, high = self._edges
        below, above = (low - losses).clamp(min=0), (losses - high).clamp(min=0)
        return {"low": -(losses - low).clamp(min=0), "middle": -(below + above), "high": -(high - losses).clamp(min=0)}[
            self.band
        ]

    def fitted_state(self) -> State | None:
        """Return the edges of the band."""
        return None if self._edges is None else {"edges": list(self._edges)}

    def load_fitted_state(self, state: State) -> None:
        """Restore the edges of the band."""
        low, high = state["edges"]
        self._edges = (low, high)

    def _losses(self, model: LiveModel, batch: Batch) -> Tensor:
        if self._other.given:
            return self._other.losses(model, batch)
        return _live_losses(model, batch)


class _TrainedOnReference(InfluenceEstimator):
    """Keeps the weights of a short training on the reference set, which a round's candidates are compared under."""

    def __init__(self, steps: int, learning_rate: float, step_rows: int) -> None:
        _check_training(steps, learning_rate, step_rows)
        self.steps, self.learning_rate, self.step_rows = steps, learning_rate, step_rows
        self._trained: OtherWeights | None = None
        self._state: State | None = None

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Train on the reference set, keep the weights, and put the model back."""
        self._trained, metrics = trained_on_reference(model, round, self.steps, self.learning_rate, self.step_rows)
        self._state = {"weights": self._trained.whole(model)}
        return metrics

    def fitted_state(self) -> State | None:
        """Return the trained weights."""
        return self._state

    def load_fitted_state(self, state: State) -> None:
        """Restore the trained weights."""
        self._state, self._trained = state, OtherWeights(state["weights"], is_whole=True)

    def release(self) -> None:
        """Free the trained weights."""
        self._trained = self._state = None


class ReducibleLossInfluence(_TrainedOnReference):
    r"""Prefers candidates that the live model can still learn, and that are like the reference set: reducible loss.

    The score is :math:`\ell(\theta) - \ell(\theta_{ref})`, nats per token: the loss of the live model less that of a
    model that was trained on data like the reference set. By default that model is the live one after a short training
    on the reference set, as in :class:`LossDropInfluence`, made again for each fit.

    Args:
        reference_model: a language model trained on data like the reference set, or the folder or name that
            Transformers loads it from.
        steps: of the short training, where there is no such model.
        learning_rate: of AdamW in it.
        step_rows: examples of the reference set in one of its steps, at least.

    Source: Mindermann et al. 2022, "Prioritized training on points that are learnable, worth learning, and not yet
    learnt", arXiv 2206.07137.
    """

    def __init__(
        self,
        reference_model: nn.Module | str | Path | None = None,
        steps: int = 16,
        learning_rate: float = 1e-4,
        step_rows: int = 64,
    ) -> None:
        check_plain(ReducibleLossInfluence, locals())
        super().__init__(steps, learning_rate, step_rows)
        self._other = _OtherModel(reference_model)

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Train on the reference set, where no model was given."""
        return {} if self._other.given else super().fit(model, round)

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the difference of the two losses, ``(B,)`` nats per token; NaN where one is not finite."""
        with model.meter.phase("losses of candidates"):
            if self._other.given:
                live, reference = _live_losses(model, batch), self._other.losses(model, batch)
            else:
                live, reference = _two_losses(model, batch, self._trained, type(self).__name__)
        return _finite(live - reference)


class LossDropInfluence(_TrainedOnReference):
    r"""Prefers candidates whose loss drops most, relative to its size, while the model trains on the reference set.

    The score is :math:`(\ell(\theta) - \ell(\theta')) / \ell(\theta)`, with :math:`\theta'` the live weights after a
    short training on the reference set: two forwards of a candidate, no gradient of it, any kernel, any sharding. Where
    training on the reference set helps a text, training on the text helps the reference set.

    Args:
        steps: of the training on the reference set.
        learning_rate: of AdamW in it.
        step_rows: examples of the reference set in one of its steps, at least.

    Source: TAP, arXiv 2605.09404. Its abstract says how candidates are ranked, not how the drop is normalised; here it
    is divided by the loss before.
    """

    def __init__(self, steps: int = 16, learning_rate: float = 1e-4, step_rows: int = 64) -> None:
        check_plain(LossDropInfluence, locals())
        super().__init__(steps, learning_rate, step_rows)

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the relative drop of each loss, ``(B,)``; NaN where a loss is not finite."""
        with model.meter.phase("losses of candidates"):
            before, after = _two_losses(model, batch, self._trained, type(self).__name__)
        return _finite((before - after) / before.clamp(min=_LEAST_LOSS))


class _OtherModel:
    """A language model beside the live one, loaded when it is first needed."""

    def __init__(self, model: nn.Module | str | Path | None) -> None:
        if isinstance(model, str | Path):
            refuse_missing_folder(model)
        self.given = model is not None
        self._model = model

    @torch.no_grad()
    def losses(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return its losses, ``(B,)`` nats per token."""
        module = self._on(model.device)
        with counting(replace(model, module=module), "forward", batch), model.autocast():
            return causal_lm_loss(module, batch).float()

    def _on(self, device: torch.device) -> nn.Module:
        if not isinstance(self._model, nn.Module):
            from transformers import AutoModelForCausalLM

            loaded: nn.Module = AutoModelForCausalLM.from_pretrained(str(self._model), trust_remote_code=False)
            self._model = loaded
        return self._model.eval().to(device)


@torch.no_grad()
def _live_losses(model: LiveModel, batch: Batch, full_precision: bool = False) -> Tensor:
    with counting(model, "forward", batch), model.full_precision() if full_precision else model.autocast():
        return model.losses(batch).float()


def _two_losses(model: LiveModel, batch: Batch, trained: OtherWeights | None, name: str) -> tuple[Tensor, Tensor]:
    """Return the losses now and with the trained weights, ``(B,)`` each; in full precision, as they are close."""
    if trained is None:
        raise RuntimeError(f"{name}.score was called before fit: call fit(model, round) in each round")
    before = _live_losses(model, batch, full_precision=True)
    with trained.on(model):
        return before, _live_losses(model, batch, full_precision=True)


def _finite(scores: Tensor) -> Tensor:
    return scores.where(scores.isfinite(), math.nan)


def _check_training(steps: int, learning_rate: float, step_rows: int) -> None:
    if steps < 1 or step_rows < 1 or not 0 < learning_rate < math.inf:
        raise ValueError(
            "expected steps and step_rows of at least 1 and a positive learning_rate, got "
            f"{steps}, {step_rows} and {learning_rate}"
        )
