"""One round of selection: measure what the selector proposes, let it choose, record it."""

import math
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.decisions import DecisionLedger, RoundDecisions
from liveselect.ledger import Example, Histogram, Ledger, RoundRecord
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.protocols import (
    InfluenceEstimator,
    NotMeasurableError,
    RoundContext,
    Selection,
    SelectionWarning,
    Selector,
)
from liveselect.snapshot import measuring

EXAMPLES_SHOWN = 6
CHARACTERS_SHOWN = 600
GROUPS_RECORDED = 64
"""A pool with more groups records only those that a round touched: thousands of clusters would swell the ledger."""


@dataclass
class SelectionRun:
    """The parts of a run and their state between rounds.

    Attributes:
        selector: chooses, once the warm-up is over.
        estimator: measures what the selector proposes; None for selectors that propose nothing.
        warmup: chooses in the first ``warmup_rounds`` rounds.
        pool: the candidates and how often each was used.
        plan: what is being trained on; None before the first round.
        ledger: all rounds so far.
        decisions: where each candidate's fate is written, None for nowhere.
    """

    selector: Selector
    estimator: InfluenceEstimator | None
    warmup: Selector
    warmup_rounds: int
    pool: CandidatePool
    plan: Plan | None = None
    ledger: Ledger = field(default_factory=Ledger)
    decisions: DecisionLedger | None = None

    @property
    def next_round(self) -> int:
        """Index of the round to come."""
        return 0 if self.plan is None else self.plan.round + 1

    def selector_for(self, round_index: int) -> Selector:
        """Return who chooses in a round."""
        return self.warmup if round_index < self.warmup_rounds else self.selector

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and builtins."""
        return {
            "pool": self.pool.state_dict(),
            "plan": None if self.plan is None else self.plan.state_dict(),
            "ledger": self.ledger.state_dict(),
            "selector": _state_of(self.selector),
            "estimator": _state_of(self.estimator),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; raise ValueError when it belongs to another pool or other parts."""
        self.pool.load_state_dict(state["pool"])
        self.plan = None if state["plan"] is None else Plan.from_state_dict(state["plan"])
        self.ledger.load_state_dict(state["ledger"])
        _load_into(self.selector, state["selector"], "selector")
        _load_into(self.estimator, state["estimator"], "estimator")


def run_round(run: SelectionRun, context: RoundContext, budget: int) -> Plan:
    """Run one whole round and return its plan of ``budget`` candidates, which is also ``run.plan`` from now on."""
    slices = round_slices(run, context, budget)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            plan: Plan = end.value
            return plan


def round_slices(run: SelectionRun, context: RoundContext, budget: int) -> Generator[None, None, Plan]:
    """Run one round in slices: control is handed back after every measured batch, with the model as it was.

    The run changes only when the round is complete.

    Raises:
        ValueError: the selector returned something else than ``budget`` distinct candidates.
        RuntimeError: the ranks decided differently.
    """
    selector = run.selector_for(context.round)
    found = yield from _measure(run.estimator, selector, context)
    with measuring(context.model, context.optimizer), context.meter.phase("choose"):
        selection = selector.select(context, budget)
    _validate(selection.ids, context.candidates, budget, selector)
    distributed.check_agreement(f"the plan of round {context.round}", selection.ids)
    plan = Plan(context.round, selection.ids)
    with measuring(context.model, context.optimizer):
        record = _record(run.pool, context, selector, selection, plan, found)
    _write_decisions(run, context, record, selection, plan)
    run.pool.record_use(plan.ids)
    run.plan = plan
    run.ledger.rounds.append(record)
    return plan


@dataclass
class _Found:
    """What was measured in a round: ids and influence by question, the estimator's metrics, and what kept it away."""

    ids: list[Tensor] = field(default_factory=list)
    influence: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    obstacle: str | None = None


