"""The verdict inside a Lightning run: takes its look-aheads, says what they show, and acts on it."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from liveselect import distributed
from liveselect.callbacks.clipping import silent
from liveselect.callbacks.random_state import RandomStates
from liveselect.callbacks.records import log_verdict
from liveselect.callbacks.session import Session
from liveselect.cost import CostMeter
from liveselect.functional.confidence import MIN_VALUES
from liveselect.grammar import Contest, LiveModel, RoundInterruptedError, SelectionWarning, Selector, State
from liveselect.ledger import Ledger
from liveselect.plan import Plan
from liveselect.preserve import Snapshot
from liveselect.verdict import Verdict
from liveselect.verdict.answer import HELD_OUT, Answer, Costs
from liveselect.verdict.arms import TrainingSteps
from liveselect.verdict.looking import LookAhead
from liveselect.verdict.sets import HalfReference

log = logging.getLogger("liveselect")

PHASE = "look-ahead"
CONTEST = "contest"

_SPENT_ONCE = ("check data", "rehearsal")
_MOST_RESTARTS = 3
"""Of one look-ahead, for signals: those that come again and again would keep training from going on."""


def check_verdict(verdict: object) -> Verdict | None:
    """Return what was passed as a verdict; raise TypeError where it is none."""
    if verdict is not None and not isinstance(verdict, Verdict):
        raise TypeError(f"expected verdict to be a liveselect.verdict.Verdict or None, got {verdict!r}")
    return verdict


def check_contests(selector: Selector, verdict: Verdict | None, is_spread: bool) -> None:
    """Raise ValueError where a selector whose policies compete could not hold a contest."""
    if not selector.has_contests:
        return
    if verdict is None:
        raise ValueError(
            f"{type(selector).__name__} lets policies compete on a held-out half of the reference set, which a verdict "
            "sets aside: pass verdict=Verdict()"
        )
    if is_spread:
        raise ValueError(
            f"{type(selector).__name__} chooses its policy when a round has ended, so nothing can be measured for the "
            "next one before: leave out probes_between_steps and max_overhead"
        )


class Judging:
    """The verdict of a run, as the selection callback calls it; nothing where none is asked for.

    Args:
        settings: of the verdict, None for none.
        seed: of the run's selection.
        warmup_rounds: of the run.
        every_n_steps: of the run.
        random_states: those with which the next batch will begin.
    """

    def __init__(
        self,
        settings: Verdict | None,
        seed: int,
        warmup_rounds: int,
        every_n_steps: int,
        random_states: RandomStates,
    ) -> None:
        self._look = None if settings is None else LookAhead(settings, seed, warmup_rounds, every_n_steps)
        self._seed = seed
        self._random_states = random_states
        self._steps: TrainingSteps | None = None  # None also where the run cannot find out
        self._restarts = 0
        self._warned = False

    def at_random(self, round_index: int) -> bool:
        """Return whether a round is drawn at random although the warm-up is over."""
        return self._look is not None and self._look.at_random(round_index)

    def state_dict(self) -> State | None:
        """Return the state, None where no verdict is asked for."""
        return None if self._look is None else self._look.state_dict()

    def load_state_dict(self, state: State | None) -> None:
        """Restore the state; that of a run without a verdict, or for one, is left alone."""
        if self._look is not None and state is not None:
            self._look.load_state_dict(state)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def begin_fit(self, starts_over: bool) -> None:
        """Begin with nothing known, unless the fit continues another one."""
        if self._look is not None and starts_over:
            self._look.forget()
        self._steps = None

    def begin_training(self, session: Session, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set a half of the reference set aside, or say why the run cannot find out."""
        look, run = self._look, session.run
        run.shown = None
        if look is None:
            return
        obstacle = _obstacle(session)
        if obstacle is None and not look.sets(run.source)[HELD_OUT]:
            obstacle = "the reference set has fewer than two examples, so no half of it can be held out"
        if obstacle is not None:
            self._give_up(session, trainer, obstacle)
            return
        run.shown = HalfReference(run.source, self._seed)
        self._steps = replace(
            training_steps(trainer, pl_module, self._random_states, lambda: self._interrupted(session)),
            flops=session.flops_of,
        )
        total, window = trainer.estimated_stepping_batches, trainer.accumulate_grad_batches
        if look.answer is None and trainer.is_global_zero:
            share, number = look.settings.share, look.looks_affordable(total, window)
            few = (
                f", too few for an answer, which takes at least {MIN_VALUES}: raise share"
                if number < MIN_VALUES
                else ""
            )
            log.info(
                "verdict: look-aheads of %d steps, about %.0f of them in this run of %g steps at share=%g%s",
                *(look.settings.length(total), number, total, share, few),
            )

    def go_on(self, session: Session, trainer: pl.Trainer) -> None:
        """Begin the look-ahead that a checkpoint was written before, if it was interrupted."""
        look = self._look
        if look is None or self._steps is None:
            return
        if look.to_begin == trainer.global_step:
            self._begin(session, trainer)
        if look.contest_to_begin == trainer.global_step:
            self._begin_contest(session, trainer)

    def begin_round(self, session: Session, trainer: pl.Trainer) -> None:
        """Begin a look-ahead with the round that was chosen, if one is due."""
        look, steps = self._look, self._steps
        if look is None or steps is None:
            return
        index, step, total = session.plan.round, trainer.global_step, trainer.estimated_stepping_batches
        look.begin_block(index, step, total)
        # ranks may have seen unequally many tokens
        is_due = distributed.gather_objects(look.is_due(index, step, total, steps.accumulate))[0]
        run, whole = session.run, len(session.plan.ids) // session.model.global_batch
        if run.selector_for(index) is run.selector and run.selector.contestants() and step + whole <= total:
            look.contest_to_begin = step
        if is_due:
            self._begin(session, trainer)
        if look.contest_to_begin == step:
            self._begin_contest(session, trainer)

    def after_batch(self, session: Session, trainer: pl.Trainer, tokens: int, stepped: bool) -> None:
        """Follow the arm that trains on chosen data; at its end, give the verdict and act on it."""
        look, steps = self._look, self._steps
        if look is None or steps is None:
            return
        look.note_batch(tokens)
        if not stepped or not look.watches(trainer.global_step):
            return
        with self._charged(session) as model, session.measuring():
            ended = look.after_step(model, session.run.source, trainer.global_step)
        self._end_contests(look, session, trainer)
        if not ended:
            return
        session.charge_training()
        before = look.answer
        answer = look.judge(
            _costs(session.run.ledger, look.settings, trainer),
            trainer.global_step,
            trainer.estimated_stepping_batches,
            steps.accumulate,
        )
        look.answer = answer = distributed.gather_objects(answer)[0]
        session.run.ledger.verdict = answer.record()
        log_verdict(trainer, answer, is_new=before is None or before.said != answer.said)
        self._act(session, trainer, answer)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _begin(self, session: Session, trainer: pl.Trainer) -> None:
        look, steps, run = self._look, self._steps, session.run
        if look is None or steps is None:
            return
        count = look.settings.length(trainer.estimated_stepping_batches) * session.model.global_batch
        candidates = run.pool.available(1, run.ever_eligible(1))
        if len(candidates) < count:  # the draw of a pass goes on with what was used
            mask = run.ever_eligible(1)
            candidates = torch.arange(run.pool.size) if mask is None else mask.nonzero().flatten()
        place = session.plan.round, trainer.global_step, trainer.estimated_stepping_batches
        self._train_copies(
            session, trainer, PHASE, lambda model: look.begin(model, steps, run.source, candidates, *place)
        )

    def _begin_contest(self, session: Session, trainer: pl.Trainer) -> None:
        look, steps, run = self._look, self._steps, session.run
        if look is None or steps is None:
            return
        contestants, place = run.selector.contestants(), (session.plan.round, trainer.global_step)
        if contestants:
            self._train_copies(
                session,
                trainer,
                CONTEST,
                lambda model: look.begin_contest(model, steps, run.source, contestants, *place),
            )

    def _end_contests(self, look: LookAhead, session: Session, trainer: pl.Trainer) -> None:
        """Let the selector observe the contests that have ended."""
        ledger = session.run.ledger
        while look.contests:
            window, own = look.contests.pop()
            session.charge_training()
            steps = window.end - window.begun
            share = steps / trainer.global_step
            contest = Contest(
                window.begun,
                steps,
                window.rivals or {},
                own,
                ledger.training_flops * share,
                ledger.training_seconds * share,
            )
            session.run.selector.observe_contest(distributed.gather_objects(contest)[0])

    def _train_copies(
        self, session: Session, trainer: pl.Trainer, phase: str, train: Callable[[LiveModel], None]
    ) -> None:
        """Train copies, again from the start where a signal has come between; give the verdict up where that fails."""
        look, self._restarts = self._look, 0
        while look is not None:
            try:
                with self._charged(session, phase) as model, session.measuring():
                    train(model)
                return
            except RoundInterruptedError as stopped:
                self._restarts += 1
                session.gate.deliver()
                if trainer.received_sigterm:
                    log.info("%s: the run ends now, and continues from its last checkpoint", stopped)
                    raise SIGTERMException from stopped
            except Exception as error:  # what only looks must not end the training
                if distributed.world_size() > 1:  # the other ranks would wait for this one
                    raise
                look.to_begin = look.contest_to_begin = None
                self._give_up(session, trainer, f"a {phase} failed: {error}")
                return

    def _interrupted(self, session: Session) -> bool:
        """Return whether a signal waits; only those that end the run, where others have come too often to get on."""
        gate = session.gate
        return gate.waits if self._restarts < _MOST_RESTARTS else gate.waits_to_end

    def _give_up(self, session: Session, trainer: pl.Trainer, reason: str) -> None:
        self._steps = None
        session.run.ledger.verdict = Answer("cannot tell yet", trainer.global_step, reason=reason).record()
        rank_zero_warn(
            f"whether selection pays cannot be found out in this run: {reason}. Selection itself goes on",
            category=SelectionWarning,
        )

    def _act(self, session: Session, trainer: pl.Trainer, answer: Answer) -> None:
        look, run = self._look, session.run
        if answer.said != "not paying" or look is None:
            return
        action = look.settings.on_not_paying
        if not self._warned:
            then = {"warn": "", "random": ". The rounds to come are drawn at random", "stop": ". Training stops"}
            rank_zero_warn(f"selection does not pay. {answer.sentence()}{then[action]}", category=SelectionWarning)
        self._warned = True
        if action == "stop":
            trainer.should_stop = True
        elif action == "random" and look.random_from is None:
            look.random_from = run.next_round
            if run.ahead is not None:
                session.charge("abandoned measurement", run.ledger.ahead_seconds)
                run.ahead, run.ledger.ahead_seconds = None, 0.0

    @contextmanager
    def _charged(self, session: Session, phase: str = PHASE) -> Iterator[LiveModel]:
        """Yield the live model with a meter whose seconds and FLOPs the last round's record gets."""
        meter, began = CostMeter(), time.perf_counter()
        try:
            yield replace(session.model, meter=meter)
        finally:
            record = session.run.ledger.rounds[-1]
            if meter.seconds:
                seconds = time.perf_counter() - began
                session.clock.discount(seconds)
                record.seconds[phase] = record.seconds.get(phase, 0.0) + seconds
            flops = sum(meter.flops.values()) * distributed.world_size()
            if flops:
                record.flops[phase] = record.flops.get(phase, 0.0) + flops


