"""A rehearsal of measuring before training starts: what cannot work is told now, and not after the warm-up rounds."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cost import CostMeter, SilentProgress
from liveselect.losses import target_counts
from liveselect.plan import Plan
from liveselect.protocols import Batch, CandidateSource, NotMeasurableError, RoundContext
from liveselect.rounds import SelectionRun
from liveselect.snapshot import measuring

FEW = 2
"""Candidates that are measured; one alone would hide a loss that is summed or averaged over the batch."""

SOME = 32
"""Candidates that parts are tried on, from all over the pool: sources differ."""


def rehearse(run: SelectionRun, context: RoundContext) -> None:
    """Measure a few candidates on one batch of the reference set, with copies of the parts that learn.

    Everything that a round would do is done once, small, for real; the model, the random states and the parts of the
    run are left as they are. A part with ``check(context)`` is asked that instead. That the model can be measured only
    later (a learning rate of zero) is no reason to stop. Nothing is done for a run that measures nothing.

    Raises:
        Exception: whatever the first measuring round would raise; a note says where it came from.
    """
    if run.estimator is None:
        return
    spread = _spread(context.candidates, max(SOME, distributed.world_size()))
    small = replace(
        context,
        source=_Excerpt(context.source),
        candidates=spread,
        meter=CostMeter(),
        progress=SilentProgress(),
    )
    try:
        with measuring(context.model, context.optimizer):
            batches = list(small.candidate_batches(spread[: max(FEW, distributed.world_size())]))
            _check_losses(small, batches[0], "candidates", differentiated=True)
            _check_losses(small, small.to_device(next(iter(small.source.reference()))), "reference examples")
            for part in (run.estimator, run.selector):
                if hasattr(part, "check"):
                    part.check(small)
            if not hasattr(run.estimator, "check"):
                _measure(copy.deepcopy(run.estimator), small, batches[0])
    except NotMeasurableError:
        pass
    except Exception as error:
        error.add_note(
            f"{type(run.selector).__name__} with {type(run.estimator).__name__} would fail like this in the first "
            "round that measures, so it is told before training starts"
        )
        raise


def _spread(ids: Tensor, count: int) -> Tensor:
    """Return at most ``count`` of ``ids (n,)``, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, count).long()] if len(ids) > count else ids


def _measure(estimator: Any, context: RoundContext, batch: Batch) -> None:
    estimator.fit(context)
    influence = estimator.score(context, batch)
    if influence.shape != (len(batch["input_ids"]),):
        raise ValueError(
            f"expected {type(estimator).__name__}.score to return one influence for each of "
            f"{len(batch['input_ids'])} candidates, got {tuple(influence.shape)}"
        )


def _check_losses(context: RoundContext, batch: Batch, what: str, differentiated: bool = False) -> None:
    with context.forward_context(), torch.set_grad_enabled(differentiated):
        losses: Any = context.loss_fn(context.model, batch)
    rows = len(batch["input_ids"])
    if not isinstance(losses, Tensor) or losses.shape != (rows,) or not losses.is_floating_point():
        got = f"{tuple(losses.shape)} {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"expected loss_fn(module, batch) to return ({rows},) losses for a batch of {rows} {what}, one mean over "
            f"the tokens of each example, got {got}: compute it with reduction='none', and average over tokens only"
        )


class _Excerpt:
    """A source whose reference set is its first batch that carries loss."""

    def __init__(self, source: CandidateSource) -> None:
        self._source = source
        self.pool = source.pool
        self.batch_size = source.batch_size

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        return self._source.candidates(ids)

    def reference(self) -> Iterator[Batch]:
        batches = list(self._source.reference())
        yield next((batch for batch in batches if bool(target_counts(batch).any())), batches[0])

    def decode(self, input_ids: Tensor) -> list[str]:
        return self._source.decode(input_ids)

    def follow(self, plan: Plan) -> None:
        raise RuntimeError("nothing is trained on in a rehearsal")