def _measure(
    estimator: InfluenceEstimator | None, selector: Selector, context: RoundContext
) -> Generator[None, None, _Found]:
    """Measure until the selector has asked enough."""
    found = _Found()
    while len(ids := selector.propose(context)):
        if estimator is None:
            raise ValueError(
                f"{type(selector).__name__} proposes candidates to measure, but there is no estimator: pass one, "
                "such as liveselect.influence.OneStepInfluence()"
            )
        distributed.check_agreement(f"what to measure in round {context.round}", ids)
        if not found.ids:
            _fit(estimator, context, found)
            yield
        if found.obstacle is None:
            influence = yield from _measure_shard(estimator, context, ids)
        else:
            influence = torch.full((len(ids),), math.nan)  # selectors know what to do when they are told nothing
        selector.observe(ids, influence)
        found.ids.append(ids)
        found.influence.append(influence)
    return found


def _fit(estimator: InfluenceEstimator, context: RoundContext, found: _Found) -> None:
    """Prepare the estimator for the round, or note what keeps it from measuring; the same on all ranks."""
    try:
        with context.phase("fit estimator", 1, "fit") as advance, measuring(context.model, context.optimizer):
            found.metrics = dict(estimator.fit(context))
            advance(1)
    except NotMeasurableError as obstacle:
        found.obstacle = str(obstacle)
    distributed.check_agreement(
        f"whether influence can be measured in round {context.round}", torch.tensor([found.obstacle is None])
    )


def _measure_shard(estimator: InfluenceEstimator, context: RoundContext, ids: Tensor) -> Generator[None, None, Tensor]:
    """Measure this rank's share of ``ids (m,)`` and return the influence of all of them, ``(m,)``."""
    mine = ids[distributed.shard(len(ids))]
    scores = [torch.empty(0)]
    with context.phase("measure influence", len(mine), "candidates") as advance:
        batches = context.candidate_batches(mine)
        while True:
            with measuring(context.model, context.optimizer):
                batch = next(batches, None)  # inside: a user's dataset may draw from the global random state
                if batch is None:
                    break
                scores.append(estimator.score(context, batch).float().cpu())
            advance(len(scores[-1]))
            yield
        return distributed.gather_shards(torch.cat(scores), len(ids))


def _validate(ids: Tensor, candidates: Tensor, budget: int, selector: Selector) -> None:
    name = type(selector).__name__
    if ids.shape != (budget,) or ids.dtype != torch.int64:
        raise ValueError(f"expected {name} to choose ({budget},) int64 ids, got {tuple(ids.shape)} {ids.dtype}")
    if len(ids.unique()) != budget:
        raise ValueError(f"{name} chose {budget - len(ids.unique())} ids more than once; ids of a round are distinct")
    is_candidate = torch.zeros(1 + max(int(candidates.max()), int(ids.max())), dtype=torch.bool)
    is_candidate[candidates] = True  # isin would sort all candidates in every round
    if int(ids.min()) < 0 or not is_candidate[ids].all():
        raise ValueError(f"{name} chose ids that are not among the round's {len(candidates)} candidates")


def _record(
    pool: CandidatePool,
    context: RoundContext,
    selector: Selector,
    selection: Selection,
    plan: Plan,
    found: _Found,
) -> RoundRecord:
    measured = torch.cat([torch.empty(0, dtype=torch.int64), *found.ids])
    influence = torch.cat([torch.empty(0), *found.influence])
    obstacle = () if found.obstacle is None else (f"nothing could be measured: {found.obstacle}",)
    histogram = None
    if selection.scored is not None and selection.scores is not None:
        chosen = torch.isin(selection.scored, plan.ids)
        histogram = Histogram.of(selection.scores, chosen)
    examples = _examples(pool, context, selection)
    flops: dict[str, float] = {}
    for rank_flops in distributed.gather_objects(dict(context.meter.flops)):
        for phase, amount in rank_flops.items():
            flops[phase] = flops.get(phase, 0.0) + amount
    return RoundRecord(
        round=context.round,
        step=context.step,
        selector=type(selector).__name__,
        candidates=len(context.candidates),
        chosen=len(plan.ids),
        plan=plan.fingerprint,
        measured=measured.tolist(),
        influence=influence.tolist(),
        groups=_groups(pool, context.candidates, measured, plan.ids, selection.group_metrics),
        histogram=histogram,
        examples=examples,
        metrics={**found.metrics, **selection.metrics},
        seconds=dict(context.meter.seconds),
        flops=flops,
        notes=[*obstacle, *selection.notes],
    )


