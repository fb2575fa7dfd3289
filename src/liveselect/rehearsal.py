"""A rehearsal of measuring before training starts: what cannot work is reported now, and not after the warm-up."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cost import CostMeter
from liveselect.grammar import (
    Batch,
    CandidateSource,
    InfluenceEstimator,
    LiveModel,
    NotMeasurableError,
    Round,
    Selector,
)
from liveselect.losses import target_counts
from liveselect.parts import checked_direction, checked_influence, checked_tokens, fit_metrics
from liveselect.plan import Plan
from liveselect.preserve import changed_since, listen, measuring

MEASURED_CANDIDATES = 2
"""Candidates that are measured; one alone would hide a loss that is summed or averaged over the batch."""

LOOKED_AT_CANDIDATES = 32
"""Candidates that parts are tried on, from all over the pool: sources differ."""


def rehearse(
    selector: Selector, estimator: InfluenceEstimator | None, model: LiveModel, round: Round, budget: int
) -> tuple[str | None, CostMeter]:
    """Let the selector check; measure a few candidates on one batch of the reference set, with copies of the parts.

    Everything that a round would do is done once, small, for real; the model, the random states and the parts are left
    as they are. That the model can be measured only later (a learning rate of zero) is no reason to stop.

    Args:
        selector: of the run.
        estimator: of the run; None measures nothing.
        model: the live model.
        round: a round that the selector will choose in.
        budget: candidates that a round trains on.

    Returns:
        Why nothing must be measured, a sentence on state of the model that measuring cannot put back, or None; and what
        the rehearsal cost. Its seconds are charged as a whole by the caller.

    Raises:
        Exception: what the first measuring round would raise; a note says where it came from.
    """
    meter = CostMeter()
    spread = _spread(round.candidates, max(LOOKED_AT_CANDIDATES, distributed.world_size()))
    model = replace(model, meter=meter)
    round = replace(round, source=_Excerpt(round.source), candidates=spread, meter=meter)
    if estimator is None:
        with measuring(model.module, model.optimizer):
            selector.check(round, budget)
        return None, meter
    row = _one_row(model, round)
    before = None if row is None else listen(model, row)
    # at once and again: state that turns in a circle may be back where it was after a whole measurement
    changed = None if row is None else changed_since(before, model, row)
    _try_out(selector, estimator, model, round, budget)
    changed = changed or (None if row is None else changed_since(before, model, row))
    return distributed.first_said(changed), meter


def _one_row(model: LiveModel, round: Round) -> Batch | None:
    """Return a candidate, None where data cannot be read, which others report."""
    try:
        with measuring(model.module, model.optimizer):
            batch = _batch_of_candidates(round)
            rows = len(batch["input_ids"])
    except Exception:
        return None
    return {
        key: value[:1] if isinstance(value, Tensor) and len(value) == rows else value for key, value in batch.items()
    }


def _try_out(selector: Selector, estimator: InfluenceEstimator, model: LiveModel, round: Round, budget: int) -> None:
    """Do once, small, what a round does."""
    with measuring(model.module, model.optimizer):
        try:
            _check_losses(model, _batch_of_candidates(round), "candidates", differentiated=True)
            reference = model.to_device(next(iter(round.source.reference())))
            _check_losses(model, reference, "reference examples")
            selector.check(round, budget)
            estimator.check(model, round)
            if estimator.rehearsed:
                _measure(copy.deepcopy(estimator), model, round, selector.learns_tokens)
        except NotMeasurableError:
            pass  # a later round may be able to
        except Exception as error:
            error.add_note(
                f"{type(selector).__name__} with {type(estimator).__name__} would fail like this in the first round "
                "that measures, so it is reported before training starts"
            )
            raise


def _spread(ids: Tensor, count: int) -> Tensor:
    """Return at most ``count`` of ``ids (n,)``, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, count).long()] if len(ids) > count else ids


def _batch_of_candidates(round: Round) -> dict[str, Tensor]:
    return next(round.batches(round.candidates[: max(MEASURED_CANDIDATES, distributed.world_size())]))


def _measure(estimator: InfluenceEstimator, model: LiveModel, round: Round, tokens: bool) -> None:
    batch = _batch_of_candidates(round)
    fit_metrics(estimator, model, round)
    rows, name = len(batch["input_ids"]), type(estimator).__name__
    found = estimator.score_tokens(model, batch) if tokens else None
    if found is None:
        checked_influence(estimator.score(model, batch), rows, f"{name}.score")
    else:
        checked_tokens(found, tuple(batch["input_ids"].shape), f"{name}.score_tokens")
    checked_direction(estimator)
    if estimator.at_once:
        ids = round.candidates[:rows]
        checked_influence(estimator.score_ids(model, round, ids), len(ids), f"{name}.score_ids")


def _check_losses(model: LiveModel, batch: Batch, what: str, differentiated: bool = False) -> None:
    with model.autocast(), torch.set_grad_enabled(differentiated):
        losses: object = model.losses(batch)
    rows = len(batch["input_ids"])
    if not isinstance(losses, Tensor) or losses.shape != (rows,) or not losses.is_floating_point():
        got = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"expected loss_fn(module, batch) to return ({rows},) losses for a batch of {rows} {what}, one mean over "
            f"the tokens of each example, got {got}: compute it with reduction='none', and average over tokens only"
        )


class _Excerpt(CandidateSource):
    """A source whose reference set is its first batch that carries loss."""

    def __init__(self, source: CandidateSource) -> None:
        self._source = source
        self.pool = source.pool
        self.batch_size = source.batch_size

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        return self._source.candidates(ids)

    def in_bulk(self, ids: Tensor) -> Iterable[Batch]:
        return self._source.in_bulk(ids)

    def reference(self) -> Iterator[Batch]:
        batches = list(self._source.reference())
        yield next((batch for batch in batches if bool(target_counts(batch).any())), batches[0])

    def decode(self, input_ids: Tensor) -> list[str]:
        return self._source.decode(input_ids)

    def follow(self, plan: Plan) -> None:
        raise RuntimeError("nothing is trained on in a rehearsal")
