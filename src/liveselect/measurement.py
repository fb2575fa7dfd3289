"""The measuring part of a round: ask, measure, tell; in one go, or piece by piece while training goes on."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.bits import bit_sum
from liveselect.cost import CostMeter
from liveselect.functional.sharding import is_sharded
from liveselect.protocols import (
    InfluenceEstimator,
    NotMeasurableError,
    RoundContext,
    RoundInterruptedError,
    Selector,
)
from liveselect.snapshot import measuring

TOGETHER = 64
"""Candidates that a rank measures before it waits for the others."""


class Measurement:
    """What a round has measured so far.

    Args:
        estimator: measures; None where the selector asks nothing.
        selector: asks, and is told.
        meter: where the cost is charged.

    It can be left after any piece, saved, and continued at a later optimizer step, on any number of ranks. An estimator
    that keeps state between rounds, or says that its ``fit_lasts``, is fitted once; another one describes the model at
    one step only and is fitted anew at every step at which something is measured.

    The selector's part is saved as its state before the first question and what it was told since: asked the same again
    it gives the same answers, so that no selector has to describe itself in the middle of a round.

    Attributes:
        ids: what was measured, ``(m,)`` int64 for each question.
        influence: ``(m,)`` for each question; NaN where it could not be measured.
        steps: ``(m,)`` int64 for each question, the optimizer step at which each was measured.
        metrics: what the estimator said of its last fit.
        obstacle: why something could not be measured, None when everything could.
        complete: whether the selector has asked enough.
        restored: whether model and optimizer were the same, to the bit, after every piece.
        meter: what measuring has cost so far.
    """

    def __init__(
        self, estimator: InfluenceEstimator | None, selector: Selector, meter: CostMeter | None = None
    ) -> None:
        self.ids: list[Tensor] = []
        self.influence: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.metrics: dict[str, float] = {}
        self.obstacle: str | None = None
        self.complete = False
        self.restored = True
        self.meter = meter or CostMeter()
        self._estimator = estimator
        self._selector = selector
        self._begun_with: Any = None
        self._open = False
        self._fitted_at: int | None = None
        self._fits = False
        self._sum: int | None = None
        self._replay: Mapping[str, Any] | None = None

    @property
    def selector_state(self) -> Any:
        """The selector's state when :meth:`remember` was called; None when it keeps none."""
        return self._begun_with

    def remember(self) -> None:
        """Keep the selector's state as it is now, before the first question, so that the measurement can be saved."""
        self._begun_with = copy.deepcopy(self._selector.state_dict()) if hasattr(self._selector, "state_dict") else None

    @property
    def measured(self) -> int:
        """How many candidates were measured, or tried to be."""
        return sum(int((steps >= 0).sum()) for steps in self.steps)

    def advance(self, context: RoundContext, limit: int | None = None) -> None:
        """Measure up to ``limit`` candidates over all ranks, at least one on each; all that is asked when None.

        The model is as it was afterwards. All ranks must call it alike.

        Raises:
            ValueError: the selector wants measurements, and there is no estimator.
            RuntimeError: the ranks decided differently.
            RoundInterruptedError: the context says that the run has to stop.
        """
        self._sum = None
        self._advance(context, limit)
        if self._sum is not None:
            with context.meter.phase("check restore"):
                self.restored &= bit_sum(context.model, context.optimizer) == self._sum

    def _advance(self, context: RoundContext, limit: int | None) -> None:
        self._answer_again(context)
        ranks = distributed.world_size()
        left = None if limit is None else max(1, math.ceil(limit / ranks))
        while not self.complete and left != 0:
            if not self._open and not self._ask(context):
                return
            if self._sum is None:  # where nothing is measured there is nothing to restore
                with context.meter.phase("check restore"):
                    self._sum = bit_sum(context.model, context.optimizer)
            self._fit(context)
            done = self._measure(context, left)
            if left is not None:
                left -= min(left, done)
            if bool((self.steps[-1] >= 0).all()):
                with context.meter.phase("ask"):
                    self._tell()

    def cut(self, context: RoundContext) -> int:
        """Tell the selector what is known of the open question, and ask no more; returns how many stay unmeasured."""
        self._answer_again(context)
        missing = int((self.steps[-1] < 0).sum()) if self._open else 0
        if self._open:
            self._tell()
        self.complete = True
        return missing

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and builtins; equal on all ranks but for the cost."""
        if self._replay is not None:
            return dict(self._replay)
        return {
            "ids": [ids.clone() for ids in self.ids],
            "influence": [influence.clone() for influence in self.influence],
            "steps": [steps.clone() for steps in self.steps],
            "metrics": dict(self.metrics),
            "obstacle": self.obstacle,
            "complete": self.complete,
            "open": self._open,
            "fitted_at": self._fitted_at,
            "fit": self._fit_state(),
            "costs": distributed.gather_objects([dict(self.meter.seconds), dict(self.meter.flops)]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; the selector, as it was before the first question, is told its answers again when used."""
        self.metrics, self.obstacle = dict(state["metrics"]), state["obstacle"]
        # what was fitted in another process is kept by the estimator, or was saved here, or has to be fitted again
        self._fitted_at = state["fitted_at"] if hasattr(self._estimator, "state_dict") else None
        estimator: Any = self._estimator
        if state["fit"] is not None and hasattr(estimator, "load_fitted_state"):
            estimator.load_fitted_state(state["fit"])
            self._fitted_at = state["fitted_at"]
        self._fits = self.obstacle is None
        self._replay = state
        seconds, _ = state["costs"][min(distributed.rank(), len(state["costs"]) - 1)]
        self.meter.seconds.update(seconds)
        if distributed.rank() == 0:  # the sum over the ranks is what counts, and there may be fewer of them now
            for _, spent in state["costs"]:
                for phase, amount in spent.items():
                    self.meter.flops[phase] += amount

    # ---- parts -------------------------------------------------------------------------------------------------

    def _ask(self, context: RoundContext) -> bool:
        """Put the selector's next question; returns whether there was one."""
        with context.meter.phase("ask"):
            ids = self._selector.propose(context)
            _check_question(ids, context.source.pool.size, self._selector)
        if not len(ids):
            self.complete = True
            return False
        if self._estimator is None:
            raise ValueError(
                f"{type(self._selector).__name__} proposes candidates to measure, but there is no estimator: pass one, "
                "such as liveselect.influence.OneStepInfluence()"
            )
        distributed.check_agreement(f"what to measure in round {context.round}", ids)
        self.ids.append(ids)
        self.influence.append(torch.full((len(ids),), math.nan))
        self.steps.append(torch.full((len(ids),), -1))
        self._open = True
        return True

    def _fit(self, context: RoundContext) -> None:
        """Prepare the estimator where it is due, or note what keeps it from measuring; the same on all ranks."""
        if self._estimator is None:
            return
        if self._fitted_at is not None and (self._fit_lasts() or self._fitted_at == context.step):
            return
        self._fits = True
        try:
            with context.phase("fit estimator", 1, "fit") as advance, measuring(context.model, context.optimizer):
                self.metrics = {name: float(value) for name, value in self._estimator.fit(context).items()}
                advance(1)
        except NotMeasurableError as obstacle:
            self.obstacle = str(obstacle)
            self._fits = False
        self._fitted_at = context.step
        distributed.check_agreement(
            f"whether influence can be measured in round {context.round}", torch.tensor([self._fits])
        )

    def _fit_lasts(self) -> bool:
        """Return whether what was fitted at one step may measure at later ones."""
        if hasattr(self._estimator, "state_dict"):
            return True
        return self._fits and getattr(self._estimator, "fit_lasts", False)

    def _fit_state(self) -> Any:
        """Return what a measurement that goes on needs of the estimator, beyond the state that it keeps itself."""
        estimator: Any = self._estimator
        if self.complete or self._fitted_at is None or not hasattr(estimator, "fitted_state"):
            return None
        return estimator.fitted_state()

    def _measure(self, context: RoundContext, per_rank: int | None) -> int:
        """Measure what is open, up to so many candidates on this rank; returns how many any rank did at most."""
        todo = (self.steps[-1] < 0).nonzero().flatten()
        ranks = distributed.world_size()
        shares = [todo[distributed.shard(len(todo), index, ranks)][:per_rank] for index in range(ranks)]
        # lengths that differ by at most one, the longer first: those of the shards of as many rows
        rows, longest = torch.cat(shares), len(shares[0])
        mine = self.ids[-1][shares[distributed.rank()]]
        meetings = len(shares[-1]) // TOGETHER
        self.influence[-1][rows] = distributed.gather_shards(
            self._influence_of(context, mine, longest, meetings), len(rows)
        )
        self.steps[-1][rows] = context.step
        return longest

    def _influence_of(self, context: RoundContext, ids: Tensor, longest: int, meetings: int) -> Tensor:
        """Return the influence of ``ids (m,)`` as this rank measures it, ``(m,)`` float32 on CPU.

        On the way it waits for the others so many times: without it a rank that is a tenth slower would make them wait
        at the end for a tenth of the round, longer than a process group allows.
        """
        if not self._fits or self._estimator is None:
            return torch.full((len(ids),), math.nan)  # selectors know what to do when they are told nothing
        scores, met = [torch.empty(0)], 0
        together = is_sharded(context.model)  # then ranks keep step batch by batch
        at_once = hasattr(self._estimator, "score_ids")
        parts = self._parts_at_once(context, ids, longest) if at_once else self._batches(context, ids, together)
        with context.phase("measure influence", len(ids), "candidates") as advance:
            while True:
                with measuring(context.model, context.optimizer):
                    # inside: a user's dataset may draw from the global random state
                    influence = next(parts, None)
                if influence is None:
                    break
                scores.append(influence)
                advance(len(influence))
                while not together and met < min(meetings, sum(map(len, scores)) // TOGETHER):
                    distributed.wait_for_all()
                    met += 1
                if distributed.world_size() == 1 and context.interrupted():  # ranks would stop at different batches
                    raise RoundInterruptedError(f"stopped while round {context.round} was measuring")
        return torch.cat(scores)

    def _batches(self, context: RoundContext, ids: Tensor, together: bool) -> Iterator[Tensor]:
        """Yield the influence of ``ids (m,)`` batch by batch; of sharded parameters on all ranks as often."""
        estimator: Any = self._estimator
        batches = context.candidate_batches(ids)

        def spare() -> dict[str, Any]:
            return next(context.candidate_batches(self.ids[-1][:1]))

        for batch, counts in distributed.in_step(batches, spare, together):
            influence = estimator.score(context, batch).float().cpu()
            yield influence[: len(influence) * counts]

    def _parts_at_once(self, context: RoundContext, ids: Tensor, longest: int) -> Iterator[Tensor]:
        """Yield the influence of ``ids (m,)`` in a few parts, of which all ranks have as many."""
        estimator: Any = self._estimator
        for part in ids.tensor_split(math.ceil(longest / TOGETHER)):
            yield estimator.score_ids(context, part).float().cpu()

    def _tell(self) -> None:
        self._selector.observe(self.ids[-1], self.influence[-1])
        self._open = False

    def _answer_again(self, context: RoundContext) -> None:
        """Bring the selector to where it was when the state was saved."""
        state, self._replay = self._replay, None
        if state is None:
            return
        for index, ids in enumerate(state["ids"]):
            asked = self._selector.propose(context)
            if not torch.equal(asked, ids):
                raise RuntimeError(
                    f"{type(self._selector).__name__} does not ask what it asked before the checkpoint "
                    f"({len(asked)} candidates, then {len(ids)}): expected propose() to depend on the round's context "
                    "and on what it was told only. Draw from context.generator()"
                )
            self.ids.append(ids.clone())
            self.influence.append(state["influence"][index].clone())
            self.steps.append(state["steps"][index].clone())
            self._open = True
            if index + 1 < len(state["ids"]) or not state["open"]:
                self._tell()
        self.complete = state["complete"]


def _check_question(ids: Tensor, size: int, selector: Selector) -> None:
    """Raise ValueError unless ``ids (m,)`` are rows of the pool of ``size`` candidates."""
    name = type(selector).__name__
    if ids.dim() != 1 or (len(ids) and ids.dtype != torch.int64):
        raise ValueError(f"expected {name} to propose (m,) int64 ids, got {tuple(ids.shape)} {ids.dtype}")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise ValueError(
            f"{name} proposes ids from {int(ids.min())} to {int(ids.max())}; the pool's candidates are 0 to {size - 1}"
        )