def _obstacle(session: Session) -> str | None:
    """Return why a copy of this training cannot be trained and thrown away, None where it can."""
    model, source = session.model, session.run.source
    if model.view.in_parts:
        return (
            "ranks hold parts of the parameters (FSDP), and a look-ahead copies whole ones: train with DDP, or compare "
            "two runs with `liveselect report`"
        )
    if source.training_batches(Plan(0, torch.empty(0, dtype=torch.int64))) is None:
        return f"{type(source).__name__} does not serve training batches for a copy: define training_batches"
    try:
        Snapshot(model.module, model.optimizer)
    except TypeError as error:
        return str(error)
    return None


def _costs(ledger: Ledger, settings: Verdict, trainer: pl.Trainer) -> Costs:
    """Return what selection costs as shares of training, look-aheads and contests included.

    What was spent once counts as a share of the whole run.
    """
    if settings.cost == "seconds":
        once = sum(ledger.before_seconds.values()) + sum(ledger.around_seconds.get(name, 0.0) for name in _SPENT_ONCE)
        whole, training = ledger.selection_seconds, ledger.training_seconds
    else:
        once = sum(ledger.before_flops.values())
        whole, training = ledger.selection_flops, ledger.training_flops
    if not training:
        return Costs(float("nan"))
    done = trainer.global_step / trainer.estimated_stepping_batches  # 0 in a run without an end
    return Costs((whole - once) / training, once / training * (done or 1.0), once / training * trainer.global_step)


