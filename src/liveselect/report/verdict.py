"""The comparison of two runs in words, and its limits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from liveselect.report import words
from liveselect.report.runs import Axis, Run, reaches, value_at

EQUAL_LOSS_TOLERANCE = 0.002
"""Relative difference up to which losses are called equal: rounding to three decimals has that size."""

MAX_SPEED_RATIO = 1.2
"""If the same training takes longer than this factor in one run, the machine differed and times cannot be compared."""


@dataclass(frozen=True)
class Comparison:
    """Two runs at the same place.

    Attributes:
        axis: what is equal: training steps, or total cost in seconds or FLOPs.
        at: the place, the last one that both runs reached.
        baseline: loss of the baseline there.
        other: loss of the other run there.
    """

    axis: Axis
    at: float
    baseline: float
    other: float

    @property
    def outcome(self) -> Literal["lower", "higher", "equal"]:
        """How the other run's loss compares with the baseline's."""
        if abs(self.other - self.baseline) <= EQUAL_LOSS_TOLERANCE * abs(self.baseline):
            return "equal"
        return "lower" if self.other < self.baseline else "higher"


def in_the_run(run: Run) -> str:
    """Return what a run has found out about its own selection, as a sentence; an empty one where it did not try."""
    sentence = str(run.ledger.verdict.get("sentence", ""))
    return f"Verdict inside {run.name}: {sentence}." if sentence else ""


def baseline_of(runs: Sequence[Run]) -> Run | None:
    """Return the run to compare the others with: the first random one, or else the first of several."""
    return next((run for run in runs if run.is_random), runs[0] if len(runs) > 1 else None)


def axes_of(baseline: Run, other: Run) -> tuple[Axis, ...]:
    """Return the axes on which two runs can be compared: no times where the machine was busier in one of them."""
    return ("step", "flops") if _speed_difference(baseline, other) else ("step", "seconds", "flops")


def timed(runs: Sequence[Run]) -> bool:
    """Return whether the times of all runs can be compared with the baseline's; a single run has nothing to compare."""
    baseline = baseline_of(runs)
    return baseline is None or all("seconds" in axes_of(baseline, run) for run in runs)


def compare(baseline: Run, other: Run, metric: str, axis: Axis) -> Comparison | None:
    """Compare two runs at the last place that both reached.

    None when their curves do not overlap, or when the axis is none that they can be compared on.
    """
    if axis not in axes_of(baseline, other):
        return None
    curves = baseline.curve(metric, axis), other.curve(metric, axis)
    if not all(curves):
        return None
    at = min(curve[-1][0] for curve in curves)
    values = [value_at(curve, at) for curve in curves]
    if at <= 0 or values[0] is None or values[1] is None:
        return None
    return Comparison(axis, at, values[0], values[1])


def headline(runs: Sequence[Run], metric: str | None) -> str:
    """Return the main result in one sentence."""
    if not runs or metric is None or not any(run.curve(metric, "step") for run in runs):
        if metric is not None and any(metric in entry.metrics for run in runs for entry in run.ledger.evaluations):
            return f"{metric} was not a number in any evaluation: training has diverged, or the metric is broken."
        return "No evaluation was recorded yet, so there is no loss to report."
    baseline = baseline_of(runs)
    others = [run for run in runs if run is not baseline]
    if baseline is None or not others:
        return _alone(runs[0], metric)
    return " ".join(comparisons(runs, metric))


def comparisons(runs: Sequence[Run], metric: str | None) -> list[str]:
    """Return a sentence about each run against the baseline, with how many seeds stand behind it."""
    baseline = baseline_of(runs)
    if baseline is None or metric is None:
        return []
    seeds = Counter(run.method for run in runs)
    return [_against(baseline, run, metric, _single_seeds(baseline, run, seeds)) for run in runs if run is not baseline]


def _single_seeds(baseline: Run, other: Run, seeds: Mapping[str, int]) -> str:
    """Return the end of a sentence where a method was run with a single seed."""
    single = [run.name for run in (baseline, other) if seeds[run.method] == 1]
    if len(single) == 2:
        return ", with one seed each"
    return f", with one seed of {single[0]}" if single else ""


def caveats(runs: Sequence[Run], metric: str | None) -> list[str]:
    """Return sentences about the limits of the comparison."""
    said = [
        f"{run.name} was stopped, or is still running: its record ends at step {words.number(run.last_step)}, and what "
        "came after its last round or validation is not counted."
        for run in runs
        if run.ledger.finished is False
    ]
    if len(runs) == 1:
        said.append(
            "This report covers one run. Train the same with random data (UniformSelector) and report both: without "
            "it, nothing can be said about the effect of selection."
        )
    if len(runs) > 1 and len({run.method for run in runs}) == len(runs):
        said.append("There is one seed of each method, so how much of a difference is chance is not known.")
    baseline = baseline_of(runs)
    said += [text for run in runs if baseline is not None and (text := _speed_difference(baseline, run))]
    if metric is not None and any(_ends_above_its_best(run, metric) for run in runs):
        said.append("At least one run ends above its own best loss: its last value is not its best.")
    return said


