"""DataSelection: runs selection rounds inside a Lightning training loop."""

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from liveselect.callbacks.clipping import clip_gradients
from liveselect.callbacks.compatibility import (
    callable_model,
    check_intervals,
    check_rest,
    check_setup,
    find_source,
    is_inside_window,
    keep_checkpoints_out_of_windows,
    run_folder,
)
from liveselect.callbacks.lines import show_lines
from liveselect.callbacks.overhearing import Overhearing, check_overhear
from liveselect.callbacks.pace import Pace
from liveselect.callbacks.preemption import sigterm_held_back
from liveselect.callbacks.progress import round_progress
from liveselect.callbacks.random_state import RandomStates
from liveselect.callbacks.records import carry_earlier_decisions, keep_older_ledger, log_round, write_ledger
from liveselect.callbacks.settings import changes, settings_of
from liveselect.cost import CostMeter, SilentProgress
from liveselect.decisions import DecisionLedger
from liveselect.functional.flops import forward_flops
from liveselect.losses import causal_lm_loss
from liveselect.measurement import Measurement
from liveselect.plan import Plan
from liveselect.protocols import (
    CandidateSource,
    InfluenceEstimator,
    LossFn,
    RoundContext,
    RoundInterruptedError,
    SelectionWarning,
    Selector,
)
from liveselect.rehearsal import rehearse
from liveselect.rounds import SelectionRun, finish_round, run_round
from liveselect.selectors import UniformSelector
from liveselect.watch import Watch

log = logging.getLogger("liveselect")

LEDGER_FILE = "ledger.jsonl"


