"""Measuring for the round to come, between the optimizer steps of this one, and what is left of it in a pause."""

import logging
import math
import warnings
from dataclasses import dataclass

from lightning.pytorch.utilities.exceptions import SIGTERMException

from liveselect import distributed
from liveselect.callbacks.session import Session, Steps
from liveselect.cost import Progress
from liveselect.grammar import InfluenceEstimator, Round, RoundInterruptedError, SelectionWarning
from liveselect.ledger import Ledger
from liveselect.measurement import Measurement
from liveselect.plan import Plan
from liveselect.rounds import finish_round, run_round

log = logging.getLogger("liveselect")

FIXED_SHARE = 0.5
"""Of ``max_overhead``: what fits and the ends of rounds may take of it before rounds become longer."""

MOST_REPAID_SHARE = 0.5
"""Of a round's share: what is saved in it of what earlier rounds have spent too much."""

LEAST_LAST_STEPS = 4
"""Steps over which a round is spread where it is over the last ones: two for a fit, two for candidates."""

PART_OF_STEP = 0.25
"""Examples of a part of a fit beside those of a training step, each of which costs as much."""

PAUSE_SHARE = 0.01
"""Of a round's time: what a training step may be held up by measuring, unless a single candidate takes longer."""


@dataclass(frozen=True)
class Pace:
    """A number of candidates after each step, or a share of the time, or the last steps; none is all between rounds.

    Attributes:
        probes_between_steps: candidates that all ranks together measure after every optimizer step.
        max_overhead: share of the training time that measuring may take.
        last_share: share of a round's steps, the last ones, over which all is spread: what is measured is then a few
            steps old, and no step is held up for long.
    """

    probes_between_steps: int | None = None
    max_overhead: float | None = None
    last_share: float | None = None

    def __post_init__(self) -> None:
        probes, share = self.probes_between_steps, self.max_overhead
        if probes is not None and (not isinstance(probes, int) or probes < 1):
            raise ValueError(f"expected probes_between_steps of at least 1, or None, got {probes}")
        if share is not None and not 0 < share < math.inf:
            raise ValueError(f"expected max_overhead, a share of the training time, above 0, got {share}")
        if share is not None and share > 1:
            warnings.warn(
                f"max_overhead={share:g} lets selection take {share:g} times as long as training: it is a share, and "
                "0.1 is a tenth",
                SelectionWarning,
                stacklevel=2,
            )
        if probes is not None and share is not None:
            raise ValueError("expected probes_between_steps or max_overhead, got both: each says how much is measured")

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.probes_between_steps, self.max_overhead, self.last_share))

    def is_early(self, steps: int, left: int) -> bool:
        """Return whether nothing is measured yet where ``left`` of the ``steps`` of a round are still to come."""
        return self.last_share is not None and left > max(LEAST_LAST_STEPS, math.ceil(self.last_share * steps))

    def affordable(self, ahead: Measurement, left: float, longest_pause: float = math.inf) -> int:
        """Return how many candidates all ranks may measure now, when ``left`` seconds may be spent; a collective.

        Rank 0's clock decides, so that the ranks do the same number of collective operations.

        Args:
            ahead: what was measured for the round to come.
            left: seconds that may be spent on it now.
            longest_pause: seconds that the training step may be held up, where a candidate costs less.
        """
        if self.probes_between_steps is not None:
            return self.probes_between_steps
        spent = sum(ahead.meter.seconds.values())
        number = distributed.world_size()  # the first ones show what one costs
        if ahead.measured and spent:
            number = math.floor(left * ahead.measured / spent)
            number = min(number, max(distributed.world_size(), math.floor(longest_pause * ahead.measured / spent)))
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


@dataclass
class Governor:
    """Keeps selection's share of the time at ``max_overhead`` over the run.

    All that selection takes counts, choosing and records included: what a round has spent too much, the first one for
    instance, which measures in one pause, is saved in the rounds after it. A round's end costs something even where
    nothing is measured: that is put aside while the round is trained on. Where it and the estimator's fit, without
    which nothing is measured, would take more than half of the share, rounds become longer, since nothing else can be
    left out. A fit may grow with the round, and then longer rounds do not make it cheaper: the shortest one counts.

    Args:
        share: of selection in the time of training.

    Attributes:
        fixed: seconds that the end of the last round took, without measuring.
        trained_before: seconds of training when the present round began.
        spent_before: seconds of selection then.
        shortest_fit: seconds, 0 before the first.
    """

    share: float
    fixed: float = 0.0
    trained_before: float = 0.0
    spent_before: float = 0.0
    shortest_fit: float = 0.0

    def left(self, trained: float, spent: float, progress: float) -> float:
        """Return the seconds that may be spent on measuring now, below 0 for none.

        What earlier rounds have saved counts up to a round's share, so that no round makes up for many, and what they
        have spent too much up to half of it, so that something can be measured in every round.

        Args:
            trained: seconds of training so far.
            spent: seconds of selection so far.
            progress: share of the present round that was trained on, 0..1.
        """
        earned = self.share * (trained - self.trained_before)
        saved = self.share * self.trained_before - self.spent_before
        saved = max(min(saved, earned), -MOST_REPAID_SHARE * earned)
        return saved + earned - (spent - self.spent_before) - self.fixed * progress

    def begin_round(self, trained: float, spent: float, finishing: float, fitting: float = 0.0) -> float:
        """Begin a round, and return how many times as long as the one that has ended rounds should be.

        Args:
            trained: seconds of training so far.
            spent: seconds of selection so far.
            finishing: seconds that the end of the last round took, without measuring; 0 where it measured in a pause.
            fitting: seconds of the estimator's fits for it; 0 for none.
        """
        round_seconds = trained - self.trained_before
        self.trained_before, self.spent_before, self.fixed = trained, spent, finishing
        if fitting:
            self.shortest_fit = min(fitting, self.shortest_fit or fitting)
        least = finishing + self.shortest_fit
        return least / (FIXED_SHARE * self.share * round_seconds) if round_seconds > 0 else 1.0


