"""A run that is cut short to be timed: some training steps, one round of its selection, and what other methods take."""

import resource
import time
from collections.abc import Callable
from dataclasses import replace

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from liveselect import distributed
from liveselect.callbacks import MATES, DataSelection, LivePDS, LiveSelection, Quad
from liveselect.callbacks.session import Session
from liveselect.cli.plan_forecast import MethodCost, Trial
from liveselect.cost import CostMeter
from liveselect.grammar import MIN_MEASUREMENTS, Round, Selector
from liveselect.measurement import Measurement
from liveselect.price import asked_for, price_of_round
from liveselect.regressors import TokenTableRegressor
from liveselect.rounds import SelectionRun, finish_round
from liveselect.selectors import NGramPrior, PortfolioSelector, ScoredSelector, UniformSelector

_FIRST_STEPS = 2
"""Steps that are not timed: memory is allocated in them."""

_MOST_STEPS = 200
_TRAINING_PART, _MEASURING_PART = 0.4, 0.75
"""Of the seconds of a trial: when training ends, and when measuring does."""

_NEVER = 2**62
_ONCE = ("check data", "rehearsal", "count FLOPs")
_OF_ROUNDS = "bookkeeping"


class PlanTrial(Callback):
    """Times some training steps and one round of the run's selection, then ends training; see :attr:`found`.

    It stands behind the selection. Rounds measure nothing until it asks for one that does, of which it measures as
    much as the time allows.

    Args:
        selection: of the run.
        seconds: of the trial, about; one fit of an estimator or one candidate may take longer.

    Attributes:
        found: the trial, None before it is over.
        methods: what other methods cost.
        judged_rows: rows on which a verdict would judge.
    """

    def __init__(self, selection: DataSelection, seconds: float) -> None:
        self.selection, self.seconds = selection, seconds
        self.warmup_rounds = selection.warmup_rounds
        selection.warmup_rounds = max(1, selection.warmup_rounds)  # the first round is chosen before anything is timed
        self.found: Trial | None = None
        self.methods: list[MethodCost] = []
        self.judged_rows = 0
        self._began = self._marked = 0.0
        self._marked_step = 0
        self._training_memory = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let no round measure that training comes to."""
        self._began = time.perf_counter()
        run = self.selection.run
        if run.estimator is not None:
            run.warmup_rounds = _NEVER

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Time steps; at the end of their time run the round, and end training."""
        session, step = self.selection.session, trainer.global_step
        if session.counted_step != step or self.found is not None:
            return
        if step == min(_FIRST_STEPS, trainer.estimated_stepping_batches - 1):
            _wait()
            self._marked, self._marked_step = _trained(session), step
        over = time.perf_counter() - self._began > _TRAINING_PART * self.seconds and step > self._marked_step
        last = step >= min(_MOST_STEPS, trainer.estimated_stepping_batches - 1)
        if not distributed.gather_objects(over or last)[0]:
            return
        _wait()
        steps = max(1, step - self._marked_step)
        step_seconds = (_trained(session) - self._marked) / steps
        self._training_memory = peak_memory(session.model.device)
        session.stop_training()
        try:
            self.found = self._run_round(trainer, step_seconds)
            self.methods = self._time_methods(trainer, self.found)
        finally:
            trainer.should_stop = True

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _run_round(self, trainer: pl.Trainer, step_seconds: float) -> Trial:
        session, run = self.selection.session, self.selection.run
        run.warmup_rounds = 0
        ledger, source, model = run.ledger, run.source, session.model
        around, rounds = ledger.around_seconds, list(ledger.rounds)
        once = sum(around.get(name, 0.0) for name in _ONCE)
        once += sum(record.seconds.get("prior", 0.0) for record in rounds)
        records = around.get(_OF_ROUNDS, 0.0) / max(1, len(rounds))
        plain = [record.total_seconds - record.seconds.get("prior", 0.0) for record in rounds]
        steps = min(self.selection.every_n_steps, trainer.estimated_stepping_batches)
        budget = int(steps) * model.global_batch
        round = session.open_round(trainer, budget, run.selector)
        ratio = run.selector.distinct_share()  # as it is set: what a round measures may move it
        cost = self._measured_round(session, round, budget)
        self.judged_rows = 64 + min(64, (source.reference_examples or 128) // 2)
        return Trial(
            method=_name(self.selection),
            parameters=sum(parameter.numel() for parameter in model.module.parameters()),
            total_steps=float(trainer.estimated_stepping_batches),
            every_n_steps=int(steps),
            warmup_rounds=self.warmup_rounds if run.estimator is not None else 0,
            global_batch=model.global_batch,
            pool=run.pool.size,
            ratio=ratio,
            step_seconds=step_seconds,
            step_flops=ledger.training_flops / max(1, trainer.global_step),
            once_seconds=once,
            once_flops=sum(ledger.around_flops.values()),
            before_seconds=sum(ledger.before_seconds.values()),
            before_flops=sum(ledger.before_flops.values()),
            plain_seconds=(plain[-1] if run.estimator is not None else cost.fixed) + records,
            fixed_seconds=cost.fixed + records,
            candidate_seconds=cost.candidate,
            round_flops=cost.flops,
            asked=cost.asked,
            measured=cost.measured,
            max_overhead=self.selection.ahead.pace.max_overhead,
            copies_share=_share_of_copies(self.selection),
            training_memory=self._training_memory,
            memory=peak_memory(model.device),
            device=model.device.type,
        )

    def _measured_round(self, session: Session, round: Round, budget: int) -> "_RoundCost":
        """Run a round, measuring as much of it as the time allows."""
        run, model = session.run, session.model
        with session.measuring():
            asked = asked_for(run.selector, round) if run.estimator is not None else 0
            measurement = run.measurement(round.meter)
            deadline = self._began + _MEASURING_PART * self.seconds
            first, each = _measure(measurement, session, round, deadline)
            asked = len(measurement.ids) if measurement.complete else max(asked, len(measurement.ids))
            measured = measurement.measured
            measurement.cut(round)
            began = time.perf_counter()
            finish_round(run, measurement, model, round, budget)
            finishing = time.perf_counter() - began
        record = run.ledger.rounds[-1]
        share = asked / measured if measured else 1.0
        finishing += record.seconds.get("fit regressor", 0.0) * (share - 1)  # it learns from all that is measured
        flops = sum(record.flops.values()) * share
        return _RoundCost(first + finishing, each, flops, asked, measured)

    def _time_methods(self, trainer: pl.Trainer, trial: Trial) -> list[MethodCost]:
        """Return what other methods cost at the sizes of the run, as far as the time allows."""
        session, run = self.selection.session, self.selection.run
        every, budget = trial.every_n_steps, trial.every_n_steps * trial.global_batch
        prior = NGramPrior()
        found = []
        with session.measuring():
            prior.prepare(run.source, CostMeter())
            self.found = replace(trial, strength=prior.strength, width=prior.width)
            for name, selector in (("random", UniformSelector()), ("prior", ScoredSelector(prior, ratio=None))):
                found.append(MethodCost(name, _seconds_of_choosing(run, selector, budget)))
            presets: dict[str, Callable[[], DataSelection]] = {
                "LiveSelection": lambda: LiveSelection(every, prior=prior),
                # as published: eight probes for every step, on a reference set as it is
                "MATES": lambda: MATES(every, probes=8 * every, regressor=TokenTableRegressor()),
                "LivePDS": lambda: LivePDS(every, probes=4 * every, regressor=TokenTableRegressor()),
                "Quad": lambda: Quad(every),
            }
            for name, make in presets.items():
                found.append(self._time_method(name, make(), session, trainer, budget, found[0].seconds or 0.0))
        return found

    def _time_method(
        self, name: str, method: DataSelection, session: Session, trainer: pl.Trainer, budget: int, choosing: float
    ) -> MethodCost:
        run, estimator = session.run, method.estimator
        if method.selector.uses_groups and run.pool.groups is None:
            return MethodCost(name, None, note="not timed: the pool has no groups (`liveselect cluster`)")
        late = distributed.gather_objects(time.perf_counter() - self._began > self.seconds)[0]
        if late or estimator is None:
            return MethodCost(name, None, note="not timed: the seconds of the plan were over")
        try:
            method.selector.prepare(run.source, CostMeter())
            round = replace(session.open_round(trainer, budget, run.warmup), index=run.next_round)
            price = price_of_round(method.selector, estimator, session.model, round, budget)
        except (ValueError, RuntimeError) as error:  # torch's own are among them: no memory, no double backward
            return MethodCost(name, None, note=f"not timed: {str(error).splitlines()[0][:120]}")
        if price is None or price.measuring_seconds is None:
            return MethodCost(name, None, note="not timed: it is known after the first round")
        return MethodCost(name, price.measuring_seconds + choosing, price.candidates)


class _RoundCost:
    """What a round takes: ``fixed`` seconds, those of a ``candidate``, FLOPs, and how many are measured."""

    def __init__(self, fixed: float, candidate: float, flops: float, asked: int, measured: int) -> None:
        self.fixed, self.candidate, self.flops, self.asked, self.measured = fixed, candidate, flops, asked, measured


def _measure(measurement: Measurement, session: Session, round: Round, deadline: float) -> tuple[float, float]:
    """Measure until it is complete or time is over; return seconds of the fit, and of one candidate."""
    model, ranks = session.model, distributed.world_size()
    began = time.perf_counter()
    measurement.advance(model, round, ranks)
    first = time.perf_counter() - began
    before = measurement.measured
    spent, chunk = 0.0, max(MIN_MEASUREMENTS, session.run.source.batch_size * ranks)
    while True:
        done = _is_complete(measurement)
        late = time.perf_counter() > deadline and measurement.measured >= MIN_MEASUREMENTS
        if distributed.gather_objects(done or late)[0]:
            break
        checked = measurement.meter.seconds.get("check restore", 0.0)
        began = time.perf_counter()
        measurement.advance(model, round, chunk)
        # once a round, and here once in each piece
        spent += time.perf_counter() - began - (measurement.meter.seconds.get("check restore", 0.0) - checked)
        chunk *= 2
    later = measurement.measured - before
    if later:
        each = spent / later
        return max(0.0, first - before * each), each
    return (0.0, first / before) if before else (first, 0.0)


def _is_complete(measurement: Measurement) -> bool:
    return measurement.complete or measurement.obstacle is not None


def _seconds_of_choosing(run: SelectionRun, selector: Selector, budget: int) -> float:
    """Return the seconds that a selector which measures nothing takes to choose, without records."""
    selector.prepare(run.source, CostMeter())
    round = run.open_round(0, budget, selector=run.warmup)
    began = time.perf_counter()
    selector.select(round, budget - len(round.leftovers))
    return time.perf_counter() - began


def _share_of_copies(selection: DataSelection) -> float:
    """Return the share of training steps that the run lets copies take."""
    share = 0.0 if selection.verdict is None else selection.verdict.share
    return share + (selection.selector.share if isinstance(selection.selector, PortfolioSelector) else 0.0)


def _name(selection: DataSelection) -> str:
    preset = type(selection).__name__
    return type(selection.selector).__name__ if preset == "DataSelection" else preset


def _trained(session: Session) -> float:
    return session.run.ledger.training_seconds + session.clock.read()


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: of the GPU's memory, or of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
