"""DataSelection: runs selection rounds inside a Lightning training loop."""

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from liveselect.arguments import check_plain, of_python
from liveselect.callbacks.ahead import Ahead, Pace, check_spread
from liveselect.callbacks.checkpoint_files import install_whole_files
from liveselect.callbacks.compatibility import (
    check_intervals,
    check_rest,
    check_setup,
    count_finished_epoch,
    find_source,
    keep_checkpoints_out_of_windows,
    run_folder,
    warn_inside_window,
)
from liveselect.callbacks.conditions import conditions_of, say_changes, say_late_beginning
from liveselect.callbacks.folder import local_folder, logger_folder
from liveselect.callbacks.lines import say_price, show_lines
from liveselect.callbacks.overhearing import Overhearing, check_overhear
from liveselect.callbacks.progress import round_progress
from liveselect.callbacks.random_state import RandomStates
from liveselect.callbacks.records import log_end, log_round, log_scalars, log_settings, scalars_of
from liveselect.callbacks.session import Session
from liveselect.callbacks.settings import (
    DIGEST,
    as_text,
    check_arguments,
    check_digest,
    check_measures,
    check_saved,
    damage_reported,
    facts_of,
    settings_of,
)
from liveselect.callbacks.training_loss import TrainingLossCheck
from liveselect.callbacks.verdict import Judging, check_contests, check_verdict
from liveselect.decisions import MOST_REJECTED
from liveselect.grammar import Batch, InfluenceEstimator, LossFn, Selector, State
from liveselect.looking import only_looking
from liveselect.losses import causal_lm_loss
from liveselect.parts import digest_of
from liveselect.plan import Plan
from liveselect.rounds import SelectionRun
from liveselect.verdict import Verdict
from liveselect.verdict.arms import tokens_in

