"""The top of the page: what came out, in a sentence, in a few numbers, and in a table."""

from collections.abc import Sequence

from liveselect.report import elements, verdict, words
from liveselect.report.runs import Axis, Run

MOST_TILES = 6
_EQUAL: dict[Axis, str] = {"step": "after {}", "seconds": "at equal time", "flops": "at equal FLOPs"}


def what_came_out(runs: Sequence[Run], metric: str | None) -> str:
    """Return the summary of the runs: a headline, what else there is to say, numbers, caveats and a table."""
    said = verdict.caveats(runs, metric)
    return (
        _headline(runs, metric)
        + elements.tiles(_tiles(runs, metric))
        + (elements.bullets(said, "caveats") if said else "")
        + _comparison(runs, metric)
    )


def _headline(runs: Sequence[Run], metric: str | None) -> str:
    baseline = verdict.baseline_of(runs)
    others = [run for run in runs if run is not baseline]
    if baseline is None or len(others) < 2:
        title, _, rest = verdict.headline(runs, metric).partition("; ")
        lead = f'<p class="lead">{words.escaped(rest[0].upper() + rest[1:])}</p>' if rest else ""
        return f"<h1>{words.escaped(title.rstrip('.'))}.</h1>{lead}"
    title = f"{len(others)} runs against {baseline.name}"
    sentences = [verdict.headline([baseline, other], metric) for other in others]
    return f"<h1>{words.escaped(title)}</h1>" + elements.bullets(sentences, "lead")


def _tiles(runs: Sequence[Run], metric: str | None) -> list[tuple[str, str, str, str]]:
    """Return the numbers that stand out; those of a comparison where two runs are compared."""
    baseline = verdict.baseline_of(runs)
    others = [run for run in runs if run is not baseline]
    found: list[tuple[str, str, str, str]] = []
    if baseline is not None and metric is not None and len(others) == 1:
        found = _compared(baseline, others[0], metric)
    elif metric is not None and len(runs) == 1 and (curve := runs[0].curve(metric, "step")):
        text = f"after {words.place('step', curve[-1][0])}, from {words.loss(curve[0][1])}"
        found = [(metric, words.loss(curve[-1][1]), text, "")]
    elif baseline is not None and metric is not None:
        found = [tile for run in others[:MOST_TILES] for tile in _at_equal_time(baseline, run, metric)]
    run = others[0] if len(others) == 1 else runs[0]
    if len(runs) <= 2 and run.knows_its_cost:
        spent = words.duration(run.total_seconds)
        found.append(("time for selection", words.percent(run.ledger.selection_share), f"of {spent}", ""))
    alarms = sum(len(record.alarms) for each in runs for record in each.ledger.rounds)
    rounds = sum(len(each.ledger.rounds) for each in runs)
    text = f"in {words.number(rounds)} round{'' if rounds == 1 else 's'}"
    found.append(("alarms", words.number(alarms), text, "higher" if alarms else ""))
    return found


def _compared(baseline: Run, other: Run, metric: str) -> list[tuple[str, str, str, str]]:
    found: list[tuple[str, str, str, str]] = []
    axes: tuple[Axis, ...] = ("step", "seconds", "flops")
    for axis in axes:
        comparison = verdict.compare(baseline, other, metric, axis)
        if comparison is not None:
            where = _EQUAL[axis].format(words.place(axis, comparison.at))
            text = f"{baseline.name} {words.loss(comparison.baseline)}"
            if axis != "step":
                text += f", both {words.place(axis, comparison.at)}"
            found.append((f"{metric} {where}", words.loss(comparison.other), text, _kind(comparison)))
    return found


def _at_equal_time(baseline: Run, other: Run, metric: str) -> list[tuple[str, str, str, str]]:
    comparison = verdict.compare(baseline, other, metric, "seconds")
    if comparison is None:
        return []
    text = f"{baseline.name} {words.loss(comparison.baseline)}, both {words.duration(comparison.at)}"
    return [(f"{other.name} at equal time", words.loss(comparison.other), text, _kind(comparison))]


def _kind(comparison: verdict.Comparison) -> str:
    """Return the style of a number: how it compares, none where the runs are level."""
    return "" if comparison.outcome == "equal" else comparison.outcome


def _comparison(runs: Sequence[Run], metric: str | None) -> str:
    """One row for each run: its loss where all runs can be compared, and what it cost."""
    baseline = verdict.baseline_of(runs)
    columns = ["run", "method", "steps", f"final {metric or 'loss'}"]
    places: list[Axis] = ["seconds", "flops"] if len(runs) > 1 else []
    columns += [f"at equal {'time' if axis == 'seconds' else 'FLOPs'}" for axis in places]
    columns += ["time", "of it selection", "FLOPs"]
    rows = []
    for run in runs:
        curve = run.curve(metric, "step") if metric else []
        row = [words.escaped(run.name), words.escaped(run.method)]
        row += [words.number(curve[-1][0]), words.loss(curve[-1][1])] if curve else ["–", "–"]
        row += [_at_equal(runs, run, baseline, metric, axis) for axis in places]
        row += [
            words.duration(run.total_seconds),
            words.percent(run.ledger.selection_share) if run.knows_its_cost else "–",
            words.flops(run.total_flops),
        ]
        rows.append(row)
    return elements.table(columns, rows, "Comparison of the runs") + _saved(runs, baseline, metric)


def _at_equal(runs: Sequence[Run], run: Run, baseline: Run | None, metric: str | None, axis: Axis) -> str:
    """The loss of a run where it and the baseline had cost the same; the baseline's own against the first other run."""
    others = [other for other in runs if other is not baseline]
    if baseline is None or metric is None or (run is baseline and len(others) != 1):
        return "–"
    found = verdict.compare(baseline, others[0] if run is baseline else run, metric, axis)
    if found is None:
        return "–"
    if run is baseline:
        return words.loss(found.baseline)
    return f'<span class="{_kind(found)}">{words.loss(found.other)}</span>'


def _saved(runs: Sequence[Run], baseline: Run | None, metric: str | None) -> str:
    """Say how soon the other runs were as good as the baseline was at its end."""
    if baseline is None or metric is None:
        return ""
    said = []
    for run in runs:
        if run is baseline:
            continue
        places = []
        for axis, end, there in verdict.savings(baseline, run, metric):
            places.append(f"{words.place(axis, there)} ({baseline.name}: {words.place(axis, end)})")
        reached = f"{run.name} was as good as {baseline.name} at its end after {', '.join(places)}."
        said.append(reached if places else f"{run.name} never was as good as {baseline.name} at its end.")
    return "".join(elements.paragraph(text) for text in said)
