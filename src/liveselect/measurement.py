"""The measuring part of a round: ask, measure, report; in one go, or piece by piece while training goes on."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cost import CostMeter
from liveselect.grammar import (
    Batch,
    InfluenceEstimator,
    LiveModel,
    NotMeasurableError,
    Round,
    RoundInterruptedError,
    Selector,
    State,
)
from liveselect.parts import checked_influence, checked_tokens, fit_metrics
from liveselect.preserve import bit_sum, changed_since, measuring, response_to
from liveselect.preserve.state_check import Response

_Found = tuple[Tensor, Tensor | None]
"""The influence of some candidates, and of their tokens."""

CANDIDATES_PER_BARRIER = 64
"""Candidates that a rank measures before it waits for the others."""


@dataclass
class Question:
    """Candidates that a selector proposed together, and what was measured of them.

    Attributes:
        ids: ``(m,)`` int64.
        influence: ``(m,)`` float32, NaN where it is not known.
        steps: ``(m,)`` int64, the optimizer step at which each was measured; -1 where it was not yet.
        tokens: ``(m, T)`` float32, the influence of single tokens, NaN where it is not known; None where none is.
    """

    ids: Tensor
    influence: Tensor
    steps: Tensor
    tokens: Tensor | None = None

    @classmethod
    def about(cls, ids: Tensor) -> "Question":
        """Return a question of which nothing is measured yet."""
        return cls(ids, torch.full((len(ids),), math.nan), torch.full((len(ids),), -1))

    def keep_tokens(self, rows: Tensor, tokens: Tensor) -> None:
        """Take the influence of single tokens, ``(r, T)``, of the ``rows (r,)``."""
        known = torch.full((len(self.ids), 0), math.nan) if self.tokens is None else self.tokens
        self.tokens = _widened(known, max(known.shape[1], tokens.shape[1]))
        self.tokens[rows] = _widened(tokens, self.tokens.shape[1])

    @property
    def todo(self) -> Tensor:
        """Places of what is not measured yet, ``(t,)``."""
        return (self.steps < 0).nonzero().flatten()


@dataclass(frozen=True)
class Fit:
    """The last fit of the estimator.

    Attributes:
        step: the optimizer step that it describes.
        obstacle: why nothing can be measured with it; None when it can.
    """

    step: int
    obstacle: str | None = None


class Measurement:
    """What a round has measured so far.

    It can be left after any piece, saved, and continued at a later optimizer step, on any number of ranks.

    A checkpoint holds the selector's state from before the first question, and the answers since: asked the same again
    it gives the same answers, so that no selector has to describe itself in the middle of a round.

    Args:
        estimator: measures; None where the selector proposes nothing.
        selector: proposes, and observes.
        meter: where the cost is charged.
        interrupted: whether this process was asked to stop; looked at after every batch on a single rank.
        disabled: says why nothing is measured any more; None where it is.
        checks_state: whether the first piece compares what the model answers to a fixed row before and after it.

    Attributes:
        questions: what was proposed, in order.
        metrics: what the estimator reported of its last fit.
        obstacle: why something could not be measured, None when everything could.
        complete: whether the selector has asked enough.
        restored: whether model and optimizer were the same, to the bit, after every piece.
        changed: a sentence on state that measuring has changed and nothing puts back, None where none was noticed.
        meter: what measuring has cost so far.
        fit_seconds: of it, what fits of the estimator took in this process.
        selector_state: the selector's state before the first question.
    """

    def __init__(
        self,
        estimator: InfluenceEstimator | None,
        selector: Selector,
        meter: CostMeter | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        disabled: Callable[[], str | None] = lambda: None,
        checks_state: bool = False,
    ) -> None:
        self.questions: list[Question] = []
        self.metrics: Mapping[str, float] = {}
        self.obstacle: str | None = None
        self.complete = False
        self.restored = True
        self.changed: str | None = None
        self.meter = meter or CostMeter()
        self.fit_seconds = 0.0
        self.selector_state = copy.deepcopy(selector.state_dict())
        self._estimator = estimator
        self._selector = selector
        self._interrupted = interrupted
        self._disabled = disabled
        self._checks_state = checks_state
        self._fit: Fit | None = None
        self._observed = 0  # questions whose answers the selector has
        self._saved: State | None = None  # a checkpoint's answers, until there is a round to ask in

    @property
    def ids(self) -> Tensor:
        """All that was proposed, ``(m,)``."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(question.ids for question in self.questions)])

    @property
    def influence(self) -> Tensor:
        """What was found of it, ``(m,)``; NaN where nothing was."""
        return torch.cat([torch.empty(0), *(question.influence for question in self.questions)])

    @property
    def steps(self) -> Tensor:
        """The optimizer step at which each was measured, ``(m,)``; -1 where it was not."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(question.steps for question in self.questions)])

    @property
    def measured(self) -> int:
        """How many candidates were measured, or tried to be."""
        return int((self.steps >= 0).sum())

    def advance(
        self, model: LiveModel, round: Round, limit: int | None = None, fit_examples: int | None = None
    ) -> None:
        """Measure up to ``limit`` candidates over all ranks, at least one on each; all that is proposed when None.

        The model is as it was afterwards. All ranks must call it alike. With ``fit_examples`` a fit that is due is made
        in parts of about that number of examples, one at each call, and candidates are measured when it is complete.

        Raises:
            ValueError: the selector proposes candidates, and there is no estimator, or they are none of the pool's.
            RuntimeError: the ranks decided differently.
            RoundInterruptedError: the run has to stop.
        """
        model, round = replace(model, meter=self.meter), replace(round, meter=self.meter)
        self._catch_up(round)
        bits: int | None = None
        before: tuple[Response | None, Batch] | None = None
        left = None if limit is None else max(1, math.ceil(limit / distributed.world_size()))
        while left != 0 and (question := self._open_question(round)) is not None:
            if bits is None:  # where nothing is measured there is nothing to restore
                bits = self._bits(model)
                before = self._response(model, round, question)
            if fit_examples is not None and self._fit_ahead(model, round, fit_examples):
                break
            done = self._measure(model, round, question, self._fitted(model, round), left)
            if left is not None:
                left -= min(left, done)
            if not len(question.todo):
                self._report(question)
        if bits is not None:
            self.restored &= self._bits(model) == bits
        if before is not None:
            with self.meter.phase("check restore"):
                self.changed = distributed.first_said(changed_since(before[0], model, before[1]))

    def cut(self, round: Round) -> int:
        """Give the selector what is known of the open question, and ask no more; returns how many stay unmeasured."""
        self._catch_up(round)
        missing = 0
        if self._observed < len(self.questions):
            missing = len(self.questions[-1].todo)
            self._report(self.questions[-1])
        self.complete = True
        return missing

    def state_dict(self) -> State:
        """Return all of it as tensors and builtins; equal on all ranks but for the cost."""
        if self._saved is not None:
            return dict(self._saved)
        fit = self._fit
        keeps_fit = not self.complete and fit is not None and self._estimator is not None
        return {
            "questions": [asdict(question) for question in self.questions],
            "observed": self._observed,
            "complete": self.complete,
            "metrics": dict(self.metrics),
            "obstacle": self.obstacle,
            "fit": None if fit is None else asdict(fit),
            "fitted": self._estimator.fitted_state() if keeps_fit and self._estimator is not None else None,
            "costs": distributed.gather_objects([dict(self.meter.seconds), dict(self.meter.flops)]),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore it; the selector, as it was before the first question, observes its answers at the next use."""
        self._saved, self.metrics, self.obstacle = state, state["metrics"], state["obstacle"]
        if state["fitted"] is not None and self._estimator is not None:
            self._estimator.load_fitted_state(state["fitted"])
            self._fit = Fit(**state["fit"])
        seconds, _ = state["costs"][min(distributed.rank(), len(state["costs"]) - 1)]
        self.meter.seconds.update(seconds)
        if distributed.rank() == 0:  # the sum over the ranks is what counts, and there may be fewer of them now
            for _, flops in state["costs"]:
                for phase, amount in flops.items():
                    self.meter.flops[phase] += amount

    # ---- parts -------------------------------------------------------------------------------------------------

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.fit_seconds += time.perf_counter() - began

    def _bits(self, model: LiveModel) -> int:
        with self.meter.phase("check restore"):
            return bit_sum(model.module, model.optimizer)

    def _response(self, model: LiveModel, round: Round, question: Question) -> tuple[Response | None, Batch] | None:
        """Return what the model answers to a row, and the row; None when that was done before."""
        if not self._checks_state or self._disabled() is not None:
            return None
        self._checks_state = False
        with self.meter.phase("check restore"):
            with measuring(model.module, model.optimizer):
                row = next(round.batches(question.ids[:1]))
            return response_to(model, row), row

    def _open_question(self, round: Round) -> Question | None:
        """Return the question that is not fully measured, a new one if need be; None when the selector has enough."""
        if self._observed < len(self.questions):
            return self.questions[-1]
        if self.complete:
            return None
        with self.meter.phase("ask"):
            ids = _proposed(self._selector, round)
        if not len(ids):
            self.complete = True
            return None
        if self._estimator is None:
            raise ValueError(
                f"{type(self._selector).__name__} proposes candidates to measure, but there is no estimator: pass one, "
                "such as liveselect.influence.OneStepInfluence()"
            )
        distributed.check_agreement(f"what to measure in round {round.index}", ids)
        self.questions.append(Question.about(ids))
        return self.questions[-1]

    def _report(self, question: Question) -> None:
        """Give the selector the finite answers: NaN sorts above all numbers and spoils sums."""
        finite = question.influence.isfinite()
        with self.meter.phase("ask"):
            if question.tokens is not None:
                self._selector.observe_tokens(question.ids[finite], question.tokens[finite])
            self._selector.observe(question.ids[finite], question.influence[finite])
        self._observed = len(self.questions)

    def _fit_ahead(self, model: LiveModel, round: Round, examples: int) -> bool:
        """Let the estimator do a part of its first fit; returns whether it had one to do."""
        if self._fit is not None or self._estimator is None or self._disabled() is not None:
            return False
        try:
            with self._fitting(), self.meter.phase("fit estimator"), measuring(model.module, model.optimizer):
                return self._estimator.fit_ahead(model, round, examples)
        except NotMeasurableError:  # the fit says why
            return False

    def _fitted(self, model: LiveModel, round: Round) -> Fit:
        """Return the estimator's fit, fitted again where it is due; the same on all ranks."""
        fit, estimator = self._fit, self._estimator
        if estimator is None:
            raise RuntimeError("nothing can be measured without an estimator")
        if (disabled := self._disabled()) is not None:
            self.obstacle = disabled
            return Fit(round.step, disabled)
        if fit is not None and (fit.step == round.step or (estimator.fit_lasts and fit.obstacle is None)):
            return fit
        try:
            with (
                self._fitting(),
                self.meter.tracked("fit estimator", 1, "fit") as advance,
                measuring(model.module, model.optimizer),
            ):
                self.metrics = fit_metrics(estimator, model, round)
                advance(1)
            fit = Fit(round.step)
        except NotMeasurableError as error:
            self.obstacle = str(error)
            fit = Fit(round.step, self.obstacle)
        self._fit = fit
        distributed.check_agreement(
            f"whether influence can be measured in round {round.index}", torch.tensor([fit.obstacle is None])
        )
        return fit

    def _measure(self, model: LiveModel, round: Round, question: Question, fit: Fit, per_rank: int | None) -> int:
        """Measure up to ``per_rank`` of the open candidates on this rank; returns the most that any rank did."""
        todo, ranks = question.todo, distributed.world_size()
        shares = [todo[distributed.shard(len(todo), index, ranks)][:per_rank] for index in range(ranks)]
        # lengths that differ by at most one, the longer first: those of the shards of as many rows
        rows, longest = torch.cat(shares), len(shares[0])
        mine = question.ids[shares[distributed.rank()]]
        if fit.obstacle is None:
            barriers = len(shares[-1]) // CANDIDATES_PER_BARRIER
            found, tokens = self._influence_of(model, round, mine, longest, barriers)
        else:
            found, tokens = torch.full((len(mine),), math.nan), None
        if self._selector.learns_tokens:
            widths = distributed.gather_objects(0 if tokens is None else tokens.shape[1])
            if width := max(widths):
                own = torch.full((len(mine), 0), math.nan) if tokens is None else tokens
                question.keep_tokens(rows, distributed.gather_shards(_widened(own, width), len(rows)))
        question.influence[rows] = distributed.gather_shards(found, len(rows))
        question.steps[rows] = round.step
        return longest

    def _influence_of(
        self, model: LiveModel, round: Round, ids: Tensor, longest: int, barriers: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the influence of ``ids (m,)`` as this rank measures it, ``(m,)`` float32 on CPU, and of their tokens.

        On the way it waits ``barriers`` times for the others: without it a rank that is a tenth slower would make them
        wait at the end for a tenth of the round, longer than a process group allows.
        """
        estimator = self._estimator
        if estimator is None:
            raise RuntimeError("nothing can be measured without an estimator")
        parts = (
            self._at_once(estimator, model, round, ids, longest)
            if estimator.at_once
            else self._by_batch(estimator, model, round, ids)
        )
        scores, tokens, passed = [torch.empty(0)], list[Tensor | None](), 0
        with self.meter.tracked("measure influence", len(ids), "candidates") as advance:
            while True:
                with measuring(model.module, model.optimizer):
                    # inside: a user's dataset may draw from the global random state
                    found = next(parts, None)
                if found is None:
                    return torch.cat(scores), _stacked(scores[1:], tokens)
                influence, of_tokens = found
                scores.append(influence)
                tokens.append(of_tokens)
                advance(len(influence))
                # parameters that ranks hold in parts keep them in step batch by batch anyway
                while not model.view.in_parts and passed < min(
                    barriers, sum(map(len, scores)) // CANDIDATES_PER_BARRIER
                ):
                    distributed.wait_for_all()
                    passed += 1
                if distributed.world_size() == 1 and self._interrupted():  # ranks would stop at different batches
                    raise RoundInterruptedError(f"stopped while round {round.index} was measuring")

    def _by_batch(self, estimator: InfluenceEstimator, model: LiveModel, round: Round, ids: Tensor) -> Iterator[_Found]:
        """Yield the influence of ``ids (m,)`` batch by batch; on all ranks as often where they hold parts."""
        spare_id, name = self.questions[-1].ids[:1], type(estimator).__name__
        for batch, counts in model.view.in_step(round.batches(ids), lambda: next(round.batches(spare_id))):
            rows = len(batch["input_ids"])
            tokens = estimator.score_tokens(model, batch) if self._selector.learns_tokens else None
            if tokens is None:
                influence = checked_influence(estimator.score(model, batch), rows, f"{name}.score")
            else:
                tokens = checked_tokens(tokens, tuple(batch["input_ids"].shape), f"{name}.score_tokens")[
                    : rows * counts
                ]
                influence = tokens.nanmean(dim=1)
            yield influence[: rows * counts], tokens

    @staticmethod
    def _at_once(
        estimator: InfluenceEstimator, model: LiveModel, round: Round, ids: Tensor, longest: int
    ) -> Iterator[_Found]:
        """Yield the influence of ``ids (m,)`` in a few parts, of which all ranks have as many."""
        for part in ids.tensor_split(math.ceil(longest / CANDIDATES_PER_BARRIER)):
            name = f"{type(estimator).__name__}.score_ids"
            yield checked_influence(estimator.score_ids(model, round, part), len(part), name), None

    def _catch_up(self, round: Round) -> None:
        """Bring the selector to where it was when the state was saved."""
        state, self._saved = self._saved, None
        if state is None:
            return
        for index, question in enumerate(state["questions"]):
            proposed = _proposed(self._selector, round)
            if not torch.equal(proposed, question["ids"]):
                raise RuntimeError(
                    f"{type(self._selector).__name__} does not propose what it proposed before the checkpoint "
                    f"({len(proposed)} candidates, then {len(question['ids'])}): expected propose() to depend on the "
                    "round and on what was observed only. Draw from round.generator()"
                )
            ids, influence, steps, tokens = (question[name] for name in ("ids", "influence", "steps", "tokens"))
            tokens = None if tokens is None else tokens.clone()
            self.questions.append(Question(ids.clone(), influence.clone(), steps.clone(), tokens))
            if index < state["observed"]:
                self._report(self.questions[-1])
        self.complete = state["complete"]


def _widened(tokens: Tensor, width: int) -> Tensor:
    """Return ``tokens (m, T)`` filled up with NaN to ``(m, width)``."""
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=math.nan)


def _stacked(scores: list[Tensor], tokens: list[Tensor | None]) -> Tensor | None:
    """Return the influence of tokens of all batches, ``(m, T)``, NaN for batches without; None where all are."""
    width = max((part.shape[1] for part in tokens if part is not None), default=0)
    if not width:
        return None
    parts = [
        torch.full((len(of_rows), 0), math.nan) if part is None else part
        for of_rows, part in zip(scores, tokens, strict=True)
    ]
    return torch.cat([_widened(part, width) for part in parts])


def _proposed(selector: Selector, round: Round) -> Tensor:
    """Return what a selector proposes, ``(m,)``; raise ValueError unless these are rows of the pool."""
    ids, size, name = selector.propose(round), round.pool.size, type(selector).__name__
    if not isinstance(ids, Tensor) or ids.dim() != 1 or (len(ids) and ids.dtype != torch.int64):
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"expected {name} to propose (m,) int64 ids, got {got}")
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise ValueError(
            f"{name} proposes ids from {int(ids.min())} to {int(ids.max())}; the pool's candidates are 0 to {size - 1}"
        )
    ids = ids.cpu()
    unique, place = ids.unique(return_inverse=True)
    if len(unique) == len(ids):
        return ids
    first = torch.full((len(unique),), len(ids)).scatter_reduce(0, place, torch.arange(len(ids)), "amin")
    return ids[first.sort().values]  # each once, in the order of their first mention
