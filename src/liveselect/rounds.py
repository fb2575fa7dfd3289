"""One round of selection: measure what the selector proposes, let it choose, record it."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from liveselect import distributed
from liveselect.cost import CostMeter
from liveselect.decisions import DecisionLedger, RoundDecisions
from liveselect.examples import examples_of
from liveselect.grammar import (
    NO_IDS,
    CandidateSource,
    InfluenceEstimator,
    LiveModel,
    Round,
    Selection,
    Selector,
    State,
)
from liveselect.ledger import Histogram, Ledger, RoundRecord, writable
from liveselect.looking import only_looking
from liveselect.measurement import Measurement
from liveselect.parts import check_keys, check_source, restore_part, save_part
from liveselect.plan import Plan
from liveselect.pool import CandidatePool, split_by_use
from liveselect.preserve import measuring
from liveselect.watch import RESTORE, Scene, Watch

GROUPS_RECORDED = 64
"""A pool with more groups records only those that a round touched: thousands of clusters would swell the ledger."""

NOT_RESTORED = (
    "parameters, optimizer state or attributes of modules are not as they were before influence was measured: training "
    "goes on with a model that measuring has changed. Nothing is measured from now on. Report it, with the estimator "
    "and the optimizer"
)

LEFT_OVER = "used less often than the others, so its turn came first"


@dataclass
class SelectionRun:
    """The parts of a run and their state between rounds.

    Attributes:
        selector: chooses, once the warm-up is over.
        estimator: measures what the selector proposes; None for selectors that propose nothing.
        warmup: chooses in the first ``warmup_rounds`` rounds.
        source: the data; its pool knows how often each candidate was used.
        seed: seed of every draw that selection makes.
        plan: what is being trained on; None before the first round.
        ledger: all rounds so far.
        decisions: where each candidate's fate is written, None for nowhere.
        watch: raises alarms, None for none.
        ahead: what was measured for the next round while its predecessor is trained on; None when nothing was.
        interrupted: whether this process was asked to stop.
        disabled: why nothing is measured any more, None as long as measuring leaves the model as it was.
        held_out: ids that are never chosen: a sample of the pool's own mixture, to be evaluated on.
        preparing: what preparing the selector has cost since the last round was recorded.
        shown: the data as those see them who measure and choose; None for all of ``source``.
        at_random: whether a round is drawn uniformly although the warm-up is over.
    """

    selector: Selector
    estimator: InfluenceEstimator | None
    warmup: Selector
    warmup_rounds: int
    source: CandidateSource
    seed: int = 0
    plan: Plan | None = None
    ledger: Ledger = field(default_factory=Ledger)
    decisions: DecisionLedger | None = None
    watch: Watch | None = None
    ahead: Measurement | None = None
    interrupted: Callable[[], bool] = lambda: False
    disabled: str | None = None
    held_out: Tensor = field(default_factory=lambda: NO_IDS)
    preparing: CostMeter = field(default_factory=CostMeter)
    shown: CandidateSource | None = None
    at_random: Callable[[int], bool] = lambda round_index: False

    def __post_init__(self) -> None:
        check_source(self.source, "source")

    @property
    def pool(self) -> CandidatePool:
        """The candidates."""
        return self.source.pool

    @property
    def next_round(self) -> int:
        """Index of the round to come."""
        return 0 if self.plan is None else self.plan.round + 1

    @property
    def measures(self) -> bool:
        """Whether the round to come may measure something."""
        return self.estimator is not None and self.selector_for(self.next_round) is self.selector

    def selector_for(self, round_index: int) -> Selector:
        """Return who chooses in a round."""
        if self.at_random(round_index):
            return self.warmup
        return self.selector if round_index >= self.warmup_rounds else self.selector.warmup() or self.warmup

    def prepare(self) -> None:
        """Let the selector make what depends on the data alone; nothing is done where it is ready."""
        self.selector.prepare(self.source, self.preparing)

    def can_plan(self, budget: int) -> bool:
        """Return whether the round to come can hold ``budget`` candidates that are all as good as a smaller choice.

        They are where all were used equally often, and the selector neither follows plans nor keeps to a share.
        """
        selector = self.selector_for(self.next_round)
        if not selector.engine_orders or selector.has_share:
            return False
        eligible = self._eligible_for(selector, budget)
        uses = self.pool.uses if eligible is None else self.pool.uses[eligible]
        return len(uses) > 0 and int((uses == uses.min()).sum()) >= budget

    def _eligible_for(self, selector: Selector, budget: int) -> Tensor | None:
        if selector is self.warmup and self.next_round >= self.warmup_rounds:
            return self.ever_eligible(budget)  # drawn at random in the middle of a run, and not from what it chose
        # of the run's selector in the warm-up too: what it may never choose is not trained on before either
        chooses = self.selector if self.next_round < self.warmup_rounds else selector
        return _without(self.held_out, _eligible(chooses, self.pool, budget), self.pool.size)

    def ever_eligible(self, budget: int) -> Tensor | None:
        """Return what the run's selector may choose of an unused pool, ``(size,)`` bool, or None for all."""
        unused = copy.copy(self.pool)
        unused.uses = torch.zeros_like(unused.uses)
        return _without(self.held_out, _eligible(self.selector, unused, budget), self.pool.size)

    def open_round(
        self,
        step: int,
        budget: int,
        *,
        selector: Selector | None = None,
        device: torch.device | None = None,
        meter: CostMeter | None = None,
        steps: int = 0,
        total_steps: float = math.inf,
    ) -> Round:
        """Return the round to come, in which ``budget`` candidates are chosen at optimizer step ``step``.

        Its candidates are the least used of those that its selector (or ``selector``) may choose at all.

        Raises:
            ValueError: there are fewer than the budget.
        """
        self.prepare()
        selector = selector or self.selector_for(self.next_round)
        eligible = self._eligible_for(selector, budget)
        candidates = self.pool.available(budget, eligible)
        leftovers = NO_IDS
        if selector.engine_orders:
            leftovers, candidates = split_by_use(candidates, self.pool.uses[candidates], budget)
        return Round(
            index=self.next_round,
            step=step,
            seed=self.seed,
            candidates=candidates,
            source=self.shown or self.source,
            leftovers=leftovers,
            trained=None if self.plan is None else self.plan.ids,
            budget=budget,
            steps=steps,
            total_steps=total_steps,
            device=device or torch.device("cpu"),
            meter=meter or CostMeter(),
        )

    def measurement(self, meter: CostMeter | None = None) -> Measurement:
        """Return the measurement of the round to come, with nothing measured yet."""
        selector = self.selector_for(self.next_round)
        return Measurement(
            self.estimator, selector, meter, self.interrupted, lambda: self.disabled, self._checks_state()
        )

    def _checks_state(self) -> bool:
        """Return whether the round to come compares answers of the model: the first one that measures, 2nd, 4th, ..."""
        measured = 1 + sum(1 for record in self.ledger.rounds if record.measured)
        return measured & (measured - 1) == 0

    def state_dict(self) -> State:
        """Return everything that a resumed run needs, as tensors and builtins."""
        return {
            "pool": self.pool.state_dict(),
            "plan": None if self.plan is None else self.plan.state_dict(),
            "ledger": self.ledger.state_dict(),
            "selector": save_part(self.selector, None if self.ahead is None else self.ahead.selector_state),
            "estimator": save_part(self.estimator),
            "ahead": None if self.ahead is None else self.ahead.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state.

        Raises:
            ValueError: it belongs to another pool or other parts, or what it says of plan, uses and rounds does not fit
                together: it was damaged or changed by hand.
        """
        check_keys(state, {"pool", "plan", "ledger", "selector", "estimator", "ahead"}, "selection state")
        self.pool.load_state_dict(state["pool"])
        self.plan = None if state["plan"] is None else Plan.from_state_dict(state["plan"])
        self.ledger.load_state_dict(state["ledger"])
        self._check_consistent()
        alarms = [alarm for record in self.ledger.rounds for alarm in record.alarms if alarm.kind == RESTORE]
        self.disabled = alarms[0].text if alarms else None
        restore_part(self.selector, state["selector"], "selector")
        restore_part(self.estimator, state["estimator"], "estimator")
        self.ahead = None
        if state["ahead"] is not None:
            self.ahead = self.measurement()
            self.ahead.load_state_dict(state["ahead"])

    def _check_consistent(self) -> None:
        """Raise ValueError unless plan, uses and ledger of a checkpoint tell the same run."""
        plan, rounds, uses = self.plan, self.ledger.rounds, self.pool.uses
        chosen = sum(record.chosen for record in rounds)
        wrong = None
        if uses.shape != (self.pool.size,) or int(uses.min()) < 0:
            wrong = f"uses of shape {tuple(uses.shape)} for a pool of {self.pool.size}, or negative ones"
        elif int(uses.sum()) != chosen:
            wrong = f"{int(uses.sum())} uses of candidates and {chosen} choices in its rounds"
        elif (plan is None) != (not rounds):
            wrong = f"{'no' if plan is None else 'a'} plan and {len(rounds)} rounds"
        elif plan is not None:
            wrong = self._contradiction(plan, rounds[-1])
        if wrong is not None:
            raise ValueError(
                f"the selection state of the checkpoint holds {wrong}: it was damaged or changed. Resume from an "
                "earlier checkpoint, or start a new run from the model's weights"
            )

    def _contradiction(self, plan: Plan, record: RoundRecord) -> str | None:
        if plan.ids.dim() != 1 or not 0 <= plan.cursor <= len(plan.ids):
            return f"a plan of {tuple(plan.ids.shape)} ids with its cursor at {plan.cursor}"
        if len(plan.ids) and not 0 <= int(plan.ids.min()) <= int(plan.ids.max()) < self.pool.size:
            return f"a plan with ids outside of the pool's 0 to {self.pool.size - 1}"
        if (plan.round, plan.fingerprint) != (record.round, record.plan):
            recorded = f"{record.plan} of round {record.round}"
            return f"plan {plan.fingerprint} of round {plan.round}, where its ledger has {recorded}"
        return None


def run_round(run: SelectionRun, model: LiveModel, round: Round, budget: int) -> Plan:
    """Run one whole round and return its plan of ``budget`` candidates, which is also ``run.plan`` from now on."""
    measurement = run.measurement(round.meter)
    measurement.advance(model, round)
    return finish_round(run, measurement, model, round, budget)


def finish_round(run: SelectionRun, measurement: Measurement, model: LiveModel, round: Round, budget: int) -> Plan:
    """Choose by what was measured, and return the plan of ``budget`` candidates; it is ``run.plan`` from now on.

    The run changes only when the round is complete.

    Raises:
        ValueError: the selector returned something else than distinct candidates of the number that was asked for.
        RuntimeError: the ranks decided differently.
    """
    model, round = replace(model, meter=measurement.meter), replace(round, meter=measurement.meter)
    selector = run.selector_for(round.index)
    _charge_preparing(run, round.meter)
    with measuring(model.module, model.optimizer), round.meter.phase("choose"):
        selection = _choose(selector, round, budget)
    distributed.check_agreement(f"the plan of round {round.index}", selection.ids)
    plan = Plan(round.index, selection.ids)
    with measuring(model.module, model.optimizer):
        record = _record(round, selector, selection, plan, measurement, run.ledger)
    _write_decisions(run, round, record, selection, plan)
    run.disabled = run.disabled or measurement.changed or (None if measurement.restored else NOT_RESTORED)
    _raise_alarms(run, model, round, record, selection, plan, measurement)
    run.pool.record_use(plan.ids)
    run.plan = plan
    run.ahead = None
    run.ledger.ahead_seconds = run.ledger.ahead_flops = 0.0
    run.ledger.rounds.append(record)
    if run.estimator is not None:
        run.estimator.release()
    return plan


def _without(held_out: Tensor, eligible: Tensor | None, size: int) -> Tensor | None:
    """Return which candidates may be chosen, ``(size,)`` bool, None for all, without those that are ``held_out``."""
    if not len(held_out):
        return eligible
    eligible = torch.ones(size, dtype=torch.bool) if eligible is None else eligible.clone()
    eligible[held_out] = False
    return eligible


def _charge_preparing(run: SelectionRun, meter: CostMeter) -> None:
    for spent, added in ((run.preparing.seconds, meter.seconds), (run.preparing.flops, meter.flops)):
        for phase, amount in spent.items():
            added[phase] += amount
        spent.clear()


def _eligible(selector: Selector, pool: CandidatePool, budget: int) -> Tensor | None:
    """Return what a selector may choose; raise ValueError when that is no mask of the pool."""
    mask: object = selector.eligible(pool, budget)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (pool.size,) or mask.dtype != torch.bool:
        got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"expected {type(selector).__name__}.eligible to return None or a mask ({pool.size},) bool of the pool, "
            f"got {got}"
        )
    return mask


def _choose(selector: Selector, round: Round, budget: int) -> Selection:
    """Return what the round trains on: its leftovers, and the selector's choice among equals, in training order."""
    wanted = budget - len(round.leftovers)
    chosen = selector.select(round, wanted)
    if not isinstance(chosen, Tensor | Selection):
        raise ValueError(
            f"expected {type(selector).__name__}.select to return a tensor of ids or a Selection, got "
            f"{type(chosen).__name__}"
        )
    selection = Selection(chosen) if isinstance(chosen, Tensor) else chosen
    _validate(selection.ids, round.candidates, wanted, selector)
    _validate_explanation(selection, round.pool, selector)
    if not selector.engine_orders:
        return selection
    ids = torch.cat([round.leftovers, selection.ids.cpu()])
    ids = ids[torch.randperm(len(ids), generator=round.generator("order"))]
    if not len(round.leftovers):
        return replace(selection, ids=ids)
    return replace(
        selection,
        ids=ids,
        metrics={**selection.metrics, "left_over": float(len(round.leftovers))},
        reasons={LEFT_OVER: round.leftovers, **selection.reasons},
    )


def _validate(ids: object, candidates: Tensor, wanted: int, selector: Selector) -> None:
    name = type(selector).__name__
    if not isinstance(ids, Tensor) or ids.shape != (wanted,) or ids.dtype != torch.int64:
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"expected {name} to choose ({wanted},) int64 ids, got {got}")
    if len(ids.unique()) != wanted:
        raise ValueError(f"{name} chose {wanted - len(ids.unique())} ids more than once; ids of a round are distinct")
    if not wanted:
        return
    is_candidate = torch.zeros(1 + max(int(candidates.max()), int(ids.max())), dtype=torch.bool)
    is_candidate[candidates] = True  # isin would sort all candidates in every round
    if int(ids.min()) < 0 or not is_candidate[ids].all():
        raise ValueError(f"{name} chose ids that are not among the round's {len(candidates)} candidates")


