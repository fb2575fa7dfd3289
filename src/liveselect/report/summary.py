"""The top of the page: the outcome in a sentence, in a few numbers, and in a table."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from liveselect.report import verdict, words
from liveselect.report.comparison import over_seeds
from liveselect.report.facts import facts_of
from liveselect.report.runs import Axis, Run

SETTINGS_AT_TOP = 12
"""Settings that differ, at the top of the page; the section about settings has all."""
RUNS_WITH_TILES = 6
"""Runs with a tile of their own; the table has all."""
_EQUAL: dict[Axis, str] = {"step": "after {}", "seconds": "at equal time", "flops": "at equal FLOPs"}


class Tile(NamedTuple):
    """A large number: its name, the number, a text below it, and a class of the style sheet."""

    name: str
    value: str
    text: str
    kind: str = ""


def summary_of(runs: Sequence[Run], metric: str | None, differing: Sequence[Sequence[str]]) -> dict[str, object]:
    """Return the contents of the summary: a headline, more sentences, tiles, caveats, a table, and what the runs are.

    ``differing`` are the rows of settings that are not the same in all runs.
    """
    baseline = verdict.baseline_of(runs)
    others = [run for run in runs if run is not baseline]
    if baseline is None or len(others) < 2:
        title, _, lead = verdict.headline(runs, metric).partition("; ")
        lead = lead[:1].upper() + lead[1:]
        said: dict[str, object] = {"title": title.rstrip(".") + ".", "lead": lead, "sentences": []}
    else:
        sentences = verdict.comparisons(runs, metric)
        said = {"title": f"{len(others)} runs against {baseline.name}", "lead": "", "sentences": sentences}
    return {
        **said,
        "verdicts": [*over_seeds(runs, metric), *(text for run in runs if (text := verdict.in_the_run(run)))],
        "tiles": [*_loss_tiles(runs, baseline, metric), *_cost_tiles(runs, others), *_alarm_tiles(runs)],
        "caveats": verdict.caveats(runs, metric),
        **_comparison(runs, baseline, metric),
        "saved": [] if baseline is None or metric is None else _savings(baseline, others, metric),
        "facts": facts_of(runs),
        "runs": [run.name for run in runs],
        # what all runs have comes first: a part that only one of them has brings many settings
        "differing": sorted(differing, key=lambda row: "–" in row)[:SETTINGS_AT_TOP],
        "differing_left": len(differing[SETTINGS_AT_TOP:]),
    }


def _loss_tiles(runs: Sequence[Run], baseline: Run | None, metric: str | None) -> list[Tile]:
    """Return the loss of a single run, of a comparison on each axis, or of several comparisons at equal cost."""
    if metric is None:
        return []
    if baseline is None or len(runs) == 1:
        curve = runs[0].curve(metric, "step")
        text = f"after {words.place('step', curve[-1][0])}, from {words.loss(curve[0][1])}" if curve else ""
        return [Tile(metric, words.loss(curve[-1][1]), text)] if curve else []
    others = [run for run in runs if run is not baseline]
    cost: Axis = "seconds" if verdict.timed(runs) else "flops"
    axes: Sequence[Axis] = verdict.axes_of(baseline, others[0]) if len(others) == 1 else (cost,)
    tiles = []
    for other in others[:RUNS_WITH_TILES]:
        for axis in axes:
            found = verdict.compare(baseline, other, metric, axis)
            if found is None:
                continue
            place = words.place(axis, found.at)
            name = f"{metric if len(others) == 1 else other.name} {_EQUAL[axis].format(place)}"
            text = f"{baseline.name} {words.loss(found.baseline)}" + (f", both {place}" if axis != "step" else "")
            tiles.append(Tile(name, words.loss(found.other), text, _kind(found)))
    return tiles


def _cost_tiles(runs: Sequence[Run], others: Sequence[Run]) -> list[Tile]:
    run = others[0] if len(others) == 1 else runs[0]
    if len(runs) > 2 or not run.knows_its_cost:
        return []
    if not verdict.timed(runs):
        share = words.percent(run.ledger.selection_flops_share)
        return [Tile("FLOPs for selection", share, f"of {words.flops(run.total_flops)}")]
    share = words.percent(run.ledger.selection_share)
    return [Tile("time for selection", share, f"of {words.duration(run.total_seconds)}")]


def _alarm_tiles(runs: Sequence[Run]) -> list[Tile]:
    rounds = [record for run in runs for record in run.ledger.rounds]
    alarms = sum(len(record.alarms) for record in rounds)
    return (
        [Tile("alarms", words.number(alarms), f"in {words.plural(len(rounds), 'round')}", "higher")] if alarms else []
    )


def _kind(comparison: verdict.Comparison) -> str:
    """Return the style of a number: how it compares with the baseline, none for equal losses."""
    return "" if comparison.outcome == "equal" else comparison.outcome


def _comparison(runs: Sequence[Run], baseline: Run | None, metric: str | None) -> dict[str, object]:
    """Return the table: a row for each run with its losses and its cost."""
    columns = ["run", "method", "steps", f"final {metric or 'loss'}"]
    timed = verdict.timed(runs)
    places: list[Axis] = [] if len(runs) == 1 else ["seconds", "flops"] if timed else ["flops"]
    columns += [f"at equal {'time' if axis == 'seconds' else 'FLOPs'}" for axis in places]
    rows = []
    for run in runs:
        curve = run.curve(metric, "step") if metric else []
        ends = [words.number(curve[-1][0]), words.loss(curve[-1][1])] if curve else ["–", "–"]
        equal = [_at_equal(runs, run, baseline, metric, axis) for axis in places]
        share = run.ledger.selection_share if timed else run.ledger.selection_flops_share
        cost = [words.percent(share) if run.knows_its_cost else "–", words.flops(run.total_flops)]
        time = [words.duration(run.total_seconds)] if timed else []
        rows.append([run.name, run.method, *ends, *equal, *time, *cost])
    of = "selection's share" if timed else "selection's share of FLOPs"
    return {"columns": [*columns, *(["time"] if timed else []), of, "FLOPs"], "rows": rows}


def _at_equal(runs: Sequence[Run], run: Run, baseline: Run | None, metric: str | None, axis: Axis) -> str:
    """Return a run's loss where it and the baseline cost the same; the baseline's against the only other run."""
    others = [other for other in runs if other is not baseline]
    if baseline is None or metric is None or (run is baseline and len(others) != 1):
        return "–"
    found = verdict.compare(baseline, others[0] if run is baseline else run, metric, axis)
    if found is None:
        return "–"
    if run is baseline:
        return words.loss(found.baseline)
    return Markup('<span class="{}">{}</span>').format(_kind(found), words.loss(found.other))


def _savings(baseline: Run, others: Sequence[Run], metric: str) -> list[str]:
    """Say how soon each run reached the final loss of the baseline, as far as both were evaluated."""
    if not baseline.curve(metric, "step"):
        return []
    return [_saved(baseline, other, metric) for other in others if other.curve(metric, "step")]


def _saved(baseline: Run, run: Run, metric: str) -> str:
    places = [
        f"{words.place(axis, there)} ({baseline.name}: {words.place(axis, end)})"
        for axis, end, there in verdict.savings(baseline, run, metric)
    ]
    if places:
        return f"{run.name} reached the final loss of {baseline.name} after {', '.join(places)}."
    never = "has not reached" if run.is_under_way else "never reached"
    return f"{run.name} {never} the final loss of {baseline.name}{' yet' if run.is_under_way else ''}."
