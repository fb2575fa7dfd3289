"""What a round will cost, found before training starts: a few candidates are measured and trained on by the clock."""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cost import CostMeter
from liveselect.functional.sharding import is_sharded
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, Selector, SmallFit
from liveselect.parts import fit_metrics
from liveselect.preserve import measuring

_CANDIDATES = 2
"""Candidates that are tried first; where that is quick, a whole batch of them."""

_QUICK_SECONDS = 1.0
_QUICK_SHARE = 0.005
"""Of the examples of a round: where a batch is more, only a few are tried, for the price must not be what is dear."""
_MOST_QUESTIONS = 64


@dataclass(frozen=True)
class Price:
    """What measuring one round takes, and training until the next one.

    Attributes:
        candidates: that the selector asks for in a round.
        measuring_seconds: to measure them, all ranks together; None where that was not tried.
        training_seconds: of the steps of a round, None likewise.
    """

    candidates: int
    measuring_seconds: float | None = None
    training_seconds: float | None = None

    @property
    def share(self) -> float | None:
        """Share of measuring in the time of both, 0..1."""
        if self.measuring_seconds is None or self.training_seconds is None:
            return None
        return self.measuring_seconds / max(1e-9, self.measuring_seconds + self.training_seconds)


def price_of_round(
    selector: Selector, estimator: InfluenceEstimator, model: LiveModel, round: Round, examples: int
) -> Price | None:
    """Return what a round costs; None where the selector cannot be asked in advance, or measures nothing.

    Copies of the parts are asked, fitted on the whole reference set and timed on a few candidates; a training step is
    timed without the optimizer's part. Model, random states and parts are left as they are.

    Args:
        selector: of the run.
        estimator: of the run; of one that is not rehearsed a small fit is timed, where it has one.
        model: the live model.
        round: a round that measures.
        examples: that a round trains on, all ranks together.
    """
    model, round = replace(model, meter=CostMeter()), replace(round, meter=CostMeter())
    with measuring(model.module, model.optimizer):
        candidates = asked_for(selector, round)
        if not candidates:
            return None
        small = SmallFit(estimator) if estimator.rehearsed else estimator.small_fit(round)
        if small is None:
            return Price(candidates)
        ranks = distributed.world_size()
        try:
            batch = next(round.batches(_spread(round.candidates, max(_CANDIDATES, round.source.batch_size))))
            few = {name: value[:_CANDIDATES] if isinstance(value, Tensor) else value for name, value in batch.items()}
            tried = batch if len(batch["input_ids"]) <= _QUICK_SHARE * examples / ranks else few
            per_fit, per_candidate = _measuring(small, model, round, few, tried)
        except NotMeasurableError:  # a later round may be able to
            return Price(candidates)
        except Exception:
            if estimator.rehearsed or ranks > 1:  # the other ranks would wait for this one
                raise
            return Price(candidates)  # the round itself reports what is wrong
        seconds = per_fit + per_candidate * -(-candidates // ranks)
        return Price(candidates, seconds, _training(model, tried) * examples / ranks)


def asked_for(selector: Selector, round: Round) -> int:
    """Return how many candidates a copy of the selector asks for, whatever the answers; 0 where it cannot be asked."""
    count = 0
    try:
        asked = copy.deepcopy(selector)
        for _ in range(_MOST_QUESTIONS):
            ids: object = asked.propose(round)
            if not isinstance(ids, Tensor) or not len(ids):
                break
            count += len(ids.unique())
            asked.observe(ids, torch.linspace(-1.0, 1.0, len(ids)))
    except Exception:  # the round itself reports what is wrong with a selector
        return 0
    return count


def _measuring(small: SmallFit, model: LiveModel, round: Round, few: Batch, batch: Batch) -> tuple[float, float]:
    """Return the seconds of a fit, and of one candidate of a batch, or of the few where that is not quick."""
    clock, estimator = CostMeter(), copy.deepcopy(small.estimator)
    with clock.phase("fit"):
        fit_metrics(estimator, model, round)
    apart = {phase: model.meter.seconds.get(phase, 0.0) for phase in small.phases}
    fit = (clock.seconds["fit"] - sum(apart.values())) * small.fit
    fit += sum(apart[phase] * times for phase, times in small.phases.items())
    estimator.score(model, few)  # what is done once only, such as allocating memory
    with clock.phase("few"):
        estimator.score(model, few)
    rows = [len(value["input_ids"]) for value in (few, batch)]
    seconds = clock.seconds["few"] / rows[0]
    # ranks that hold parts of the parameters must do the same, and their clocks differ
    if rows[1] > rows[0] and seconds * rows[1] < _QUICK_SECONDS and not model.view.in_parts:
        with clock.phase("batch"):
            estimator.score(model, batch)
        seconds = clock.seconds["batch"] / rows[1]
    return fit, seconds * small.score


def _training(model: LiveModel, batch: Batch) -> float:
    """Return the seconds that training on one example of a batch takes."""
    clock, sharded = CostMeter(), is_sharded(model.module)
    batch = model.to_device(batch)
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    for phase in ("first", "again"):
        with clock.phase(phase), torch.set_grad_enabled(not sharded), model.autocast():
            losses = model.losses(batch)
            if not sharded:  # else the hooks of the ranks would gather gradients that nobody asked for
                torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    model.view.reshard()
    # a backward takes twice as long as a forward
    return clock.seconds["again"] * (3 if sharded else 1) / len(batch["input_ids"])


def _spread(ids: Tensor, count: int) -> Tensor:
    """Return at most ``count`` of ``ids (n,)``, from all over the pool: sources differ in length."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]
