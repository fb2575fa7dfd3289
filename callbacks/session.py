"""What selection holds from ``setup`` on: the run and its data, the live model, the clock, the place of its records."""

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from liveselect import distributed
from liveselect.callbacks.clipping import clip_gradients
from liveselect.callbacks.clock import TrainingClock
from liveselect.callbacks.compatibility import callable_model, requeue_signals, steps_per_batch
from liveselect.callbacks.folder import LEDGER_FILE, RunFolder
from liveselect.callbacks.preemption import SignalGate
from liveselect.callbacks.records import carry_earlier_decisions, report_uncounted, write_files, write_ledger
from liveselect.callbacks.silence import silent_logging
from liveselect.callbacks.training_flops import TrainingFlops, peak_flops
from liveselect.decisions import MOST_REJECTED, DecisionLedger
from liveselect.functional.sampling import uniform_subset
from liveselect.functional.several_optimizers import as_one
from liveselect.grammar import (
    Batch,
    CandidateSource,
    InfluenceEstimator,
    LiveModel,
    LossFn,
    Named,
    Round,
    SelectionWarning,
    Selector,
    State,
)
from liveselect.influence.reference import held_out_loss
from liveselect.ledger import new_run_id
from liveselect.looking import only_looking
from liveselect.parts import save_part
from liveselect.plan import Plan
from liveselect.preserve import measuring
from liveselect.price import Price, price_of_round
from liveselect.rehearsal import rehearse
from liveselect.rounds import SelectionRun
from liveselect.seeding import generator_for
from liveselect.selectors import UniformSelector
from liveselect.verdict.arms import tokens_in
from liveselect.watch import Watch

STRETCH = "round_stretch"
"""Metric of a round's record: how many times as long as set the rounds after it are, where that has changed."""

log = logging.getLogger("liveselect")


class Steps(Protocol):
    """How far a training loop is, and how its steps are made up; a Trainer is one, and so is a driver of another loop.

    Attributes:
        global_step: optimizer steps done.
        world_size: number of ranks.
        accumulate_grad_batches: batches of one optimizer step of a rank.
        estimated_stepping_batches: optimizer steps at which training ends, infinite where that is not known.
        received_sigterm: whether this process was asked to stop.
    """

    @property
    def global_step(self) -> int: ...  # noqa: D102

    @property
    def world_size(self) -> int: ...  # noqa: D102

    accumulate_grad_batches: int

    @property
    def estimated_stepping_batches(self) -> int | float: ...  # noqa: D102

    @property
    def received_sigterm(self) -> bool: ...  # noqa: D102


