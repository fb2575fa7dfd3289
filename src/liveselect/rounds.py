"""One round of selection: measure what the selector proposes, let it choose, record it."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from liveselect import distributed
from liveselect.decisions import DecisionLedger, RoundDecisions
from liveselect.ledger import Example, Histogram, Ledger, RoundRecord
from liveselect.measurement import Measurement
from liveselect.plan import Plan
from liveselect.pool import CandidatePool
from liveselect.protocols import InfluenceEstimator, RoundContext, Selection, SelectionWarning, Selector
from liveselect.snapshot import measuring
from liveselect.watch import Scene, Watch

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
        watch: raises alarms, None for none.
        ahead: what was measured for the next round while its predecessor is trained on; None when nothing was.
    """

    selector: Selector
    estimator: InfluenceEstimator | None
    warmup: Selector
    warmup_rounds: int
    pool: CandidatePool
    plan: Plan | None = None
    ledger: Ledger = field(default_factory=Ledger)
    decisions: DecisionLedger | None = None
    watch: Watch | None = None
    ahead: Measurement | None = None

    @property
    def next_round(self) -> int:
        """Index of the round to come."""
        return 0 if self.plan is None else self.plan.round + 1

    def selector_for(self, round_index: int) -> Selector:
        """Return who chooses in a round."""
        return self.warmup if round_index < self.warmup_rounds else self.selector

    def candidates(self, budget: int, selector: Selector | None = None) -> Tensor:
        """Return what ``budget`` candidates may be chosen from, ``(n,)`` ascending ids, by the next round's selector.

        Args:
            budget: candidates that a round trains on.
            selector: another one that chooses.

        Raises:
            ValueError: there are fewer.
        """
        selector = selector or self.selector_for(self.next_round)
        eligible = selector.eligible(self.pool, budget) if hasattr(selector, "eligible") else None
        return self.pool.available(budget, eligible)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors and builtins."""
        return {
            "pool": self.pool.state_dict(),
            "plan": None if self.plan is None else self.plan.state_dict(),
            "ledger": self.ledger.state_dict(),
            "selector": _state_of(self.selector, None if self.ahead is None else self.ahead.selector_state),
            "estimator": _state_of(self.estimator),
            "ahead": None if self.ahead is None else self.ahead.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; raise ValueError when it belongs to another pool or other parts."""
        self.pool.load_state_dict(state["pool"])
        self.plan = None if state["plan"] is None else Plan.from_state_dict(state["plan"])
        self.ledger.load_state_dict(state["ledger"])
        _load_into(self.selector, state["selector"], "selector")
        _load_into(self.estimator, state["estimator"], "estimator")
        self.ahead = None
        if state["ahead"] is not None:
            self.ahead = Measurement(self.estimator, self.selector)
            self.ahead.remember()
            self.ahead.load_state_dict(state["ahead"])


def run_round(run: SelectionRun, context: RoundContext, budget: int) -> Plan:
    """Run one whole round and return its plan of ``budget`` candidates, which is also ``run.plan`` from now on."""
    measurement = Measurement(run.estimator, run.selector_for(context.round), context.meter)
    measurement.advance(context)
    return finish_round(run, measurement, context, budget)


def finish_round(run: SelectionRun, measurement: Measurement, context: RoundContext, budget: int) -> Plan:
    """Choose by what was measured, and return the plan of ``budget`` candidates; it is ``run.plan`` from now on.

    The run changes only when the round is complete.

    Raises:
        ValueError: the selector returned something else than ``budget`` distinct candidates.
        RuntimeError: the ranks decided differently.
    """
    selector = run.selector_for(context.round)
    with measuring(context.model, context.optimizer), context.meter.phase("choose"):
        selection = selector.select(context, budget)
    _validate(selection.ids, context.candidates, budget, selector)
    distributed.check_agreement(f"the plan of round {context.round}", selection.ids)
    plan = Plan(context.round, selection.ids)
    with measuring(context.model, context.optimizer):
        record = _record(run.pool, context, selector, selection, plan, measurement)
    _write_decisions(run, context, record, selection, plan)
    _raise_alarms(run, context, record, selection, plan, measurement)
    run.pool.record_use(plan.ids)
    run.plan = plan
    run.ahead = None
    run.ledger.ahead_seconds = run.ledger.ahead_flops = 0.0
    run.ledger.rounds.append(record)
    estimator: Any = run.estimator
    if hasattr(estimator, "release"):
        estimator.release()
    return plan


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
    found: Measurement,
) -> RoundRecord:
    measured = torch.cat([torch.empty(0, dtype=torch.int64), *found.ids])
    influence = torch.cat([torch.empty(0), *found.influence])
    steps = torch.cat([torch.empty(0, dtype=torch.int64), *found.steps])
    obstacle = _obstacle(found, influence)
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
        metrics={
            **found.metrics,
            **_staleness(context.step - steps[steps >= 0]),
            **{name: float(value) for name, value in selection.metrics.items()},
        },
        seconds=dict(context.meter.seconds),
        flops=flops,
        notes=[*obstacle, *selection.notes],
    )


def _obstacle(found: Measurement, influence: Tensor) -> tuple[str, ...]:
    if found.obstacle is None:
        return ()
    what = "not everything" if influence.isfinite().any() else "nothing"
    return (f"{what} could be measured: {found.obstacle}",)


def _staleness(ages: Tensor) -> dict[str, float]:
    """Return how many optimizer steps old the measurements ``ages (m,)`` are; nothing where they are all fresh."""
    if not ages.any():
        return {}
    return {"staleness/mean": float(ages.double().mean()), "staleness/max": float(ages.max())}


def _write_decisions(
    run: SelectionRun, context: RoundContext, record: RoundRecord, selection: Selection, plan: Plan
) -> None:
    """Write every decision of the round on rank 0, and add the time to the record."""
    if run.decisions is None or distributed.rank() != 0:
        return
    spent = run.ledger.training_flops + sum(other.total_flops for other in run.ledger.rounds)
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


def _raise_alarms(
    run: SelectionRun,
    context: RoundContext,
    record: RoundRecord,
    selection: Selection,
    plan: Plan,
    measurement: Measurement,
) -> None:
    """Let the watch look at the round, and add what it found and its time to the record."""
    if run.watch is None:
        return
    scene = Scene(
        record,
        run.ledger.rounds,
        context,
        selection,
        plan,
        run.pool,
        estimator=run.estimator if measurement.ids and measurement.obstacle is None else None,
        restored=measurement.restored,
        decisions=None if run.decisions is None else run.decisions.folder,
    )
    before = sum(context.meter.flops.values())
    try:
        with context.meter.phase("watch"):
            record.alarms.extend(run.watch.look(scene))
    except Exception as error:  # whoever only looks must not end the training
        record.notes.append(f"the watch failed: {error!r}")
    record.seconds.update(context.meter.seconds)
    if spent := sum(context.meter.flops.values()) - before:
        record.flops["watch"] = spent * distributed.world_size()  # every rank measures all canaries


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


def _state_of(part: Any, known: Any = None) -> dict[str, Any] | None:
    """Return the class and the state of a part, which may be ``known`` already; None when it keeps none."""
    if not hasattr(part, "state_dict"):
        return None
    return {"class": type(part).__name__, "state": _as_builtins(part.state_dict() if known is None else known)}


def _as_builtins(value: Any) -> Any:
    """Return a state with NumPy's numbers and arrays as Python's and tensors: others make a checkpoint unloadable."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {_as_builtins(key): _as_builtins(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_builtins(item) for item in value)
    return value


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