def _speed_difference(*runs: Run) -> str:
    """Return a sentence if the same training, selection aside, took much longer in one of two runs, or an empty one."""
    if not all(run.ledger.training_flops > 0 and run.ledger.training_seconds > 0 for run in runs):
        return ""
    paces = sorted((run.ledger.training_seconds / run.ledger.training_flops, run.name) for run in runs)
    (least, fast), (most, slow) = paces
    if most <= MAX_SPEED_RATIO * least:
        return ""
    return (
        f"The same training, selection aside, took {most / least:.1f} times as long in {slow} as in {fast}: the "
        "machine was slower or busier then, so their times cannot be compared, and are not. Compare at equal FLOPs."
    )


def _alone(run: Run, metric: str) -> str:
    curve = run.curve(metric, "step")
    start, end = curve[0], curve[-1]
    moved = (
        f"{metric} was {words.loss(end[1])} at step {words.number(end[0])}"
        if start == end
        else f"{metric} went from {words.loss(start[1])} at step {words.number(start[0])} to {words.loss(end[1])} "
        f"at step {words.number(end[0])}"
    )
    share = f"; selection took {words.percent(run.ledger.selection_share)} of the time" if run.knows_its_cost else ""
    return f"{run.name}: {moved}{share}."


def _against(baseline: Run, other: Run, metric: str, seeds: str) -> str:
    by_step = compare(baseline, other, metric, "step")
    if by_step is None:
        return _nothing_yet(baseline, other, metric)
    values = _values(by_step)
    said = f"After {words.number(by_step.at)} steps, {other.name} "
    if by_step.outcome == "equal":
        said += f"and {baseline.name} have the same {metric}: {values}"
    else:
        said += f"has a {by_step.outcome} {metric} than {baseline.name}: {values}"
    said += seeds
    timed = "seconds" in axes_of(baseline, other)
    axis: Axis = "seconds" if timed else "flops"
    by_cost = compare(baseline, other, metric, axis)
    share = other.ledger.selection_share if timed else other.ledger.selection_flops_share
    cost = f"; selection took {words.percent(share)} of its {'time' if timed else 'FLOPs'}"
    if by_cost is not None:
        joint = "and" if by_step.outcome == by_cost.outcome else "but"
        outcome = "level" if by_cost.outcome == "equal" else by_cost.outcome
        equal = f"equal total {'time' if timed else 'FLOPs'} ({words.place(axis, by_cost.at)})"
        said += f"{cost}, {joint} at {equal} it is {outcome}: {_values(by_cost)}"
    else:
        first, end = (run.curve(metric, axis) for run in (other, baseline))
        if first and end and first[0][0] > end[-1][0] > 0:
            said += (
                f"{cost}, and {baseline.name} had ended ({words.place(axis, end[-1][0])}) before it was evaluated "
                f"first ({words.place(axis, first[0][0])})"
            )
    return said + "."


def _nothing_yet(baseline: Run, other: Run, metric: str) -> str:
    """Say why two runs cannot be compared, and how far they are."""
    for run in (other, baseline):
        if run.is_under_way and not run.curve(metric, "step"):
            whole = run.ledger.about.get("max_steps")
            of = f" of {words.number(whole)}" if isinstance(whole, int) and whole > 0 else ""
            return f"{run.name} is at step {words.number(run.last_step)}{of}: there is nothing to compare yet."
    return f"{other.name} and {baseline.name} were not evaluated over the same steps."


def _values(found: Comparison) -> str:
    return f"{words.loss(found.other)} against {words.loss(found.baseline)}"


def _ends_above_its_best(run: Run, metric: str) -> bool:
    values = [y for _, y in run.curve(metric, "step")]
    return bool(values) and values[-1] > min(values) * (1 + EQUAL_LOSS_TOLERANCE)


def savings(baseline: Run, other: Run, metric: str) -> list[tuple[Axis, float, float]]:
    """Return where the baseline ended and where the other run first reached that loss, for each axis where it did."""
    found: list[tuple[Axis, float, float]] = []
    for axis in axes_of(baseline, other):
        curve = baseline.curve(metric, axis)
        if not curve or curve[-1][0] <= 0:
            continue
        there = reaches(other.curve(metric, axis), curve[-1][1])
        if there is not None:
            found.append((axis, curve[-1][0], there))
    return found