def _validate_explanation(selection: Selection, pool: CandidatePool, selector: Selector) -> None:
    """Raise ValueError when what a selection says of its choice cannot be recorded."""
    name = type(selector).__name__
    scored, scores = (None if part is None else tuple(part.shape) for part in (selection.scored, selection.scores))
    if scored != scores:
        raise ValueError(
            f"expected {name} to return one score for each scored id, or neither, got scored {scored} and scores "
            f"{scores}"
        )
    if isinstance(selection.notes, str):
        raise ValueError(f"expected {name} to return notes as a tuple of sentences, got the text {selection.notes!r}")
    for key, values in selection.group_metrics.items():
        if len(values) != len(pool.group_names):
            raise ValueError(
                f"expected {name} to return a number of {key} for each of {len(pool.group_names)} groups, got "
                f"{len(values)}"
            )


def _record(
    round: Round, selector: Selector, selection: Selection, plan: Plan, measurement: Measurement, ledger: Ledger
) -> RoundRecord:
    measured, steps = measurement.ids, measurement.steps
    available = torch.cat([round.leftovers, round.candidates])
    flops: dict[str, float] = {}
    uncounted: dict[str, None] = {}
    for spent in distributed.gather_objects(round.meter.spent()):
        uncounted |= dict.fromkeys(spent["uncounted"])
        for phase, amount in spent["flops"].items():
            flops[phase] = flops.get(phase, 0.0) + amount
    record = RoundRecord(
        round=round.index,
        step=round.step,
        selector=type(selector).__name__,
        candidates=len(available),
        chosen=len(plan.ids),
        plan=plan.fingerprint,
        measured=measured.tolist(),
        influence=measurement.influence.tolist(),
        metrics={
            **_staleness(round.step - steps[steps >= 0]),
            "effective_epochs": _effective_epochs(round.pool.uses, plan.ids),
        },
        seconds=dict(round.meter.seconds),
        flops=flops,
        notes=[
            writable(note)
            for note in (*_unmeasured(measurement), *selection.notes, *_newly_uncounted(ledger, uncounted))
        ],
    )
    return _described(record, round, selector, selection, plan, measurement, available)


