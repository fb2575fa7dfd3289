"""The grammar of liveselect: who measures, who guesses, who chooses, and what they are told.

Shape letters, used everywhere: ``B`` batch rows, ``T`` tokens, ``V`` vocabulary, ``n`` candidates, ``m`` measured,
``k`` chosen, ``R`` ranks. Influence is *larger = lowers the reference loss more*, in nats per unit learning rate;
methods whose papers use another sign are converted in one place each.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from liveselect.cost import CostMeter, Progress, SilentProgress, tracked_phase
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.seeding import generator_for

Batch = Mapping[str, Tensor]
"""``id (B,)`` int64, ``input_ids (B, T)``, ``labels (B, T)`` with -100 where no loss is taken; others pass through."""

LossFn = Callable[[nn.Module, Batch], Tensor]
"""Maps a model and a batch to ``(B,)`` mean losses, nats per token, one for each example."""

IGNORE_INDEX = -100
"""The label of a token that carries no loss."""


class SelectionWarning(UserWarning):
    """Something about selection is not as it should be, and training goes on."""


class NotMeasurableError(ValueError):
    """Influence cannot be measured with the model as it is in this round; a later round may be able to.

    An estimator raises it on all ranks alike. A run goes on with influence that is NaN for all candidates.
    """


class RoundInterruptedError(RuntimeError):
    """The run was asked to stop while a round was measuring; what was measured of complete questions is kept."""


@runtime_checkable
class CandidateSource(Protocol):
    """The data as the engine sees it; a datamodule implements it."""

    pool: CandidatePool
    batch_size: int  # rows in the training batch of one rank

    def candidates(self, ids: Tensor) -> Iterable[Batch]:
        """Yield batches of the candidates ``ids (n,)``, in their order."""

    def reference(self) -> Iterable[Batch]:
        """Yield the batches of the reference set, the same ones in the same order at each call."""

    def decode(self, input_ids: Tensor) -> list[str]:
        """Return the text of the token rows ``input_ids (B, T)``."""

    def follow(self, plan: Plan) -> None:
        """Serve training batches from ``plan``, starting at its cursor."""


@dataclass(frozen=True)
class RoundContext:
    """Everything a part may look at during one round. Whoever changes the model puts it back.

    Attributes:
        round: index of the round.
        step: optimizer steps done.
        seed: seed of the selection; generators are derived from it by :meth:`generator`.
        model: the live model, unwrapped; the module that ``loss_fn`` takes.
        optimizer: the live optimizer, unwrapped.
        loss_fn: per-example loss.
        source: the data.
        candidates: ``(n,)`` ids that may be chosen in this round.
        global_batch: examples of one optimizer step, over accumulation and all ranks.
        clip_gradients: clips the ``.grad`` of the given parameters in place, as training does.
        forward_context: opens the precision context of training (autocast).
        meter: where the parts charge what they cost.
        progress: where the parts show what they do.
        interrupted: whether this process was asked to stop; a round on one rank looks after every measured batch.
        trained: ``(m,)`` ids of the plan that is being trained on or was last; None before the first.
    """

    round: int
    step: int
    seed: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    source: CandidateSource
    candidates: Tensor
    global_batch: int
    clip_gradients: Callable[[list[nn.Parameter]], None] = lambda parameters: None
    forward_context: Callable[[], AbstractContextManager[Any]] = nullcontext
    meter: CostMeter = field(default_factory=CostMeter)
    progress: Progress = field(default_factory=SilentProgress)
    interrupted: Callable[[], bool] = lambda: False
    trained: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    def generator(self, purpose: str) -> torch.Generator:
        """Return a fresh CPU generator for one purpose of this round, equal on all ranks."""
        return generator_for(self.seed, self.round, purpose)

    def to_device(self, batch: Batch) -> dict[str, Tensor]:
        """Return the batch with its tensors on the model's device."""
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def phase(self, name: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Open a phase of ``total`` units on the meter and the display; yields the function that advances it."""
        return tracked_phase(self.meter, self.progress, name, total, unit)

    def candidate_batches(self, ids: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the candidates ``ids (n,)`` in batches on the model's device; nothing on a rank without ids."""
        if not len(ids):
            return iter(())
        return (self.to_device(batch) for batch in self.source.candidates(ids))


class InfluenceEstimator(Protocol):
    """Measures influence with the live model.

    An estimator, a regressor or a selector may also have ``check(context)``, which raises before training begins what
    would otherwise come up in the first round that measures. An estimator that measures many candidates for less than
    batch by batch may have ``score_ids(context, ids)`` beside ``score``, from ``ids (m,)`` to influence ``(m,)``. One
    that keeps much of a fit, and fits anew in each round, may have ``release()``, called when a round is over.
    """

    def fit(self, context: RoundContext) -> Mapping[str, float]:
        """Prepare for a round (reference loss or gradient, curvature) and return what is worth recording.

        Raises:
            NotMeasurableError: with the model as it is now nothing can be measured.
        """

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)`` float32 on CPU, nats per unit learning rate."""


class InfluenceRegressor(Protocol):
    """Guesses influence where it was not measured."""

    def fit(self, context: RoundContext, ids: Tensor, influence: Tensor) -> Mapping[str, float]:
        """Learn from the measured ``ids (m,)`` and ``influence (m,)``.

        Returns what is worth recording, ``spearman`` among it: the rank correlation on measured candidates that were
        held out of the fit.
        """

    def predict(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the predicted influence of each example, ``(B,)`` float32 on CPU, in the units of the fit's targets
        or standardised; only order and relative size are used.
        """