class Session:
    """A run of selection inside a training loop; it outlives a fit, so that another one may go on with it.

    Args:
        selector: of the run.
        estimator: of the run.
        about: describes the run in the ledger; ``every_n_steps``, ``warmup_rounds`` and ``seed`` among it.
        source: the data.

    Attributes:
        run: the state between rounds.
        clock: counts training.
        resumed: whether a checkpoint was loaded and training has not begun since.
        gate: holds signals back where a checkpoint would be wrong.
        counted_step: the last optimizer step whose batches are all counted.
        saved_batch: examples of an optimizer step, of the checkpoint until training begins; 0 before both.
        in_batch: whether a batch is under way.
        stretch: how many times as long as set the rounds to come are, where ``max_overhead`` needs it.
    """

    def __init__(
        self,
        selector: Selector,
        estimator: InfluenceEstimator | None,
        about: State,
        source: CandidateSource,
    ) -> None:
        rounds, seed = int(about["warmup_rounds"]), int(about["seed"])
        self.run = SelectionRun(selector, estimator, UniformSelector(), rounds, source, seed, watch=Watch())
        self.clock = TrainingClock()
        self.gate = SignalGate()
        self.resumed = False
        self.counted_step = -1
        self.saved_batch = 0
        self._mixed_round = -1  # a round whose steps had several sizes: its cursor does not follow from its steps
        self.in_batch = False
        self._in_step = False
        self._every_n_steps = int(about["every_n_steps"])
        self._ticks = 1  # by how much one step moves the loop's count; Lightning counts that of each optimizer
        self.stretch = 1
        self._about = about
        self._first_states = [copy.deepcopy(part.state_dict()) for part in self._parts()]
        self._folder = RunFolder()
        self._wanted, self._apart, self._most_rejected = Path(), False, MOST_REJECTED
        self._ledger_path: Path | None = None
        self._model: LiveModel | None = None
        self._training_flops = TrainingFlops()
        self._describe()

    # ---- life --------------------------------------------------------------------------------------------------

    def use(self, source: CandidateSource, goes_on: bool) -> None:
        """Take the data of a fit: those of a fit before that this one continues, or others, from the start."""
        used = self.run.pool
        if goes_on and used.identity == source.pool.identity:
            source.pool.uses, self.run.source = used.uses, source  # a new datamodule of the same pool
        elif used is not source.pool:
            self.start_over(source)

    def start_over(self, source: CandidateSource | None = None) -> None:
        """Begin with no plan, no record, an unused pool, and parts that know nothing."""
        for part, state in zip(self._parts(), self._first_states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
        old = self.run
        self.run = SelectionRun(
            old.selector,
            old.estimator,
            old.warmup,
            old.warmup_rounds,
            source or old.source,
            old.seed,
            decisions=old.decisions,
            watch=old.watch,
            interrupted=old.interrupted,
            held_out=old.held_out,
            at_random=old.at_random,
        )
        self.run.pool.uses.zero_()
        self._describe()

    def hold_out(self, count: int) -> None:
        """Keep ``count`` candidates, but no more than a fiftieth of the pool, from ever being chosen."""
        size = self.run.pool.size
        generator = generator_for(self.run.seed, 0, "held-out mixture")
        self.run.held_out = uniform_subset(size, min(count, size // 50), generator)

    def mixture_loss(self) -> float | None:
        """Return the loss on what is held out of the pool, nats per token; None where nothing is, or before a fit."""
        run, model = self.run, self._model
        if model is None or not len(run.held_out):
            return None
        with measuring(model.module, model.optimizer):
            return held_out_loss(model, run.source, run.held_out)

    def write_to(self, folder: Path, apart: bool, most_rejected: int) -> None:
        """Keep the records in ``folder``, once training begins; ``apart`` from what earlier runs have left there."""
        self._wanted, self._apart, self._most_rejected = folder, apart, most_rejected

    def release(self) -> None:
        """Let others have the folder, and put the signal handlers back."""
        self._folder.release()
        self.gate.remove()

    def describe(self, settings: Mapping[str, object]) -> None:
        """Note what the run is set to, and where its records are, beside what it is."""
        plain = {name: str(value) if isinstance(value, Named) else value for name, value in settings.items()}
        folder = {} if self._ledger_path is None else {"folder": str(self._ledger_path.parent.resolve())}
        started = self.run.ledger.about.get("started") or datetime.now(UTC).isoformat(timespec="seconds")
        self.run.ledger.about = {**plain, **self._about, "started": started, **folder}

    def _take_folder(self) -> None:
        """Find the folder of this run, the same on all ranks; a collective."""
        run, folder, run_id = self.run, self._wanted, self.run.ledger.run_id or new_run_id()
        if distributed.rank() == 0:
            folder = self._folder.claim(self._wanted, run_id, bool(run.ledger.rounds), self._apart)
            before = [Path(place).parent for place in reversed(run.ledger.decision_folders)]
            with only_looking("what training steps showed in earlier rounds could not be read"):
                run.ledger.recall(place / LEDGER_FILE for place in (folder, *before))
        folder, run.ledger.run_id = distributed.gather_objects((folder, run_id))[0]
        self._ledger_path = folder / LEDGER_FILE
        run.decisions = DecisionLedger(folder / "decisions", self._most_rejected)

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss_fn: LossFn) -> None:
        """Take hold of the live model of a Trainer, and bring the records along.

        Raises:
            TypeError: a part's state cannot be saved, which would come up at the first checkpoint otherwise.
        """
        self._ticks = steps_per_batch(pl_module) or 1
        self._begin(trainer)
        self.run.ledger.peak_flops = peak_flops(trainer)
        self.gate.install(trainer, *requeue_signals(trainer))
        module, loss_fn = callable_model(trainer, pl_module, loss_fn)
        self._use_model(
            LiveModel(
                module=module,
                optimizer=as_one(trainer.optimizers),
                loss_fn=loss_fn,
                global_batch=self.global_batch(trainer),
                clip_gradients=lambda parameters: clip_gradients(trainer, pl_module, parameters),
                autocast=trainer.precision_plugin.forward_context,
            )
        )

    def begin_loop(self, steps: Steps, model: LiveModel) -> None:
        """Take hold of the live model of another loop, and bring the records along; raises as :meth:`begin_fit`."""
        self._begin(steps)
        self._use_model(model)

    def _begin(self, steps: Steps) -> None:
        for part in self._parts():
            save_part(part)
        starts_over = steps.global_step == 0 and not self.resumed and self.run.plan is not None
        self._training_flops = TrainingFlops()
        self.counted_step, self.in_batch, self._in_step = steps.global_step, False, False
        if starts_over:
            self.start_over()  # another fit of the same callback
        self._take_folder()
        if self.resumed:
            self._check_place(steps)
        self.saved_batch = self.global_batch(steps)
        self.resumed, self.run.ledger.finished = False, False
        changed = [record.metrics[STRETCH] for record in self.run.ledger.rounds if STRETCH in record.metrics]
        self.stretch = int(changed[-1]) if changed else 1
        self.run.interrupted = lambda: self._interrupted(steps)

    def _use_model(self, model: LiveModel) -> None:
        self._model = model
        self.charge("check data", self.run.source.setup_seconds)
        with self.charged("bookkeeping"):
            carry_earlier_decisions(self.run)

    def _parts(self) -> list[Selector | InfluenceEstimator]:
        run = self.run
        return [run.selector] if run.estimator is None else [run.selector, run.estimator]

    def _describe(self) -> None:
        run = self.run
        run.ledger.about = dict(self._about)
        run.ledger.charge_before(run.selector.cost_before_training())
        if run.selector.uses_groups:
            run.ledger.charge_before(run.source.cost_before_training())

    # ---- rounds ------------------------------------------------------------------------------------------------

    @property
    def model(self) -> LiveModel:
        """The live model; raises RuntimeError before training begins."""
        if self._model is None:
            raise RuntimeError("there is no live model before training begins")
        return self._model

    @property
    def plan(self) -> Plan:
        """What is being trained on; raises RuntimeError before the first round."""
        if self.run.plan is None:
            raise RuntimeError("training has begun without a plan: DataSelection.on_train_start did not run")
        return self.run.plan

    def global_batch(self, steps: Steps) -> int:
        """Return the examples of one optimizer step."""
        return self.run.source.batch_size * steps.world_size * steps.accumulate_grad_batches

    def batch_of_round(self) -> int:
        """Return the examples of each optimizer step of the present round; 0 where they had several sizes."""
        plan = self.run.plan
        return 0 if plan is not None and plan.round == self._mixed_round else self.saved_batch

    @property
    def begins_last_step(self) -> bool:
        """Whether the round's last optimizer step begins with the batch to come."""
        plan = self.run.plan
        return plan is not None and plan.cursor + self.model.global_batch == len(plan.ids)

    def next_begins(self, steps: Steps) -> int:
        """Return the step at which the next round begins."""
        plan = self.run.plan
        left = 0 if plan is None else len(plan.ids) - plan.cursor
        return steps.global_step + left // self.global_batch(steps) * self._ticks

    def budget(self, steps: Steps, begins: int) -> int:
        """Return how many candidates are chosen for a round that begins at step ``begins``.

        Those of a whole round; if training and the pass over the pool end before, as many as are trained on.
        """
        batch, every = self.global_batch(steps), self._every_n_steps * self.stretch
        rest = int(min(every, (steps.estimated_stepping_batches - begins) // self._ticks))
        whole, left = every * batch, max(1, rest) * batch
        # whole also where training ends inside: a run that goes on later then trains what one long run would have
        return whole if left == whole or self.run.can_plan(whole) else left

    def stretch_rounds(self, steps: float, why: str) -> None:
        """Make the rounds to come at least ``steps`` long, in multiples of the set length, and record why.

        Not longer than half of what the last round could choose from, which a round must not use up. They become
        shorter again only when half of their length would do.
        """
        record = self.run.ledger.rounds[-1]
        most = record.candidates * self.stretch // max(1, 2 * record.chosen)
        times = max(1, min(math.ceil(steps / self._every_n_steps), most))
        if self.stretch / 2 <= times <= self.stretch:
            return
        self.stretch = times
        record.metrics[STRETCH] = float(times)
        record.notes.append(
            f"a round of {times * self._every_n_steps} steps pays for choosing it: {why}; rounds to come are that long"
        )
        log.info("round %d: %s", record.round, record.notes[-1])

    def open_round(self, steps: Steps, budget: int, selector: Selector | None = None) -> Round:
        """Return the round to come, as it stands at the present step."""
        return self.run.open_round(
            steps.global_step,
            budget,
            selector=selector,
            device=self.model.device,
            steps=budget // self.global_batch(steps),
            total_steps=float(steps.estimated_stepping_batches),
        )

    def rehearse(self, steps: Steps) -> Price | None:
        """Try, small, the first round that measures, and return what such a round costs if that is known."""
        run = self.run
        begins = max(self.next_begins(steps), run.warmup_rounds * self._every_n_steps * self._ticks)
        needed = self.budget(steps, begins) if begins < steps.estimated_stepping_batches else 1
        round = self.open_round(steps, needed, run.selector)
        changed, meter = rehearse(run.selector, run.estimator, self.model, round, needed)
        spent = meter.spent()
        flops = sum(distributed.gather_objects(sum(spent["flops"].values())))
        if flops:
            run.ledger.around_flops["rehearsal"] = run.ledger.around_flops.get("rehearsal", 0.0) + flops
        report_uncounted(run.ledger, spent["uncounted"])
        if changed is not None and run.disabled is None:
            run.disabled = changed
            rank_zero_warn(changed, category=SelectionWarning)
        if run.estimator is None or begins >= steps.estimated_stepping_batches:
            return None
        examples = self._every_n_steps * self.global_batch(steps)
        return price_of_round(run.selector, run.estimator, self.model, round, examples)

    def at_step(self, round: Round, steps: Steps) -> Round:
        """Return a round that was opened at an earlier step as it stands now."""
        return replace(round, step=steps.global_step)

    def begin_batch(self, batch: Batch) -> None:
        """Hold signals from the first batch of an optimizer step until the step is counted.

        The first batch of a fit is looked at to know what training on it costs.
        """
        if not self._training_flops.known:
            with self.charged("count FLOPs"), self.measuring():
                looked = self._training_flops.look_at(self.model, batch)
            around = self.run.ledger.around_flops
            around["count FLOPs"] = around.get("count FLOPs", 0.0) + looked * distributed.world_size()
            report_uncounted(self.run.ledger, self._training_flops.uncounted)
        if not self._in_step:
            self.gate.hold()
        self._in_step = self.in_batch = True

    def flops_of(self, batch: object) -> float:
        """Return the FLOPs of a forward and backward of a batch of this rank."""
        return self._training_flops.of(batch).total

    def count_batch(self, steps: Steps, batch: object) -> bool:
        """Count a batch that was trained on; returns whether an optimizer step ended with it."""
        self.plan.advance(self.run.source.batch_size * steps.world_size)
        flops, ledger = self._training_flops.of(batch), self.run.ledger
        ledger.training_flops += flops.total * steps.world_size
        ledger.training_repeated_flops += flops.repeated * steps.world_size
        ledger.training_tokens += tokens_in(batch) * steps.world_size
        moved = steps.global_step - self.counted_step
        if moved not in (0, self._ticks):
            raise RuntimeError(
                f"a batch moved the count of optimizer steps by {moved}, where {self._ticks} was expected, one for "
                "each optimizer: with manual optimization each of them has to step once in every batch"
            )
        stepped = moved != 0
        self.counted_step, self.in_batch = steps.global_step, False
        return stepped

    def end_step(self) -> None:
        """Let signals through when an optimizer step is over, with what is measured after it."""
        if self._in_step:
            self._in_step = False
            self.gate.release()

    def _check_place(self, steps: Steps) -> None:
        """Raise ValueError when the plan of a checkpoint stands elsewhere than its step."""
        plan, batch = self.run.plan, self.global_batch(steps)
        if plan is None:
            return
        if not self.saved_batch:
            self._mixed_round = plan.round
            return
        if batch != self.saved_batch:
            self._mixed_round = plan.round
            return
        trained = (steps.global_step - self.run.ledger.rounds[-1].step) // self._ticks * batch
        # inside an accumulation window some batches of the step are counted already; check_rest refuses that
        if not trained <= plan.cursor < trained + batch:
            raise ValueError(
                f"the checkpoint stands at step {steps.global_step}, at which {trained} candidates of round "
                f"{plan.round} are trained on, and its plan counts {plan.cursor}: it was put together from two, or "
                "changed. Resume from another checkpoint"
            )

    def _interrupted(self, steps: Steps) -> bool:
        """Let signals through between two measured batches, and say whether one of them asks to stop.

        Not between steps: a run that is resumed in the middle of such a piece would measure the rest at a later step.
        """
        if not self._in_step:
            self.gate.let_through()
        return steps.received_sigterm

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Hold signals and keep logging silent in this block, in which weights may be displaced."""
        with self.gate.measuring(), silent_logging():
            yield

    # ---- records -----------------------------------------------------------------------------------------------

    def charge_training(self) -> None:
        """Add the seconds of training until now to the ledger."""
        self.run.ledger.training_seconds += self.clock.take()

    def stop_training(self) -> None:
        """Stop the clock of training, and add its seconds to the ledger."""
        self.clock.stop()
        self.charge_training()

    def charge(self, name: str, seconds: float) -> None:
        """Count seconds that were spent around the rounds to selection, and not to training."""
        if seconds:
            around = self.run.ledger.around_seconds
            around[name] = around.get(name, 0.0) + seconds
            self.clock.discount(seconds)

    @contextmanager
    def charged(self, name: str) -> Iterator[None]:
        """Count the seconds inside the block to selection."""
        began = time.perf_counter()
        yield
        self.charge(name, time.perf_counter() - began)

    def write_ledger(self) -> None:
        """Write the ledger, and what the selector keeps beside it."""
        write_ledger(self.run.ledger, self._ledger_path)
        if self._ledger_path is not None:
            write_files(self.run.selector.files, self._ledger_path.parent)

    def time_share(self) -> float:
        """Return the share of selection in the time of training and selection until now, 0..1."""
        ledger = self.run.ledger
        training = ledger.training_seconds + self.clock.read()
        return ledger.selection_seconds / max(1e-9, ledger.selection_seconds + training)