def _write_decisions(
    run: SelectionRun, context: RoundContext, record: RoundRecord, selection: Selection, plan: Plan
) -> None:
    """Write every decision of the round on rank 0, and add the time to the record."""
    if run.decisions is None or distributed.rank() != 0:
        return
    spent = run.ledger.training_flops + run.ledger.selection_flops
    measured, influence = torch.tensor(record.measured, dtype=torch.int64), torch.tensor(record.influence)
    decisions = RoundDecisions(record, run.pool, selection, plan, measured, influence, spent)
    try:
        with context.meter.phase("write decisions"):
            run.decisions.write(decisions)
    except Exception as error:  # a full disk, or a selector that contradicts itself, must not end the training
        warnings.warn(
            f"the decisions of round {context.round} could not be written to {run.decisions.folder}: {error}",
            SelectionWarning,
            stacklevel=2,
        )
    record.seconds.update(context.meter.seconds)


def _groups(
    pool: CandidatePool, available: Tensor, measured: Tensor, chosen: Tensor, metrics: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Return the rows of the record's table of groups, by name."""
    counts = {kind: pool.group_counts(ids) for kind, ids in (("measured", measured), ("chosen", chosen))}
    counts = {"available": pool.group_counts(available), **counts}
    rows: dict[str, dict[str, float]] = {}
    for code, name in enumerate(pool.group_names):
        if len(pool.group_names) > GROUPS_RECORDED and not (counts["measured"][name] or counts["chosen"][name]):
            continue
        known = {key: float(values[code]) for key, values in metrics.items()}
        rows[name] = {kind: counts[kind][name] for kind in counts}
        rows[name] |= {key: value for key, value in known.items() if math.isfinite(value)}
    return rows


def _examples(pool: CandidatePool, context: RoundContext, selection: Selection) -> list[Example]:
    """Return the highest chosen and the lowest rejected candidates, or the first chosen when nothing was scored."""
    if selection.scored is None or selection.scores is None:
        ids, scores = selection.ids[:EXAMPLES_SHOWN], None
        chosen = torch.ones(len(ids), dtype=torch.bool)
    else:
        is_chosen = torch.isin(selection.scored, selection.ids)
        order = selection.scores.argsort(descending=True, stable=True)
        best = order[is_chosen[order]][:EXAMPLES_SHOWN]
        worst = order[~is_chosen[order]].flip(0)[:EXAMPLES_SHOWN]
        rows = torch.cat([best, worst])
        ids, scores, chosen = selection.scored[rows], selection.scores[rows], is_chosen[rows]
    texts: list[str] = []
    for batch in context.source.candidates(ids):
        texts += context.source.decode(batch["input_ids"])
    return [
        Example(
            id=int(ids[i]),
            group=pool.group_names[0 if pool.groups is None else int(pool.groups[ids[i]])],
            score=None if scores is None else float(scores[i]),
            chosen=bool(chosen[i]),
            text=text[:CHARACTERS_SHOWN],
        )
        for i, text in enumerate(texts)
    ]


def _state_of(part: Any) -> dict[str, Any] | None:
    return {"class": type(part).__name__, "state": part.state_dict()} if hasattr(part, "state_dict") else None


def _load_into(part: Any, state: Mapping[str, Any] | None, role: str) -> None:
    found = type(part).__name__ if hasattr(part, "state_dict") else None
    expected = None if state is None else state["class"]
    if found != expected:
        raise ValueError(
            f"the checkpoint holds the state of the {role} {expected}, but this run uses {type(part).__name__}: "
            f"resume with the {role} that the run began with, or start a new run"
        )
    if state is not None:
        part.load_state_dict(state["state"])