def _described(
    record: RoundRecord,
    round: Round,
    selector: Selector,
    selection: Selection,
    plan: Plan,
    measurement: Measurement,
    available: Tensor,
) -> RoundRecord:
    """Return the record with what is there for a person to look at, as far as that can be made."""
    for name, value in {**measurement.metrics, **selection.metrics}.items():
        with only_looking(f"the metric {name} could not be recorded"):
            record.metrics[writable(name)] = float(value)
    with only_looking("the groups of a round could not be recorded"):
        groups = _groups(round.pool, available, measurement.ids, plan.ids, selection.group_metrics)
        record = replace(record, groups=groups)
    with only_looking("the scores of a round could not be recorded"):
        if selection.scored is not None and selection.scores is not None:
            chosen = round.pool.mask(plan.ids)[selection.scored]
            record = replace(record, histogram=Histogram.of(selection.scores, chosen))
    with only_looking("the examples of a round could not be shown"):
        return replace(record, examples=examples_of(round, selector, selection))
    return record


def _newly_uncounted(ledger: Ledger, names: Iterable[str]) -> tuple[str, ...]:
    """Return a note about what ran without being counted, and was not reported before; the ledger keeps it."""
    new = [name for name in names if name not in ledger.uncounted]
    ledger.uncounted.extend(new)
    return (f"not counted in the FLOPs of the ledger: {'; '.join(new)}",) if new else ()