@dataclass(frozen=True)
class Selection:
    """What a selector chose, and what it knew when it did.

    Attributes:
        ids: ``(k,)`` int64 distinct ids, in training order.
        scored: ``(n,)`` ids that were compared, or None when the choice used no scores.
        scores: ``(n,)`` float32, their scores before any noise; larger is better.
        metrics: scalars for the ledger.
        notes: sentences for the ledger, such as the reason of a fallback.
        group_metrics: ``(G,)`` numbers for the ledger, one for each group of the pool; NaN where there is none.
            ``reward`` and ``bonus`` among them say that groups were compared by their sum.
        noise: tells what was added to ``scores[start:stop]``, ``(stop - start,)`` float64, when it is called with these
            two; None when nothing was.
        eligible: ids that the scores let through, when they are more than the chosen ones.
        reasons: why ids were chosen, where it was something else than their scores.
    """

    ids: Tensor
    scored: Tensor | None = None
    scores: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    group_metrics: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Callable[[int, int], Tensor] | None = None
    eligible: Tensor | None = None
    reasons: Mapping[str, Tensor] = field(default_factory=dict)


class Selector(Protocol):
    """Decides what to measure and what to train on: ask, tell, choose.

    A selector may also have ``check_pool(pool)``, which raises before training begins what is wrong with the pool, and
    ``overhear(ids, influence)``: it is then told, between rounds, of the influence ``(m,)`` of
    candidates ``ids (m,)`` as the training steps on them have shown it. ``cost_before_training()`` tells the
    ``seconds`` and ``flops`` by phase that went into what it draws from, and ``uses_groups`` whether that includes the
    groups of the pool, whose cost the source tells by the same method.

    One that can never choose some candidates has ``eligible(pool, budget)``, which returns those that it may choose in
    a round of ``budget``, ``(size,)`` bool, or None for all: the least used *of these* are the round's candidates. When
    a round has more of them than those that were used least, these are left over from the pass before and are to be
    chosen first, see :func:`liveselect.selectors.leftovers.fill_up`.
    """

    def propose(self, context: RoundContext) -> Tensor:
        """Return the ids to measure next, ``(m,)``; an empty tensor means that enough is known."""

    def observe(self, ids: Tensor, influence: Tensor) -> None:
        """Take note of the influence ``(m,)`` of the proposed ``ids (m,)``; NaN where it could not be measured."""

    def select(self, context: RoundContext, budget: int) -> Selection:
        """Choose ``budget`` of the context's candidates."""
