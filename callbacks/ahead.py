"""Measuring for the round to come, between the optimizer steps of this one, and what is left of it in a pause."""

import logging
import math
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException

from liveselect import distributed
from liveselect.callbacks.session import Session
from liveselect.cost import Progress
from liveselect.grammar import InfluenceEstimator, Round, RoundInterruptedError
from liveselect.measurement import Measurement
from liveselect.plan import Plan
from liveselect.rounds import finish_round, run_round

log = logging.getLogger("liveselect")


@dataclass(frozen=True)
class Pace:
    """Either a number of candidates after every step, or a share of the time; neither means all between rounds.

    Attributes:
        probes_between_steps: candidates that all ranks together measure after every optimizer step.
        max_overhead: share of the training time that measuring may take.
    """

    probes_between_steps: int | None = None
    max_overhead: float | None = None

    def __post_init__(self) -> None:
        probes, share = self.probes_between_steps, self.max_overhead
        if probes is not None and (not isinstance(probes, int) or probes < 1):
            raise ValueError(f"expected probes_between_steps of at least 1, or None, got {probes}")
        if share is not None and not 0 < share < math.inf:
            raise ValueError(f"expected max_overhead, a share of the training time, above 0, got {share}")
        if probes is not None and share is not None:
            raise ValueError("expected probes_between_steps or max_overhead, got both: each says how much is measured")

    def __bool__(self) -> bool:
        return self.probes_between_steps is not None or self.max_overhead is not None

    def affordable(self, ahead: Measurement, trained: float) -> int:
        """Return how many candidates all ranks may measure now, after ``trained`` seconds of the round; a collective.

        Rank 0's clock decides, so that the ranks do the same number of collective operations.
        """
        if self.probes_between_steps is not None:
            return self.probes_between_steps
        spent = sum(ahead.meter.seconds.values())
        left = (self.max_overhead or 0.0) * trained - spent
        number = distributed.world_size()  # the first ones show what one costs
        if ahead.measured:
            number = math.floor(left * ahead.measured / spent) if spent else number
        return int(distributed.gather_objects(number if left > 0 else 0)[0])


def check_spread(estimator: InfluenceEstimator | None, pace: Pace, every_n_steps: int) -> None:
    """Raise ValueError for rounds that cannot be measured between training steps, if that is asked."""
    if pace and every_n_steps == 1:
        raise ValueError(
            "with every_n_steps=1 there are no steps between which a round could be measured: leave out "
            "probes_between_steps and max_overhead, or make rounds longer"
        )
    if pace and estimator is not None and not estimator.spreadable:
        raise ValueError(
            f"{type(estimator).__name__} measures from one state of the model, so its rounds cannot be spread over "
            "training steps: leave out probes_between_steps and max_overhead, or take another estimator"
        )


class Ahead:
    """Measures at the pace that is set, and finishes the round.

    Args:
        pace: how much is measured between steps.
    """

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._round: Round | None = None  # the one to come, opened at the first step that measures for it
        self._trained_before = 0.0  # seconds of training when the present round began

    def begin_round(self, session: Session) -> None:
        """Begin to count the training of a round."""
        self._round, self._trained_before = None, session.run.ledger.training_seconds

    def after_step(self, session: Session, trainer: pl.Trainer) -> None:
        """Measure a little for the round to come, if there will be one that measures."""
        run, begins = session.run, session.next_begins(trainer)
        if not self.pace or not run.measures:
            return
        if begins >= trainer.estimated_stepping_batches or (run.ahead is not None and run.ahead.complete):
            return
        session.stop_training()
        if run.ahead is None:
            run.ahead = run.measurement()
        if self._round is None:
            self._round = session.open_round(trainer, session.budget(trainer, begins))
        trained = run.ledger.training_seconds - self._trained_before
        if limit := self.pace.affordable(run.ahead, trained):
            with session.measuring():
                _advance(run.ahead, session, session.at_step(self._round, trainer), limit)
            run.ledger.ahead_seconds = sum(run.ahead.meter.seconds.values())
            run.ledger.ahead_flops = sum(run.ahead.meter.flops.values()) * trainer.world_size
        session.clock.start()

    def finish(self, session: Session, round: Round, budget: int, progress: Progress) -> Plan:
        """Run the round, or what was not measured of it between the steps before, unless that is limited."""
        run, model, missing = session.run, session.model, 0
        if not run.measures:
            round.meter.progress = progress
            return run_round(run, model, round, budget)
        limited = run.ahead is not None and self.pace.max_overhead is not None
        if run.ahead is None:  # a part of the run's state, so that a checkpoint on an interruption goes on from it
            run.ahead = run.measurement()
        ahead = run.ahead
        ahead.meter.progress = progress
        if limited:
            missing = ahead.cut(round)
        else:
            _advance(ahead, session, round)
        plan = finish_round(run, ahead, model, round, budget)
        if missing:
            run.ledger.rounds[-1].notes.append(
                f"{missing} of {missing + ahead.measured} candidates were not measured within max_overhead="
                f"{self.pace.max_overhead}"
            )
        return plan


def _advance(ahead: Measurement, session: Session, round: Round, limit: int | None = None) -> None:
    try:
        ahead.advance(session.model, round, limit)
    except RoundInterruptedError as stopped:
        log.info("%s: the run ends now, and continues from its last checkpoint", stopped)
        raise SIGTERMException from stopped