def _effective_epochs(uses: Tensor, chosen: Tensor) -> float:
    """Return how often what is trained on at all is trained on, by the end of the round that trains on ``chosen``."""
    distinct = int((uses > 0).sum()) + int((uses[chosen] == 0).sum())
    return (int(uses.sum()) + len(chosen)) / max(1, distinct)


def _unmeasured(measurement: Measurement) -> tuple[str, ...]:
    """Return a note about what could not be measured."""
    finite = int(measurement.influence.isfinite().sum())
    if measurement.obstacle is not None:
        return (f"{'not everything' if finite else 'nothing'} could be measured: {measurement.obstacle}",)
    if lost := measurement.measured - finite:
        return (f"{lost} of {measurement.measured} measured influences are not finite and were left out",)
    return ()


def _staleness(ages: Tensor) -> dict[str, float]:
    """Return how many optimizer steps old the measurements ``ages (m,)`` are; nothing where they are all fresh."""
    if not ages.any():
        return {}
    return {"staleness/mean": float(ages.double().mean()), "staleness/max": float(ages.max())}


def _write_decisions(run: SelectionRun, round: Round, record: RoundRecord, selection: Selection, plan: Plan) -> None:
    """Write every decision of the round on rank 0, and add the time to the record."""
    if run.decisions is None or distributed.rank() != 0:
        return
    with only_looking(f"the decisions of round {round.index} could not be written to {run.decisions.folder}"):
        spent = run.ledger.training_flops + sum(other.total_flops for other in run.ledger.rounds)
        measured, influence = torch.tensor(record.measured, dtype=torch.int64), torch.tensor(record.influence)
        with round.meter.phase("write decisions"):
            about = run.ledger.run_id
            run.decisions.write(RoundDecisions(record, run.pool, selection, plan, measured, influence, spent, about))
    record.seconds.update(round.meter.seconds)