class DataSelection(Callback):
    """Chooses the training data while the model trains.

    Training is cut into rounds of ``every_n_steps`` optimizer steps. Before each round the estimator measures, with
    the live model and optimizer, how much some candidates would lower the reference loss; the selector chooses the
    round's candidates; training then walks the resulting plan. Measuring leaves the model, the optimizer, gradients
    and random states as they were, to the bit.

    Life cycle: the first plan is made in ``on_train_start``, each further one in ``on_train_batch_end`` of the
    round's last optimizer step, before any checkpoint of that step is written. The whole state, the random states of
    all ranks included, is one entry of the checkpoint; a run that was killed continues with the same batches.

    Works with a single device, DDP and FSDP, gradient accumulation, ``bf16-mixed`` and ``torch.compile``. Needs the
    trainer's datamodule to be a :class:`~liveselect.datamodules.SelectionDataModule` and automatic optimization;
    settings under which it could not be exact are refused at the start.

    Args:
        selector: decides what to measure and what to train on.
        estimator: measures influence; not needed by selectors that measure nothing.
        every_n_steps: optimizer steps of one round.
        warmup_rounds: rounds at the beginning whose data are drawn uniformly.
        loss_fn: maps ``(module, batch)`` to ``(B,)`` mean losses per example; the default understands Hugging Face
            causal language models and modules that return logits.
        seed: seed of every draw that selection makes.
        dirpath: where ``ledger.jsonl`` is written; by default ``selection/`` in the logger's folder.
        probes_between_steps: measure so many candidates after every optimizer step, for the round to come, instead of
            all of them in one pause between rounds. What is left at the end of the round is measured then. The numbers
            are as old as the steps between; the ledger says how old. Resuming stays exact.
        max_overhead: measure after optimizer steps for up to this share of the time that training takes, and do without
            what was not measured by the end of the round. How much is measured when depends on the machine, so two runs
            differ; a resumed run goes on with what was measured before.
        overhear: score the examples of so many optimizer steps at the beginning of each round out of the steps' own
            backward, at a fraction of what a probe costs; ``every_n_steps`` or more is all of them. The ledger records
            it, and selectors that listen (arms, regressors) learn from it. Needs an estimator that compares gradients
            with a direction, and at most 1 with rounds that are measured between steps. The numbers of later steps are
            as old as the round.
    """

    def __init__(
        self,
        selector: Selector,
        estimator: InfluenceEstimator | None = None,
        every_n_steps: int = 1000,
        warmup_rounds: int = 1,
        loss_fn: LossFn | None = None,
        seed: int = 0,
        dirpath: str | Path | None = None,
        probes_between_steps: int | None = None,
        max_overhead: float | None = None,
        overhear: int = 0,
    ) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"expected every_n_steps of at least one optimizer step, got {every_n_steps}")
        if not isinstance(warmup_rounds, int) or warmup_rounds < 0:
            raise ValueError(f"expected warmup_rounds of zero or more, got {warmup_rounds}")
        self.pace = Pace(probes_between_steps, max_overhead)
        if self.pace and getattr(estimator, "once_a_round", False):
            raise ValueError(
                f"{type(estimator).__name__} measures from one state of the model, so its rounds cannot be spread over "
                "training steps: leave out probes_between_steps and max_overhead, or take another estimator"
            )
        check_overhear(overhear, estimator, is_spread=bool(self.pace))
        if estimator is None and getattr(selector, "measures", False):
            raise ValueError(
                f"{type(selector).__name__} proposes candidates to measure, but there is no estimator: pass one, such "
                "as liveselect.influence.OneStepInfluence()"
            )
        self.selector = selector
        self.estimator = estimator
        self.every_n_steps = every_n_steps
        self.warmup_rounds = warmup_rounds
        self.loss_fn = loss_fn or causal_lm_loss
        self.seed = seed
        self.dirpath = dirpath
        self.overhearing = Overhearing(int(overhear), self.loss_fn)
        self._run: SelectionRun | None = None
        self._first_states: dict[int, Any] = {}
        self._source: CandidateSource | None = None
        self._ledger_path: Path | None = None
        self._random_states = RandomStates()
        self._in_batch = False
        self._loaded = False
        self._since: float | None = None
        self._trained_before = 0.0
        self._ahead_candidates: Tensor | None = None
        self._last_step = -1
        self._flops_per_token = 0.0

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name of the one checkpoint entry; the same for all presets."""
        return "DataSelection"

    @property
    def run(self) -> SelectionRun:
        """The state of selection; raises RuntimeError before ``setup``."""
        if self._run is None:
            raise RuntimeError("selection has not begun: it is set up by trainer.fit")
        return self._run

    @property
    def plan(self) -> Plan | None:
        """What is being trained on, None before the first round."""
        return self.run.plan

    def time_share(self) -> float:
        """Return the share of selection in the time of training and selection until now, 0..1."""
        ledger = self.run.ledger
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return ledger.selection_seconds / max(1e-9, ledger.selection_seconds + ledger.training_seconds + running)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and builtins; a collective, which Lightning calls on every rank."""
        if self._run is None:
            return {}
        if self._since is not None:  # what was trained since the last round belongs to the run, also after a resume
            self._charge_training()
            self._since = time.perf_counter()
        return {
            "seed": self.seed,
            "settings": self._settings(),
            "run": self._run.state_dict(),
            "overhearing": self.overhearing.state_dict(self._run),
            "random_states": self._random_states.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` described."""
        if not state_dict:
            return
        if state_dict["seed"] != self.seed:
            rank_zero_warn(
                f"the checkpoint was made with selection seed {state_dict['seed']}, this run uses {self.seed}: "
                "rounds to come will differ from those of the original run",
                category=SelectionWarning,
            )
        if changed := changes(state_dict.get("settings", {}), self._settings()):
            rank_zero_warn(
                f"selection is resumed with other settings than those of the checkpoint: {'; '.join(changed)}. Rounds "
                "to come follow what is set now, and differ from those of the original run",
                category=SelectionWarning,
            )
        self.run.load_state_dict(state_dict["run"])
        self.overhearing.load_state_dict(state_dict["overhearing"])
        self._random_states.load_state_dict(state_dict["random_states"])
        self._loaded = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of a step that this callback has not counted yet; it would train the step again."""
        if is_inside_window(trainer):
            rank_zero_warn(
                f"a checkpoint of step {trainer.global_step} is written inside an accumulation window of "
                f"{trainer.accumulate_grad_batches} batches. Lightning saves no gradients, so a resume from it could "
                "not be exact and is refused: save after an optimizer step",
                category=SelectionWarning,
            )
        if self._in_batch and trainer.global_step != self._last_step:
            raise RuntimeError(
                f"a checkpoint of step {trainer.global_step} was written before DataSelection had counted the step's "
                "batch: put DataSelection before the callback that saves in on_train_batch_end"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say that the epoch is over in a checkpoint that was written at its very end.

        Lightning counts such an epoch as complete only after the checkpoint. With ``max_steps`` it would then train
        one more batch of it and force an optimizer step after it, in the middle of an accumulation window.
        """
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        current = epochs["current"]
        if current["processed"] == current["ready"] == current["completed"] + 1:
            current["completed"] += 1
            epochs["total"]["completed"] += 1
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False

    # ---- hooks -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the trainer's settings and take hold of the data."""
        if stage != "fit":
            return
        show_lines()
        self._source = find_source(trainer)
        check_setup(trainer, pl_module)
        pool, used = self._source.pool, None if self._run is None else self._run.pool
        if trainer.global_step and used is not None and used.fingerprint == pool.fingerprint:
            pool.uses, self.run.pool = used.uses, pool  # a fit that goes on with a new datamodule of the same pool
        elif used is not pool:
            self._begin()
        if hasattr(self.selector, "check_pool"):
            self.selector.check_pool(self.run.pool)
        folder = run_folder(trainer) / "selection" if self.dirpath is None else Path(self.dirpath)
        self._ledger_path = folder / LEDGER_FILE
        self.run.decisions = DecisionLedger(folder / "decisions")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the first plan, or continue the one of the checkpoint."""
        check_intervals(trainer)
        keep_checkpoints_out_of_windows(trainer)
        self._flops_per_token = 3 * forward_flops(pl_module, 1)  # backward costs twice the forward
        self._last_step = trainer.global_step
        self._in_batch = False
        self._random_states.begin_run()
        source: Any = self._source
        if hasattr(source, "before_batch"):
            source.before_batch = self._random_states.begin_batch
        if trainer.global_step == 0 and not self._loaded and self.plan is not None:
            self._begin()  # another fit of the same callback, from the start
        if not self._loaded:
            keep_older_ledger(self._ledger_path)
        self._loaded, self.run.ledger.finished = False, False
        if self.plan is not None:
            check_rest(self.plan, self._global_batch(trainer), trainer)
        self.charge("check data", getattr(source, "setup_seconds", 0.0))
        began = time.perf_counter()
        carry_earlier_decisions(self.run)
        self.charge("bookkeeping", time.perf_counter() - began)
        began = time.perf_counter()
        begins = max(self._next_begins(trainer), self.warmup_rounds * self.every_n_steps)
        needed = self._budget(trainer, begins) if begins < trainer.estimated_stepping_batches else 1
        rehearse(self.run, self._context(trainer, pl_module, self.run.candidates(needed, self.selector)))
        self.charge("rehearsal", time.perf_counter() - began)
        self._trained_before, self._ahead_candidates = self.run.ledger.training_seconds, None
        if self.plan is None or self.plan.exhausted:
            self._select(trainer, pl_module)
        else:
            self._follow(self.plan)
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen to the batch, if this step is to be heard."""
        self._random_states.ensure_begun()
        self._in_batch = True
        self.overhearing.begin(trainer, pl_module, batch, self.run, self._global_batch(trainer))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Check that the step can be heard."""
        self.overhearing.listener.before_backward(trainer, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the step has told."""
        self.overhearing.listener.after_backward(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the plan; at the round's last optimizer step make the next one."""
        self._random_states.end_batch()
        plan = self._current_plan()
        examples = self._source_or_raise().batch_size * trainer.world_size
        self.overhearing.end(trainer, self.run, examples, self._global_batch(trainer))
        self.charge("overhearing", self.overhearing.take_seconds())
        plan.advance(examples)
        self.run.ledger.training_flops += self._flops_per_token * _tokens_in(batch) * trainer.world_size
        at_boundary = trainer.global_step != self._last_step
        self._last_step = trainer.global_step
        self._in_batch = False
        if not plan.exhausted:
            if at_boundary:
                self._measure_ahead(trainer, pl_module)
            return
        if not at_boundary:
            raise RuntimeError(
                f"the plan of round {plan.round} ended inside an accumulation window at batch {batch_idx}: "
                "accumulate_grad_batches must not change within a round"
            )
        if trainer.global_step < trainer.estimated_stepping_batches:
            self._charge_training()
            self._select(trainer, pl_module)
            self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the training clock: validation is neither training nor selection."""
        self._charge_training()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the model's metrics beside what was spent so far."""
        if trainer.sanity_checking or self._run is None or trainer.state.fn != TrainerFn.FITTING:
            return
        # a loader that draws its seed moves the global state; a run resumed from the checkpoint of this very step does
        # not validate again, and would go on with other random numbers
        self._random_states.put_back()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._run.ledger.evaluate(trainer.global_step, metrics)
        write_ledger(self.run.ledger, self._ledger_path)
        self._since = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the final ledger and say what selection cost."""
        self._charge_training()
        self.run.ledger.finished = True
        write_ledger(self.run.ledger, self._ledger_path)
        ledger = self.run.ledger
        if not trainer.is_global_zero:
            return
        before = sum(ledger.before_seconds.values())
        log.info(
            "selection: %d rounds, %.1f s of selection%s beside %.1f s of training (%.1f%%)",
            len(ledger.rounds),
            ledger.selection_seconds,
            f" ({before:.1f} s of it before this run, on what it draws from)" if before else "",
            ledger.training_seconds,
            100 * ledger.selection_share,
        )

    def _begin(self) -> None:
        """Start with no plan, no record, an unused pool, and parts that know nothing."""
        self.overhearing.forget()
        parts: list[Any] = [self.selector, self.estimator]
        for part in parts:
            if hasattr(part, "state_dict") and hasattr(part, "load_state_dict"):
                first = self._first_states.setdefault(id(part), copy.deepcopy(part.state_dict()))
                part.load_state_dict(copy.deepcopy(first))
        pool = self._source_or_raise().pool
        pool.uses.zero_()
        self._run = SelectionRun(
            selector=self.selector,
            estimator=self.estimator,
            warmup=UniformSelector(),
            warmup_rounds=self.warmup_rounds,
            pool=pool,
            decisions=None if self._run is None else self._run.decisions,
            watch=Watch() if self._run is None else self._run.watch,
        )
        self._run.ledger.about = self._about()
        self._run.ledger.charge_before(self.selector)
        if getattr(self.selector, "uses_groups", False):
            self._run.ledger.charge_before(self._source)

    # ---- a round -----------------------------------------------------------------------------------------------

    def _select(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run a round and publish its plan."""
        run = self.run
        began, before = time.perf_counter(), 0.0 if run.ahead is None else sum(run.ahead.meter.seconds.values())
        budget = self._budget(trainer, trainer.global_step)
        context = self._context(trainer, pl_module, run.candidates(budget))
        with sigterm_held_back():
            plan = self._measure_and_choose(context, budget)
        self._follow(plan)
        log_round(trainer, run.ledger)
        seconds = run.ledger.rounds[-1].seconds
        counted = sum(seconds.values()) - before  # by name; the rest is selection's as well
        self.charge("bookkeeping", max(0.0, time.perf_counter() - began - counted))
        write_ledger(self.run.ledger, self._ledger_path)
        self._trained_before = run.ledger.training_seconds

    def _measure_ahead(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure a little for the round to come, between two optimizer steps of this one."""
        run, begins = self.run, self._next_begins(trainer)
        if not self.pace or not self._asks():
            return
        if begins >= trainer.estimated_stepping_batches or (run.ahead is not None and run.ahead.complete):
            return
        self._charge_training()
        if run.ahead is None:
            run.ahead = Measurement(run.estimator, run.selector)
            run.ahead.remember()
        if self._ahead_candidates is None:
            self._ahead_candidates = run.candidates(self._budget(trainer, begins))
        trained = run.ledger.training_seconds - self._trained_before
        if limit := self.pace.affordable(run.ahead, trained):
            context = self._context(trainer, pl_module, self._ahead_candidates)
            with sigterm_held_back():
                self._advance(run.ahead, replace(context, meter=run.ahead.meter, progress=SilentProgress()), limit)
            run.ledger.ahead_seconds = sum(run.ahead.meter.seconds.values())
            run.ledger.ahead_flops = sum(run.ahead.meter.flops.values()) * trainer.world_size
        self._since = time.perf_counter()

    def _measure_and_choose(self, context: RoundContext, budget: int) -> Plan:
        """Run the round, or what was not measured of it between the steps before, unless that is limited."""
        run, missing = self.run, 0
        if not self._asks():
            return run_round(run, context, budget)
        limited = run.ahead is not None and self.pace.max_overhead is not None
        if run.ahead is None:  # a part of the run's state, so that a checkpoint on an interruption goes on from it
            run.ahead = Measurement(run.estimator, run.selector)
            run.ahead.remember()
        ahead, self._ahead_candidates = run.ahead, None
        context = replace(context, meter=ahead.meter)
        if limited:
            missing = ahead.cut(context)
        else:
            self._advance(ahead, context)
        plan = finish_round(run, ahead, context, budget)
        if missing:
            run.ledger.rounds[-1].notes.append(
                f"{missing} of {missing + ahead.measured} candidates were not measured within max_overhead="
                f"{self.pace.max_overhead}"
            )
        return plan

    def _asks(self) -> bool:
        """Return whether the round to come may measure something."""
        return self.run.estimator is not None and self.run.selector_for(self.run.next_round) is self.run.selector

    @staticmethod
    def _advance(ahead: Measurement, context: RoundContext, limit: int | None = None) -> None:
        try:
            ahead.advance(context, limit)
        except RoundInterruptedError as stopped:
            log.info("%s: the run ends now, and continues from its last checkpoint", stopped)
            raise SIGTERMException from stopped

    def _next_begins(self, trainer: pl.Trainer) -> int:
        """Return the step at which the next round begins."""
        left = 0 if self.plan is None else len(self.plan.ids) - self.plan.cursor
        return trainer.global_step + left // self._global_batch(trainer)

    def _budget(self, trainer: pl.Trainer, begins: int) -> int:
        """Return how many candidates a round that begins at step ``begins`` trains on."""
        steps = int(min(self.every_n_steps, trainer.estimated_stepping_batches - begins))
        return max(1, steps) * self._global_batch(trainer)

    def _context(self, trainer: pl.Trainer, pl_module: pl.LightningModule, candidates: Tensor) -> RoundContext:
        """Return what the parts may look at in the round to come, which chooses among ``candidates (n,)``."""
        run, source = self.run, self._source_or_raise()
        selector = run.selector_for(run.next_round)
        title = f"round {run.next_round} ({type(selector).__name__}, step {trainer.global_step})"
        model, loss_fn = callable_model(trainer, pl_module, self.loss_fn)
        return RoundContext(
            round=run.next_round,
            step=trainer.global_step,
            seed=self.seed,
            model=model,
            optimizer=trainer.optimizers[0],
            loss_fn=loss_fn,
            source=source,
            candidates=candidates,
            global_batch=self._global_batch(trainer),
            clip_gradients=lambda parameters: clip_gradients(trainer, pl_module, parameters),
            forward_context=trainer.precision_plugin.forward_context,
            meter=CostMeter(),
            progress=round_progress(title, trainer),
            interrupted=lambda: trainer.received_sigterm,
            trained=None if run.plan is None else run.plan.ids,
        )

    def _global_batch(self, trainer: pl.Trainer) -> int:
        """Return the examples of one optimizer step."""
        return self._source_or_raise().batch_size * trainer.world_size * trainer.accumulate_grad_batches

    def _follow(self, plan: Plan) -> None:
        self._source_or_raise().follow(plan)

    def _current_plan(self) -> Plan:
        if self.plan is None:
            raise RuntimeError("training has begun without a plan: DataSelection.on_train_start did not run")
        return self.plan

    def _source_or_raise(self) -> CandidateSource:
        if self._source is None:
            raise RuntimeError("selection has not begun: it is set up by trainer.fit")
        return self._source

    def _about(self) -> dict[str, Any]:
        return {
            "preset": type(self).__name__,
            "selector": type(self.selector).__name__,
            "estimator": None if self.estimator is None else type(self.estimator).__name__,
            "every_n_steps": self.every_n_steps,
            "warmup_rounds": self.warmup_rounds,
            "seed": self.seed,
        }

    def _settings(self) -> dict[str, str]:
        """Return what a resumed run should not change without noticing; the pool and the seed are looked at apart."""
        own = {name: getattr(self, name) for name in ("selector", "estimator", "loss_fn")}
        own |= {name: getattr(self, name) for name in ("every_n_steps", "warmup_rounds")}
        own |= {"probes_between_steps": self.pace.probes_between_steps, "max_overhead": self.pace.max_overhead}
        return settings_of(own | {"reference set": getattr(self._source, "reference_fingerprint", None)})

    # ---- records -----------------------------------------------------------------------------------------------

    def charge(self, name: str, seconds: float) -> None:
        """Count seconds that a callback spent around the rounds to selection, and not to training."""
        if seconds:
            around = self.run.ledger.around_seconds
            around[name] = around.get(name, 0.0) + seconds
        if self._since is not None:
            self._since += seconds

    def _charge_training(self) -> None:
        """Add the time since the clock was started to the cost of training, and stop the clock."""
        if self._since is not None:
            self.run.ledger.training_seconds += time.perf_counter() - self._since
            self._since = None


def _tokens_in(batch: Any) -> int:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids.numel() if isinstance(ids, torch.Tensor) else 0