STATE_VERSION = 2
"""Version of the checkpoint entry; 1 was that of liveselect 0.1."""


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
    trainer's datamodule to be a :class:`~liveselect.datamodules.SelectionDataModule`. A module with manual
    optimization, of several optimizers for example, declares ``batches_per_step = 1`` where each batch ends a step of
    all of them; settings under which it could not be exact are refused at the start.

    Args:
        selector: decides what to measure and what to train on.
        estimator: measures influence; not needed by selectors that measure nothing.
        every_n_steps: optimizer steps of one round.
        warmup_rounds: rounds at the beginning whose data are drawn uniformly.
        loss_fn: maps ``(module, batch)`` to ``(B,)`` mean losses per example; the default understands Hugging Face
            causal language models and modules that return logits.
        seed: seed of every draw that selection makes.
        dirpath: where ``ledger.jsonl`` is written; by default ``selection/`` in the logger's folder.
        probes_between_steps: measure this many candidates after every optimizer step, for the round to come, instead of
            all of them in one pause between rounds. What is left at the end of the round is measured then. The numbers
            are as old as the steps between; the ledger says how old. Resuming stays exact.
        max_overhead: measure after optimizer steps for up to this share of the time that training takes, and do without
            what was not measured by the end of the round. How much is measured when depends on the machine, so two runs
            differ; a resumed run goes on with what was measured before.
        mixture_sample: hold out this many candidates, drawn uniformly from the whole pool (and no more than a fiftieth
            of it), and note the loss on them at every validation: a choice that helps the reference may ruin what the
            model knows of the rest, and nothing else shows it. 0 for none; by default what the preset has, which is 0
            but for :class:`~liveselect.callbacks.LiveSelection`.
        overhear: score the examples of this many optimizer steps at the beginning of each round out of the steps' own
            backward, at a fraction of what a probe costs; ``every_n_steps`` or more is all of them. The ledger records
            it, and arms and regressors learn from it. Needs an estimator that compares gradients
            with a direction, and at most 1 with rounds that are measured between steps. The numbers of later steps are
            as old as the round.
        training_loss_differs: whether ``training_step`` returns another loss than a mean of ``loss_fn`` deliberately
            (label smoothing, a term beside it). Otherwise the run ends at the first batch, before it is stepped on.
        most_rejected: limit on the rejected candidates that the decisions of a round record, those nearest to being
            chosen; chosen and measured ones are all recorded.
        verdict: find out in the run whether selection beats random data at equal total cost, and act on it; see
            :class:`~liveselect.verdict.Verdict`. Selection then sees a half of the reference set, and the other half
            judges it. Not by default, because of that half.
    """

    own_last_share: float | None = None  # of a round's steps, over which a preset spreads what it measures
    own_mixture_sample = 0  # of a preset; an argument's default would be lost where YAML passes those of every run

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
        training_loss_differs: bool = False,
        most_rejected: int = MOST_REJECTED,
        mixture_sample: int | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        check_plain(DataSelection, locals())
        every_n_steps, warmup_rounds, seed = map(of_python, (every_n_steps, warmup_rounds, seed))
        mixture_sample = self.own_mixture_sample if mixture_sample is None else mixture_sample
        overhear, most_rejected, mixture_sample = map(of_python, (overhear, most_rejected, mixture_sample))
        if mixture_sample < 0:
            raise ValueError(f"expected mixture_sample, a number of candidates, of at least 0, got {mixture_sample}")
        pace = Pace(probes_between_steps, max_overhead) or self._own_pace(estimator, every_n_steps)
        check_arguments(selector, estimator, every_n_steps, warmup_rounds, loss_fn, most_rejected)
        check_spread(estimator, pace, every_n_steps)
        check_overhear(overhear, estimator, is_spread=bool(pace))
        check_measures(selector, estimator)
        self.selector = selector
        self.estimator = estimator
        self.every_n_steps = every_n_steps
        self.warmup_rounds = warmup_rounds
        self.loss_fn = causal_lm_loss if loss_fn is None else loss_fn
        self.seed = seed
        self.dirpath = None if dirpath is None else local_folder(dirpath)
        self.most_rejected = most_rejected
        self.mixture_sample = mixture_sample
        self.ahead = Ahead(pace)
        self.overhearing = Overhearing(int(overhear), self.loss_fn)
        self.training_loss_differs = training_loss_differs
        self._loss_check = TrainingLossCheck(training_loss_differs)
        self._random_states = RandomStates()
        self._conditions: State = {}  # of the checkpoint until training begins
        self.verdict = check_verdict(verdict)
        check_contests(selector, self.verdict, is_spread=bool(pace))
        self._judging = Judging(verdict, seed, warmup_rounds, every_n_steps, self._random_states)
        self._session: Session | None = None  # made in setup, when the data are known

    def _own_pace(self, estimator: InfluenceEstimator | None, every_n_steps: int) -> Pace:
        """Return when rounds are measured where no argument says it."""
        share = self.own_last_share
        if share is None or every_n_steps == 1 or estimator is None or not estimator.spreadable:
            return Pace()
        return Pace(last_share=share)

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name of the one checkpoint entry; the same for all presets."""
        return "DataSelection"

    @property
    def session(self) -> Session:
        """What selection holds from ``setup`` on; raises RuntimeError before."""
        if self._session is None:
            raise RuntimeError("selection has not begun: it is set up by trainer.fit")
        return self._session

    @property
    def run(self) -> SelectionRun:
        """The state of selection; raises RuntimeError before ``setup``."""
        return self.session.run

    @property
    def plan(self) -> Plan | None:
        """What is being trained on, None before the first round."""
        return self.run.plan

    def time_share(self) -> float:
        """Return the share of selection in the time of training and selection until now, 0..1."""
        return self.session.time_share()

    def state_dict(self) -> dict[str, object]:
        """Return the state as tensors and builtins; a collective, which Lightning calls on every rank."""
        if self._session is None:
            return {}
        self.session.gate.wait_until_in_order()
        self.session.charge_training()  # what was trained since the last round belongs to the run, also after a resume
        state = {
            "version": STATE_VERSION,
            "seed": self.seed,
            "settings": as_text(self._settings()),
            "global_batch": self.session.batch_of_round(),
            "conditions": dict(self._conditions),
            "run": self.run.state_dict(),
            "overhearing": self.overhearing.state_dict(self.run),
            "random_states": self._random_states.state_dict(),
            "verdict": self._judging.state_dict(),
        }
        return {**state, DIGEST: digest_of(state)}

    # Lightning refuses two callbacks with state under one key by the name of the second, and asks for other keys; it
    # looks behind what is wrapped, and so leaves two selections to setup, which says what to do
    state_dict.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the state that :meth:`state_dict` described.

        Raises:
            ValueError: it is of another version, or belongs to another pool or other parts.
        """
        if not state_dict:
            return
        keys = {"global_batch", "conditions", "run", "overhearing", "random_states", "verdict"}
        changed = check_saved(state_dict, STATE_VERSION, self.seed, as_text(self._settings()), keys)
        self.overhearing.forget()
        with damage_reported(state_dict):
            self._judging.load_state_dict(state_dict["verdict"])  # first: it says who chooses in the round to come
            self.run.load_state_dict(state_dict["run"])
            self.overhearing.load_state_dict(state_dict["overhearing"], self.estimator)
            self._random_states.load_state_dict(state_dict["random_states"])
        check_digest(state_dict)
        if changed:
            self.run.ahead = None  # measured for the round to come with other settings: it is measured again
        self._conditions = state_dict["conditions"]
        self.session.resumed, self.session.saved_batch = True, state_dict["global_batch"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        """Refuse a checkpoint of a step that this callback has not counted yet; it would train the step again."""
        warn_inside_window(trainer)
        session = self._session
        if session is not None and session.in_batch and trainer.global_step != session.counted_step:
            raise RuntimeError(
                f"a checkpoint of step {trainer.global_step} was written before DataSelection had counted the step's "
                "batch: put DataSelection before the callback that saves in on_train_batch_end"
            )

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: State) -> None:
        """Count the epoch of a checkpoint that was written at its very end."""
        count_finished_epoch(checkpoint)

    # ---- hooks -------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the trainer's settings and take hold of the data."""
        if stage != "fit":
            return
        show_lines()
        check_alone(trainer)
        source = find_source(trainer)
        check_setup(trainer, pl_module)
        if not pl_module.automatic_optimization and self.verdict is not None:
            raise MisconfigurationException(
                "a verdict trains a copy with the steps of the Trainer, and a module with manual optimization steps by "
                "itself: leave out verdict, or use automatic optimization"
            )
        install_whole_files(trainer)
        if self._session is None:
            self._session = Session(self.selector, self.estimator, self.about(), source)
        self._session.use(source, goes_on=trainer.global_step > 0)
        self._session.run.at_random = self._judging.at_random
        self._session.hold_out(self.mixture_sample)
        own = run_folder(trainer) / "selection" if self.dirpath is None else self.dirpath
        apart = self.dirpath is None and logger_folder(trainer) is None
        self._session.write_to(own, apart, self.most_rejected)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the settings to the loggers' configuration, just before Lightning adds the module's and saves it."""
        self._describe(trainer, pl_module)
        log_settings(trainer, self.run.ledger.about)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the first plan, or continue the one of the checkpoint."""
        check_intervals(trainer)
        keep_checkpoints_out_of_windows(trainer)
        session, resumed = self.session, self.session.resumed
        self._random_states.begin_run()
        session.run.source.before_batch = self._random_states.begin_batch
        if not session.resumed:
            self.overhearing.forget()
        self._judging.begin_fit(starts_over=not session.resumed and trainer.global_step == 0)
        session.begin_fit(trainer, pl_module, self.loss_fn)
        self._loss_check.begin_fit()
        self._describe(trainer, pl_module)
        self._judging.begin_training(session, trainer, pl_module)
        if self.plan is not None:
            check_rest(self.plan, session.global_batch(trainer), trainer)
        now = conditions_of(trainer, session.run, self.every_n_steps)
        if resumed:
            say_changes(self._conditions, now, self.plan, session.next_begins(trainer), bool(self.ahead.pace))
        elif trainer.global_step and self.plan is None:
            say_late_beginning(trainer.global_step, self.warmup_rounds)
        self._conditions = now
        with session.measuring():
            self.run.prepare()
            with session.charged("rehearsal"):
                price = session.rehearse(trainer)
        if price is not None:
            say_price(price, self.every_n_steps, self.ahead.pace.max_overhead)
        self.ahead.begin_round(session)
        if self.plan is None or self.plan.exhausted:
            self._select(trainer)
        else:
            session.run.source.follow(self.plan)
            self._judging.go_on(session, trainer)
        session.clock.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Capture the batch, if its step is one of those that are scored."""
        self._random_states.ensure_begun()
        self.session.begin_batch(batch)
        self._loss_check.begin(self.session, batch)
        self.overhearing.begin(trainer, pl_module, batch, self.run, self.session.global_batch(trainer))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Check that the loss is the one that is measured, and that the step can be captured."""
        self._loss_check.compare(trainer, self.session, loss)
        self.overhearing.capture.before_backward(trainer, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the backward has shown."""
        self.overhearing.capture.after_backward(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Advance the plan; at the round's last optimizer step make the next one."""
        self._random_states.end_batch()
        session = self.session
        examples = session.run.source.batch_size * trainer.world_size
        self.overhearing.end(trainer, self.run, examples, session.global_batch(trainer))
        session.charge("overhearing", self.overhearing.take_seconds())
        stepped = session.count_batch(trainer, batch)
        self._judging.after_batch(session, trainer, tokens_in(batch), stepped)
        if session.plan.exhausted and not stepped:
            raise RuntimeError(
                f"the plan of round {session.plan.round} ended inside an accumulation window at batch {batch_idx}: "
                "accumulate_grad_batches must not change within a round"
            )
        if stepped and not session.plan.exhausted:
            self.ahead.after_step(session, trainer)
        if stepped:
            session.end_step()  # what waits may save now, or end the run
        if session.plan.exhausted and trainer.global_step < trainer.estimated_stepping_batches:
            session.stop_training()
            self._select(trainer)
            session.clock.start()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the training clock: validation is neither training nor selection."""
        if self._session is not None:
            self._session.stop_training()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the model's metrics beside what was spent so far."""
        if trainer.sanity_checking or self._session is None or trainer.state.fn != TrainerFn.FITTING:
            return
        # a loader that draws its seed moves the global state; a run resumed from the checkpoint of this very step does
        # not validate again, and would go on with other random numbers
        self._random_states.put_back()
        metrics = scalars_of(trainer.callback_metrics)
        with self.session.measuring():
            mixture = self.session.mixture_loss()
        if mixture is not None:
            metrics["mixture_loss"] = mixture
            log_scalars(trainer, {"mixture_loss": mixture})
        self.run.ledger.evaluate(trainer.global_step, metrics)
        self.session.write_ledger()
        self.session.clock.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the final ledger and say what selection cost."""
        self.session.gate.remove()
        self.session.stop_training()
        self.run.ledger.finished = True
        self.session.write_ledger()
        log_end(trainer, self.run.ledger, self.plan)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the signal handlers back, and let others have the folder."""
        if self._session is not None:
            self._session.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the signal handlers back, and let others have the folder, however the run has ended."""
        if self._session is not None:
            self._session.release()

    # ---- a round -----------------------------------------------------------------------------------------------

    def _select(self, trainer: pl.Trainer) -> None:
        """Run a round and publish its plan."""
        session, run = self.session, self.run
        began, before = time.perf_counter(), 0.0 if run.ahead is None else sum(run.ahead.meter.seconds.values())
        before += sum(run.preparing.seconds.values())
        budget = session.budget(trainer, trainer.global_step)
        selector = type(run.selector_for(run.next_round)).__name__
        progress = round_progress(f"round {run.next_round} ({selector}, step {trainer.global_step})", trainer)
        round = session.open_round(trainer, budget)
        with session.measuring():
            plan = self.ahead.finish(session, round, budget, progress)
        run.source.follow(plan)
        self._judging.begin_round(session, trainer)
        log_round(trainer, run.ledger)
        counted = sum(run.ledger.rounds[-1].seconds.values()) - before  # by name; the rest is selection's as well
        session.charge("bookkeeping", max(0.0, time.perf_counter() - began - counted))
        session.write_ledger()
        self.ahead.begin_round(session)

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with only_looking("the settings of selection could not be recorded"):
            self.session.describe({**self._settings(), **facts_of(trainer, pl_module, self.run.source)})

    def _settings(self) -> dict[str, object]:
        reference = None if self._session is None else self.run.source.reference_fingerprint
        return self.settings_with(reference)

    def settings_with(self, reference: str | None) -> dict[str, object]:
        """Return what a resumed run should not change without noticing; the pool and the seed are looked at apart.

        ``reference`` identifies the reference set.
        """
        return settings_of(
            {
                "selector": self.selector,
                "estimator": self.estimator,
                "loss_fn": self.loss_fn,
                "every_n_steps": self.every_n_steps,
                "warmup_rounds": self.warmup_rounds,
                "probes_between_steps": self.ahead.pace.probes_between_steps,
                "max_overhead": self.ahead.pace.max_overhead,
                "overhear": self.overhearing.steps,
                "verdict": self.verdict,
                "most_rejected": self.most_rejected,
                "mixture_sample": self.mixture_sample,
                "reference set": reference,
            }
        )

    def about(self) -> dict[str, object]:
        """Return what the ledger says of the run first: who measures, who chooses, and how often."""
        return {
            "preset": type(self).__name__,
            "selector": type(self.selector).__name__,
            "estimator": None if self.estimator is None else type(self.estimator).__name__,
            **{name: getattr(self, name) for name in ("every_n_steps", "warmup_rounds", "seed")},
        }


def check_alone(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException when more than one selection is among the callbacks of a Trainer."""
    found = [type(each).__name__ for each in trainer.callbacks if isinstance(each, DataSelection)]  # type: ignore[attr-defined]
    if len(found) > 1:
        raise MisconfigurationException(
            f"expected one selection in a Trainer, got {' and '.join(found)}: they would choose the same batches. Keep "
            "one of them; a YAML file names it under `select` or among trainer.callbacks, not in both"
        )