def _raise_alarms(
    run: SelectionRun,
    model: LiveModel,
    round: Round,
    record: RoundRecord,
    selection: Selection,
    plan: Plan,
    measurement: Measurement,
) -> None:
    """Let the watch look at the round, and add what it found and its time to the record."""
    if run.watch is None:
        return
    earlier = [alarm for other in run.ledger.rounds for alarm in other.alarms]
    scene = Scene(
        record,
        run.ledger.rounds,
        model,
        round,
        selection,
        plan,
        estimator=run.estimator if len(measurement.ids) and measurement.obstacle is None else None,
        changed=None if any(alarm.kind == RESTORE for alarm in earlier) else run.disabled,
        decisions=None if run.decisions is None else run.decisions.folder,
    )
    before = sum(round.meter.flops.values())
    try:
        with round.meter.phase("watch"):
            record.alarms.extend(run.watch.look(scene))
    except Exception as error:  # the watch only looks, so it must not end the training
        record.notes.append(writable(f"the watch failed: {error!r}"))
    record.seconds.update(round.meter.seconds)
    if spent := sum(round.meter.flops.values()) - before:
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
        row: dict[str, float] = {kind: counts[kind][name] for kind in counts}
        rows[writable(name)] = row | {key: value for key, value in known.items() if math.isfinite(value)}
    return rows
