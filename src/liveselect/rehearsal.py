"""A rehearsal of measuring before training starts: what cannot work is reported now, and not after the warm-up."""

import copy
import warnings
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
    SelectionWarning,
    Selector,
)
from liveselect.losses import causal_lm_loss, target_counts
from liveselect.parts import checked_direction, checked_influence, checked_tokens, fit_metrics
from liveselect.plan import Plan
from liveselect.preserve import changed_since, measuring, response_to

MEASURED_CANDIDATES = 2
"""Candidates that are measured; one alone would hide a loss that is summed or averaged over the batch."""

REHEARSED_REFERENCES = 2
"""Rows of the reference set that are measured with; as for candidates, one alone would hide something."""

_ROUNDING = 1e-5
"""Share of a loss by which kernels may let it depend on the values in other rows; they work row by row."""

LOOKED_AT_CANDIDATES = 32
"""Candidates that parts are tried on, from all over the pool: sources differ."""


def rehearse(
    selector: Selector, estimator: InfluenceEstimator | None, model: LiveModel, round: Round, budget: int
) -> tuple[str | None, CostMeter]:
    """Let the selector check; measure a few candidates on a few rows of the reference set, with copies of the parts.

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
    before = None if row is None else response_to(model, row)
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
            candidates = _batch_of_candidates(round)
            _check_losses(model, candidates, "candidates", differentiated=True)
            _warn_of_neighbours(model, candidates)
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
    trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    with model.autocast(), torch.set_grad_enabled(differentiated):
        losses: object = model.losses(batch)
    model.view.refuse_switched(trained)
    rows = len(batch["input_ids"])
    if not isinstance(losses, Tensor) or losses.shape != (rows,) or not losses.is_floating_point():
        got = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"expected loss_fn(module, batch) to return ({rows},) losses for a batch of {rows} {what}, one mean over "
            f"the tokens of each example, got {got}: compute it with reduction='none', and average over tokens only"
        )
    if differentiated and torch.finfo(losses.dtype).bits < 32 and distributed.rank() == 0:
        step = torch.finfo(losses.dtype).eps * float(losses.detach().float().mean())
        warnings.warn(
            f"loss_fn returns losses in {losses.dtype}, which differ by {step:.2g} nats or not at all: what an example "
            "changes in them is mostly less, and is lost. Compute the loss from logits.float()",
            SelectionWarning,
            stacklevel=2,
        )


def _warn_of_neighbours(model: LiveModel, batch: Batch) -> None:
    """Warn when the loss of an example depends on the others of its batch, whose gradients it then measures too."""
    rows = len(batch["input_ids"])
    if rows < 2 or model.loss_fn is causal_lm_loss or model.view.in_parts:
        return
    first = torch.zeros(rows, dtype=torch.int64, device=batch["input_ids"].device)
    alike = {
        key: value[first.to(value.device)] if isinstance(value, Tensor) and len(value) == rows else value
        for key, value in batch.items()
    }
    with model.autocast(), torch.no_grad():
        once, again, among_alike = (float(model.losses(each)[0]) for each in (batch, batch, alike))
    if once == again and abs(once - among_alike) > _ROUNDING * abs(once) and distributed.rank() == 0:
        warnings.warn(
            f"loss_fn gives an example the loss {once:.6g}, and {among_alike:.6g} beside other examples: the influence "
            "of an example is then partly that of its neighbours. Return one loss for each row, of its own tokens only "
            "(no mean over the batch, no other order); only a model whose examples compete, such as a mixture of "
            "experts with a capacity, may do otherwise",
            SelectionWarning,
            stacklevel=2,
        )


class _Excerpt(CandidateSource):
    """A source whose reference set is a few rows of its first batch that carries loss, those with most targets."""

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
        batch = next((batch for batch in batches if bool(target_counts(batch).any())), batches[0])
        rows = len(batch["input_ids"])
        few = target_counts(batch).argsort(descending=True, stable=True)[:REHEARSED_REFERENCES].sort().values
        yield {
            key: value[few.to(value.device)] if isinstance(value, Tensor) and len(value) == rows else value
            for key, value in batch.items()
        }

    def decode(self, input_ids: Tensor) -> list[str]:
        return self._source.decode(input_ids)

    def follow(self, plan: Plan) -> None:
        raise RuntimeError("nothing is trained on in a rehearsal")
