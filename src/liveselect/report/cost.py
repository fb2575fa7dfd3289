"""The cost of the runs by phase: a bar for each run on one scale, and a table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from liveselect.report import charts, words
from liveselect.report.runs import Run, Section

TRAINING, REST = "training", "other selection"
PHASES_DRAWN = 4
"""Phases with a colour of their own: more colours are hard to tell apart."""
SMALL_PHASE_SHARE = 0.01
"""Share of a run's time below which phases are added up in one line."""


class Phase(NamedTuple):
    """The cost of one phase of a run: wall-clock seconds, and FLOPs over all ranks (0 where not counted)."""

    name: str
    seconds: float
    flops: float


def phases_of(run: Run) -> list[Phase]:
    """Return the phases of a run, training first, then from the longest to the shortest."""
    ledger = run.ledger
    before_seconds, before_flops = (
        {f"before training: {phase}": amount for phase, amount in spent.items()}
        for spent in (ledger.before_seconds, ledger.before_flops)
    )
    in_rounds = [record.seconds for record in ledger.rounds]
    seconds = _sums([{TRAINING: ledger.training_seconds}, before_seconds, ledger.around_seconds, *in_rounds])
    in_rounds = [record.flops for record in ledger.rounds]
    flops = _sums([{TRAINING: ledger.training_flops}, before_flops, ledger.around_flops, *in_rounds])
    phases = [Phase(name, seconds.get(name, 0.0), flops.get(name, 0.0)) for name in seconds | flops]
    return sorted(phases, key=lambda phase: (phase.name != TRAINING, -phase.seconds))


def cost_section(runs: Sequence[Run]) -> Section:
    """Return the section about cost."""
    phases = {run.name: phases_of(run) for run in runs}
    colours = _colours(phases.values())
    shown = [
        {
            "run": run,
            "phases": phases[run.name],
            "shown": _with_small_ones_added_up(phases[run.name]),
            "total": _total(phases[run.name]),
            "parts": _parts(phases[run.name], colours),
        }
        for run in runs
    ]
    longest = max(_total(spent).seconds for spent in phases.values())
    return Section("Where the cost went", "cost", {"runs": shown, "colours": colours, "longest": longest})


def _parts(phases: Sequence[Phase], colours: Mapping[str, str]) -> list[tuple[str, float]]:
    """Return the parts of a bar: a colour and seconds, in the order of the ``colours``."""
    spent = _sums({phase.name if phase.name in colours else REST: phase.seconds} for phase in phases)
    return [(colour, spent[name]) for name, colour in colours.items() if spent.get(name)]


def _sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            totals[name] = totals.get(name, 0.0) + amount
    return totals


def _total(phases: Sequence[Phase]) -> Phase:
    return Phase("total", sum(phase.seconds for phase in phases), sum(phase.flops for phase in phases))


def _colours(costs: Iterable[Sequence[Phase]]) -> Mapping[str, str]:
    """Return a colour for training, for the longest phases of all runs together, and for the rest."""
    totals = _sums({phase.name: phase.seconds for phase in phases if phase.name != TRAINING} for phases in costs)
    selection = sorted((name for name, amount in totals.items() if amount > 0), key=lambda name: -totals[name])
    drawn = selection[:PHASES_DRAWN]
    # the first colours belong to the runs, in the legend of the losses
    colours = {name: f"series-{(index + 1) % charts.SERIES_COLOURS}" for index, name in enumerate(drawn)}
    return {TRAINING: "faint", **colours, **({REST: "muted"} if len(selection) > len(drawn) else {})}


def _with_small_ones_added_up(phases: Sequence[Phase]) -> list[Phase]:
    """Return the phases, with small ones as one line if there are more than two of these."""
    least = SMALL_PHASE_SHARE * _total(phases).seconds
    small = [phase for phase in phases if phase.name != TRAINING and phase.seconds < least]
    if len(small) <= 2:
        return list(phases)
    added_up = _total(small)._replace(name=f"{len(small)} phases below {words.percent(SMALL_PHASE_SHARE)}")
    return [*(phase for phase in phases if phase not in small), added_up]
