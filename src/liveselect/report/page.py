"""The report: one page that tells what a run's data selection brought and what it cost."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from liveselect.report import elements, pictures, verdict, words
from liveselect.report.alarms import what_was_wrong
from liveselect.report.arms import what_arms_were_worth
from liveselect.report.choices import what_it_chose
from liveselect.report.cluster_map import where_it_looked
from liveselect.report.drift import how_it_moved
from liveselect.report.runs import Axis, Run, choose_metric

NO_TRAINING_TIME = (
    "Training time is written down at the end of each round and at each validation, and the record of this run stops "
    "before the first: what follows is selection alone."
)
ABOUT_A_RUN = (what_arms_were_worth, what_it_chose, where_it_looked, how_it_moved)
_TITLES: dict[Axis, str] = {"step": "training steps", "seconds": "total time", "flops": "total FLOPs"}


def build_page(runs: Sequence[Run], metric: str | None = None) -> str:
    """Return the report about ``runs`` as one HTML document that refers to nothing outside itself.

    Args:
        runs: at least one run; the first random one is the baseline of the others.
        metric: the evaluated metric to compare by, smaller is better; by default the validation loss.

    Raises:
        ValueError: there is no run, or no run evaluated ``metric``.
    """
    if not runs:
        raise ValueError("expected at least one run to report about, got none")
    known = sorted({name for run in runs for entry in run.ledger.evaluations for name in entry.metrics})
    if metric is not None and metric not in known:
        raise ValueError(f"no run evaluated {metric!r}; evaluated were {', '.join(known) or 'no metrics'}")
    metric = metric or choose_metric(runs)
    selecting = [run for run in runs if not run.is_random] or list(runs)
    head = verdict.headline(runs, metric)
    sections = [
        '<p class="kicker">liveselect report</p>',
        f"<h1>{words.escaped(head)}</h1>",
        elements.bullets(verdict.caveats(runs, metric), "caveats") if verdict.caveats(runs, metric) else "",
        _comparison(runs, metric),
        _loss(runs, metric),
        _cost(runs),
        what_was_wrong(runs),
        *(about(run) for run in selecting for about in ABOUT_A_RUN),
        _notes(runs),
        _settings(runs),
    ]
    css, script = style(), _resource("search.js")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{words.escaped(' and '.join(run.name for run in runs))}: liveselect report</title>\n"
        f"<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def style() -> str:
    """Return the style sheet of the page."""
    return _resource("style.css")


def _resource(name: str) -> str:
    return resources.files("liveselect.report").joinpath(name).read_text(encoding="utf-8")


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
    kind = found.outcome if found.outcome != "equal" else ""
    return f'<span class="{kind}">{words.loss(found.other)}</span>'


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


def _loss(runs: Sequence[Run], metric: str | None) -> str:
    if metric is None:
        return ""
    figures = []
    labels: dict[Axis, str] = {
        "step": "training steps",
        "seconds": "seconds, selection included",
        "flops": "FLOPs, selection included",
    }
    for axis, label in labels.items():
        lines = [pictures.Line(run.curve(metric, axis), index) for index, run in enumerate(runs)]
        if any(line.points and line.points[-1][0] > 0 for line in lines):
            title = f"{metric} against {_TITLES[axis]}"
            description = f"{title}, for {', '.join(run.name for run in runs)}"
            chart = pictures.line_chart(lines, label, description, shorten=axis == "flops")
            figures.append(elements.figure(chart, title))
    keys = {
        run.name: elements.LINE_KEY.format(
            colour=f"var(--series-{index % pictures.SERIES_COLOURS})", dash=pictures.HTML_DASHES[index % 4]
        )
        for index, run in enumerate(runs)
    }
    rows = [
        [
            words.escaped(run.name),
            words.number(entry.step),
            words.duration(entry.training_seconds),
            words.duration(entry.selection_seconds),
            *(words.number(entry.metrics.get(name)) for name in _metric_names(runs)),
        ]
        for run in runs
        for entry in run.ledger.evaluations
    ]
    columns = ["run", "step", "training", "selection", *_metric_names(runs)]
    return (
        "<section><h2>Loss</h2>"
        + elements.legend(keys)
        + elements.grid(figures)
        + elements.details("All evaluations", elements.table(columns, rows, "All evaluations"))
        + "</section>"
    )


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for entry in run.ledger.evaluations for name in entry.metrics))


def _cost(runs: Sequence[Run]) -> str:
    parts = ["<section><h2>Where the cost went</h2>"]
    parts.append(elements.paragraph("Validation is not counted: it is neither training nor selection.", "note"))
    for run in runs:
        seconds, flops = {"training": run.ledger.training_seconds}, {"training": run.ledger.training_flops}
        before = {f"before training: {phase}": spent for phase, spent in run.ledger.before_seconds.items()}
        before_flops = {f"before training: {phase}": spent for phase, spent in run.ledger.before_flops.items()}
        spent = [
            (before, before_flops),
            (run.ledger.around_seconds, {}),
            *((record.seconds, record.flops) for record in run.ledger.rounds),
        ]
        for of_seconds, of_flops in spent:
            for phase in {**of_seconds, **of_flops}:
                seconds[phase] = seconds.get(phase, 0.0) + of_seconds.get(phase, 0.0)
                flops[phase] = flops.get(phase, 0.0) + of_flops.get(phase, 0.0)
        total = sum(seconds.values())
        order = ["training", *sorted((phase for phase in seconds if phase != "training"), key=lambda p: -seconds[p])]
        rows = [
            [
                words.escaped(phase),
                words.duration(seconds[phase]),
                words.percent(seconds[phase] / total if total else 0.0),
                elements.bar(seconds[phase] / total if total else 0.0),
                words.flops(flops.get(phase, 0.0)),
            ]
            for phase in order
        ]
        rows.append(["total", words.duration(total), "", "", words.flops(sum(flops.values()))])
        parts.append(f"<h3>{words.escaped(run.name)}</h3>")
        if not run.knows_its_cost:
            parts.append(elements.paragraph(NO_TRAINING_TIME, "note"))
        parts.append(elements.table(["phase", "time", "share", "", "FLOPs"], rows, f"Cost of {run.name}", total=True))
    return "".join(parts) + "</section>"


def _notes(runs: Sequence[Run]) -> str:
    notes = [
        f"{run.name}, round {record.round}: {note}"
        for run in runs
        for record in run.ledger.rounds
        for note in record.notes
    ]
    said = elements.bullets(notes) if notes else elements.paragraph("Nothing unusual was noted.")
    return f"<section><h2>Notes and warnings</h2>{said}</section>"


def _settings(runs: Sequence[Run]) -> str:
    flat = [_flat(run.ledger.about) for run in runs]
    names = list(dict.fromkeys(name for about in flat for name in about))
    rows = [[words.escaped(name), *(words.escaped(about.get(name, "–")) for about in flat)] for name in names]
    shown = elements.table(["setting", *(run.name for run in runs)], rows, "Settings of the runs")
    configs = [
        elements.details(f"Configuration of {run.name}", elements.article(["config.yaml"], run.config, "whole"))
        for run in runs
        if run.config
    ]
    return f"<section><h2>Settings</h2>{shown if rows else '<p>None were recorded.</p>'}{''.join(configs)}</section>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found