class Ahead:
    """Measures at the pace that is set, and finishes the round.

    Args:
        pace: how much is measured between steps.
    """

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.governor = None if pace.max_overhead is None else Governor(pace.max_overhead)
        self._round: Round | None = None  # the one to come, opened at the first step that measures for it
        self._before_finish: float | None = None  # seconds of selection when the last round's end began
        self._fitting = 0.0  # seconds of fits for the last round

    def begin_round(self, session: Session) -> None:
        """Begin to count the training of a round, and set the length of the next one where a share is kept."""
        self._round = None
        governor, ledger = self.governor, session.run.ledger
        if governor is None:
            return
        spent = _spent_in_run(ledger)
        finishing = 0.0 if self._before_finish is None else spent - self._before_finish
        wanted = governor.begin_round(ledger.training_seconds, spent, finishing, self._fitting)
        self._before_finish, self._fitting = None, 0.0
        if finishing and len(ledger.rounds) > 1:
            steps = ledger.rounds[-2].chosen / session.model.global_batch  # of the round that has ended
            wanted = float(distributed.gather_objects(wanted)[0]) * steps
            takes = f"a fit takes {governor.shortest_fit:.2g} s and its end {finishing:.2g} s"
            session.stretch_rounds(wanted, f"{takes}, and max_overhead={governor.share:g}")

    def after_step(self, session: Session, steps: Steps) -> None:
        """Measure a little for the round to come, if there will be one that measures."""
        run, begins = session.run, session.next_begins(steps)
        if not self.pace or not run.measures:
            return
        if begins >= steps.estimated_stepping_batches or (run.ahead is not None and run.ahead.complete):
            return
        batch = session.model.global_batch
        if self.pace.is_early(-(-len(session.plan.ids) // batch), begins - steps.global_step):
            return
        session.stop_training()
        if run.ahead is None:
            run.ahead = run.measurement()
        if self._round is None:
            self._round = session.open_round(steps, session.budget(steps, begins))
        limit, part = self._limit(session, begins - steps.global_step)
        if limit:
            with session.measuring():
                _advance(run.ahead, session, session.at_step(self._round, steps), limit, part)
            run.ledger.ahead_seconds = sum(run.ahead.meter.seconds.values())
            run.ledger.ahead_flops = sum(run.ahead.meter.flops.values()) * steps.world_size
        session.clock.start()

    def _limit(self, session: Session, steps: int) -> tuple[int, int | None]:
        """Return how many candidates are measured now, and examples of a part of a fit, ``steps`` before the round."""
        ahead = session.run.ahead
        if ahead is None or self.pace.last_share is None:
            return (0 if ahead is None else self.pace.affordable(ahead, *self._left(session))), None
        todo = len(ahead.questions[-1].todo) if ahead.questions else 0
        # all that is left of the fit is done after the last step but one, and nothing of it in the pause at the end
        part = max(1, int(PART_OF_STEP * session.model.global_batch)) if steps > 1 else None
        return max(1, -(-todo // max(1, steps))), part

    def _left(self, session: Session) -> tuple[float, float]:
        """Return the seconds that may be spent on measuring now, and those that a step may be held up."""
        if self.governor is None:
            return 0.0, math.inf
        ledger, plan = session.run.ledger, session.plan
        progress = plan.cursor / max(1, len(plan.ids))
        in_round = ledger.training_seconds - self.governor.trained_before
        left = self.governor.left(ledger.training_seconds, _spent_in_run(ledger), progress)
        steps = ledger.rounds[-1].chosen / session.model.global_batch
        pause = max(PAUSE_SHARE, 2 * self.governor.share / steps)  # short rounds have few steps to spread it over
        return left, pause * in_round / max(progress, 1e-9)

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
            self._before_finish, self._fitting = _spent_in_run(run.ledger), ahead.fit_seconds
            missing = ahead.cut(round)
        else:
            _advance(ahead, session, round)
        plan = finish_round(run, ahead, model, round, budget)
        if limited and not ahead.measured:
            run.ledger.rounds[-1].notes.append(
                f"no candidates were measured within max_overhead={self.pace.max_overhead}: choosing and recording "
                "take all of it"
            )
        elif missing:
            run.ledger.rounds[-1].notes.append(
                f"{missing} of {missing + ahead.measured} candidates were not measured within max_overhead="
                f"{self.pace.max_overhead}"
            )
        return plan


def _spent_in_run(ledger: Ledger) -> float:
    """Return the seconds of selection in the run, without what was spent before it."""
    return ledger.selection_seconds - sum(ledger.before_seconds.values())


def _advance(
    ahead: Measurement, session: Session, round: Round, limit: int | None = None, fit_examples: int | None = None
) -> None:
    try:
        ahead.advance(session.model, round, limit, fit_examples)
    except RoundInterruptedError as stopped:
        log.info("%s: the run ends now, and continues from its last checkpoint", stopped)
        raise SIGTERMException from stopped
