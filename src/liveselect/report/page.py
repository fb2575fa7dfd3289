"""The report: one page that tells what a run's data selection brought and what it cost."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import count
from typing import Any

from liveselect.report import elements, pictures, words
from liveselect.report.alarms import what_was_wrong
from liveselect.report.arms import what_arms_were_worth
from liveselect.report.choices import spread, what_it_chose
from liveselect.report.cluster_map import where_it_looked
from liveselect.report.cost import where_the_cost_went
from liveselect.report.drift import how_it_moved
from liveselect.report.runs import Axis, Run, choose_metric
from liveselect.report.summary import what_came_out

LISTED = 200
"""Evaluations and notes of a run that are listed; of more, so many, evenly spread."""
DRAWN = 400
"""Points of a curve."""
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
    sections = [
        what_came_out(runs, metric),
        _loss(runs, metric),
        where_the_cost_went(runs),
        what_was_wrong(runs),
        *(about(run) for run in selecting for about in ABOUT_A_RUN),
        _notes(runs),
        _settings(runs),
    ]
    numbers = count(1)
    body = re.sub("<section>", lambda _: f'<section id="part-{next(numbers)}">', "\n".join(sections))
    css, script = style(), _resource("search.js")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{words.escaped(' and '.join(run.name for run in runs))}: liveselect report</title>\n"
        f"<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        f'<p class="kicker">liveselect report</p>\n{_contents(body)}\n{body}'
        f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def style() -> str:
    """Return the style sheet of the page."""
    return _resource("style.css")


def _contents(body: str) -> str:
    """Return links to the sections."""
    found = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', body)
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title in found)
    return f'<nav aria-label="Sections">{links}</nav>'


def _resource(name: str) -> str:
    return resources.files("liveselect.report").joinpath(name).read_text(encoding="utf-8")


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
        lines = [
            pictures.Line(spread(run.curve(metric, axis), DRAWN), index, run.name) for index, run in enumerate(runs)
        ]
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
        for entry in spread(run.ledger.evaluations, LISTED)
    ]
    columns = ["run", "step", "training", "selection", *_metric_names(runs)]
    return (
        '<section id="loss"><h2>Loss</h2>'
        + (elements.legend(keys) + elements.grid(figures) if figures else "")
        + elements.details(f"All evaluations{_of_many(runs)}", elements.table(columns, rows, "All evaluations"))
        + "</section>"
    )


def _of_many(runs: Sequence[Run]) -> str:
    most = max(len(run.ledger.evaluations) for run in runs)
    return f" ({LISTED} of a run, evenly spread)" if most > LISTED else ""


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for entry in run.ledger.evaluations for name in entry.metrics))


def _notes(runs: Sequence[Run]) -> str:
    rounds: dict[str, list[int]] = {}
    for run in runs:
        for record in run.ledger.rounds:
            for note in record.notes:
                rounds.setdefault(f"{run.name}: {note}", []).append(record.round)
    notes = [f"{note} ({_rounds(found)})" for note, found in list(rounds.items())[:LISTED]]
    said = elements.bullets(notes) if notes else elements.paragraph("Nothing unusual was noted.")
    more = len(rounds) - len(notes)
    said += elements.paragraph(f"and {more} more") if more else ""
    return f'<section id="notes"><h2>Notes and warnings</h2>{said}</section>'


def _rounds(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:5]))
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f"round{'s' if len(indices) > 1 else ''} {shown}{more}"


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
    told = shown if rows else elements.paragraph("None were recorded.")
    return f'<section id="settings"><h2>Settings</h2>{told}{"".join(configs)}</section>'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{prefix}{name}"] = "–" if value is None else text
    return found
