"""What the Trainer was set to, so that a resumed run can say what has changed, and what that means."""

import logging
import math

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from liveselect.grammar import SelectionWarning, State
from liveselect.plan import Plan
from liveselect.rounds import SelectionRun

log = logging.getLogger("liveselect")

_SIZES = ("batch_size", "accumulate_grad_batches", "ranks")
"""What the examples of an optimizer step are the product of."""


def conditions_of(trainer: pl.Trainer, run: SelectionRun, every_n_steps: int) -> State:
    """Return what training and rounds depend on beside the settings of selection, as builtins.

    ``ends`` is the step at which training ends, -1 for none; ``whole_round`` the candidates of a whole round, 0 where
    a selector follows recorded plans, which may be cut anywhere.
    """
    ends = trainer.estimated_stepping_batches
    sizes = {
        "batch_size": run.source.batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "ranks": trainer.world_size,
    }
    return {
        **sizes,
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm),
        "ends": int(ends) if math.isfinite(ends) else -1,
        "whole_round": every_n_steps * math.prod(sizes.values()) if run.selector.engine_orders else 0,
    }


def say_changes(before: State, now: State, plan: Plan | None, next_begins: int, is_spread: bool) -> None:
    """Say what differs between a checkpoint and the run that goes on from it, in a line each.

    Args:
        before: of the checkpoint; empty when it was written before training began.
        now: of this run.
        plan: of the checkpoint.
        next_begins: the step at which the next round begins.
        is_spread: whether rounds are measured between the steps of the rounds before.
    """
    if not before:
        return
    old, new = (math.prod(each[name] for name in _SIZES) for each in (before, now))
    if sizes := "; ".join(
        f"{name} was {before[name]} and is {now[name]}" for name in _SIZES if before[name] != now[name]
    ):
        rank_zero_warn(
            f"the run is resumed with {new} examples in an optimizer step ({sizes}), the checkpoint was written with "
            + (
                "as many: the same candidates are trained on, and weights differ by rounding and dropout"
                if old == new
                else f"{old}: training differs from the original run, and rounds to come hold other candidates"
            ),
            category=SelectionWarning,
        )
    if before["precision"] != now["precision"]:
        rank_zero_warn(
            f"the run is resumed with precision {now['precision']}, the checkpoint was written with "
            f"{before['precision']}: training and measuring are rounded otherwise from here on",
            category=SelectionWarning,
        )
    if clipping := [
        f"{name} {before[name]}, now {now[name]}"
        for name in ("gradient_clip_val", "gradient_clip_algorithm")
        if before[name] != now[name]
    ]:
        rank_zero_warn(
            f"the run is resumed with other clipping than that of the checkpoint ({'; '.join(clipping)}): steps, and "
            "the steps that are measured, differ from those of the original run",
            category=SelectionWarning,
        )
    if plan is not None and _ends(before) < _ends(now):
        lacks_ahead = is_spread and plan.cursor > 0 and next_begins >= _ends(before)
        _say_later_end(before, now, plan, lacks_ahead)


def say_late_beginning(step: int, warmup_rounds: int) -> None:
    """Say that a checkpoint without selection is gone on from."""
    rank_zero_warn(
        f"training goes on from step {step}, and the checkpoint holds no state of selection: selection begins here, "
        f"with {warmup_rounds} warm-up round{'s' * (warmup_rounds != 1)}, and all candidates count as not yet used",
        category=SelectionWarning,
    )


def _say_later_end(before: State, now: State, plan: Plan, lacks_ahead: bool) -> None:
    until = "without an end" if now["ends"] < 0 else f"until step {now['ends']}"
    change = (
        f"the run is resumed to train {until} (max_steps), the checkpoint was written to end at step {before['ends']}"
    )
    if len(plan.ids) < before["whole_round"]:
        difference = (
            f"round {plan.round} was planned for that end, with {len(plan.ids)} candidates instead of "
            f"{before['whole_round']}"
        )
    elif lacks_ahead:
        difference = f"nothing was measured ahead in round {plan.round}, after which nothing was to come"
    else:
        log.info("%s: rounds are those of one run of this length", change)
        return
    rank_zero_warn(
        f"{change}: {difference}, so rounds to come differ from those of one run of this length",
        category=SelectionWarning,
    )


def _ends(conditions: State) -> float:
    return math.inf if conditions["ends"] < 0 else float(conditions["ends"])