def training_steps(
    trainer: pl.Trainer, pl_module: pl.LightningModule, random_states: RandomStates, interrupted: Callable[[], bool]
) -> TrainingSteps:
    """Return how the Trainer takes its training steps, for a copy that takes them on other data."""
    window = trainer.accumulate_grad_batches
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)

    def loss(batch: object, index: int) -> Tensor | None:
        moved = trainer.precision_plugin.convert_input(batch)
        moved = pl_module._on_before_batch_transfer(moved, dataloader_idx=0)
        moved = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
        with trainer.precision_plugin.train_step_context():
            found = pl_module.training_step(moved, index) if takes_index else pl_module.training_step(moved)
        return cast("Tensor | None", found["loss"] if isinstance(found, dict) else found)

    def after_step(index: int) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready + (index + 1) * window
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau and done % config.frequency == 0:
                pl_module.lr_scheduler_step(config.scheduler, None)

    @contextmanager
    def as_training() -> Iterator[None]:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        states = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        with ExitStack() as stack:
            stack.enter_context(silent(pl_module))
            random_states.set_as_next_batch()
            try:
                yield
            finally:
                for scheduler, state in zip(schedulers, states, strict=True):
                    scheduler.load_state_dict(state)

    return TrainingSteps(loss, window, after_step, as_training, interrupted)
