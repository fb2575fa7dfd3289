"""The report: one page that shows the effect and the cost of a run's data selection."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from liveselect.ledger import Alarm, spread
from liveselect.report import charts, words
from liveselect.report.arms import arms_section
from liveselect.report.charts import Chart
from liveselect.report.choices import choices_section, drift_section
from liveselect.report.cluster_map import map_section
from liveselect.report.cost import cost_section
from liveselect.report.marks import marked
from liveselect.report.references import references_section
from liveselect.report.runs import Axis, Run, Section, choose_metric
from liveselect.report.summary import summary_of
from liveselect.report.verdict import timed

ROWS_LISTED = 200
"""Evaluations of a run, and notes, evenly spread: a page of thousands of rows is slow and not read."""
ALARMS_LISTED = 100
"""Alarms of a kind, evenly spread."""
METRICS_DRAWN = 8
"""Metrics that the chart of the losses can be switched to; the table has all."""
POINTS_DRAWN = 400
"""Points of a curve, whose chart is a few hundred pixels wide."""
POINTS_OF_ALL = 24_000
"""Points of all curves together, so that a page about many runs stays small."""
SECTIONS_OF_A_RUN = (references_section, choices_section, arms_section, map_section, drift_section)
_AXES: dict[Axis, str] = {"step": "Steps", "seconds": "Time", "flops": "FLOPs"}


def build_page(runs: Sequence[Run], metric: str | None = None) -> str:
    """Return the report about ``runs`` as one HTML document that refers to nothing outside itself.

    Args:
        runs: at least one run; the first random one is the baseline of the others.
        metric: the evaluated metric to compare by, smaller is better; by default the validation loss.

    Raises:
        ValueError: there is no run, or no run evaluated ``metric``.
    """
    return _page_and_charts(runs, metric)[0]


def charts_of(runs: Sequence[Run], metric: str | None = None) -> list[Chart]:
    """Return the charts of the page about ``runs``, in its order; of the losses those of one metric.

    Raises:
        ValueError: as :func:`build_page`.
    """
    return _page_and_charts(runs, metric, metrics_drawn=1)[1]


def _page_and_charts(
    runs: Sequence[Run], metric: str | None, metrics_drawn: int = METRICS_DRAWN
) -> tuple[str, list[Chart]]:
    if not runs:
        raise ValueError("expected at least one run to report about, got none")
    known = _metric_names(runs)
    if metric is not None and metric not in known:
        raise ValueError(f"no run evaluated {metric!r}; evaluated were {', '.join(sorted(known)) or 'no metrics'}")
    metric = metric or choose_metric(runs)
    selecting = [run for run in runs if not run.is_random] or list(runs)
    settings = _settings(runs)
    sections = [
        _loss_section(runs, metric, metrics_drawn),
        _alarm_section(runs),
        *(about(run) for run in selecting for about in SECTIONS_OF_A_RUN),
        cost_section(runs),
        _note_section(runs),
        Section("Settings", "settings", {"runs": runs, **settings}),
    ]
    drawn: list[Chart] = []

    def plot(chart: Chart) -> Markup:
        """Return the place of a chart in the page."""
        drawn.append(chart)
        name = Markup.escape(words.visible(chart.description))
        large = " large" if chart.large else ""
        return Markup(f'<div class="plot{large}" role="img" aria-label="{name}" data-chart="{len(drawn) - 1}"></div>')

    templates = Environment(
        loader=PackageLoader("liveselect.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=words.visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (words.number, words.decimals, words.loss, words.percent, words.duration, words.flops, words.plural)
    templates.filters |= {each.__name__: each for each in (*filters, spread, marked, plot)}
    templates.tests["finite"] = math.isfinite
    shown = [section for section in sections if section is not None]
    used = [section.template for section in shown]
    page = templates.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        summary=summary_of(runs, metric, settings["differing"]),
        sections={name if used.count(name) == 1 else f"{name}-{i}": shown[i] for i, name in enumerate(used)},
        figures=lambda: _embedded([chart.figure() for chart in drawn]),  # what was drawn is known at the end
        plotly=Markup(get_plotlyjs()),
    )
    return page, drawn


def _embedded(figures: object) -> Markup:
    """Return JSON that can stand inside of a script element."""
    text = json.dumps(figures, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _loss_section(runs: Sequence[Run], metric: str | None, metrics_drawn: int) -> Section | None:
    if metric is None:
        return None
    names = [metric, *(name for name in _metric_names(runs) if name != metric)][:metrics_drawn]
    axes: list[Axis] = [axis for axis in _AXES if axis != "seconds" or timed(runs)]
    points = max(50, min(POINTS_DRAWN, POINTS_OF_ALL // (len(names) * len(axes) * len(runs))))
    choices = []
    for name in names:
        for axis in axes:
            curves = {run.name: spread(run.curve(name, axis), points) for run in runs}
            chart = charts.line_chart(curves, name, axis)
            if chart is not None:
                choices.append({"metric": name, "axis": axis, "chart": chart})
    rows = [(run, entry) for run in runs for entry in spread(run.ledger.evaluations, ROWS_LISTED)]
    about = {
        "choices": choices,
        "drawn_metrics": list(dict.fromkeys(choice["metric"] for choice in choices)),
        "axes": [(axis, _AXES[axis]) for axis in axes if any(choice["axis"] == axis for choice in choices)],
        "untimed": "seconds" not in axes,
        "rows": rows,
        "metrics": _metric_names(runs),
        "limit": ROWS_LISTED,
        "runs": runs,
    }
    return Section("Loss", "loss", about)


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for entry in run.ledger.evaluations for name in entry.metrics))


def _alarm_section(runs: Sequence[Run]) -> Section | None:
    """Return the section with the alarms by run and kind, the rounds in order; None where there are none."""
    found: dict[str, dict[str, list[Alarm]]] = {}
    for run in runs:
        for alarm in chain.from_iterable(record.alarms for record in run.ledger.rounds):
            found.setdefault(run.name, {}).setdefault(alarm.kind, []).append(alarm)
    return Section("Alarms", "alarms", {"alarms": found, "limit": ALARMS_LISTED}) if found else None


def _note_section(runs: Sequence[Run]) -> Section | None:
    """Return the section with each note and its rounds; None where there are none."""
    rounds: dict[str, list[int]] = {}
    for run in runs:
        for record in run.ledger.rounds:
            for note in record.notes:
                rounds.setdefault(f"{run.name}: {note}", []).append(record.round)
    return Section("Notes and warnings", "notes", {"notes": rounds, "limit": ROWS_LISTED}) if rounds else None


def _settings(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """Return one row for each setting, its name and its value in each run: those that differ, and the others."""
    flat = [_flat(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [[name, *(settings.get(name, "–") for settings in flat)] for name in names]
    return {
        "differing": [row for row in rows if len(set(row[1:])) > 1],
        "alike": [row for row in rows if len(set(row[1:])) == 1],
    }


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[f"{prefix}{name}"] = "–" if value is None else text
    return found
