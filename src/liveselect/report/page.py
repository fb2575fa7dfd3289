"""The report: one page that shows the effect and the cost of a run's data selection."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain

from jinja2 import Environment, PackageLoader, StrictUndefined

from liveselect.ledger import Alarm, spread
from liveselect.report import pictures, words
from liveselect.report.arms import arms_section
from liveselect.report.choices import choices_section, drift_section
from liveselect.report.cluster_map import map_section
from liveselect.report.cost import cost_section
from liveselect.report.runs import Axis, Run, Section, choose_metric
from liveselect.report.summary import summary_of
from liveselect.report.verdict import timed

ROWS_LISTED = 200
"""Evaluations of a run, and notes, evenly spread: a page of thousands of rows is slow and not read."""
ALARMS_LISTED = 100
"""Alarms of a kind, evenly spread."""
POINTS_DRAWN = 400
"""Points of a curve, whose picture is a few hundred pixels wide."""
SECTIONS_OF_A_RUN = (arms_section, choices_section, map_section, drift_section)
_AXES: dict[Axis, tuple[str, str]] = {
    "step": ("training steps", "training steps"),
    "seconds": ("total time", "seconds, selection included"),
    "flops": ("total FLOPs", "FLOPs, selection included"),
}


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
    known = _metric_names(runs)
    if metric is not None and metric not in known:
        raise ValueError(f"no run evaluated {metric!r}; evaluated were {', '.join(sorted(known)) or 'no metrics'}")
    metric = metric or choose_metric(runs)
    selecting = [run for run in runs if not run.is_random] or list(runs)
    sections = [
        _loss_section(runs, metric),
        cost_section(runs),
        Section("Alarms", "alarms", {"alarms": _alarms(runs), "limit": ALARMS_LISTED}),
        *(about(run) for run in selecting for about in SECTIONS_OF_A_RUN),
        Section("Notes and warnings", "notes", {"notes": _notes(runs), "limit": ROWS_LISTED}),
        Section("Settings", "settings", {"runs": runs, **_settings(runs)}),
    ]
    templates = Environment(
        loader=PackageLoader("liveselect.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=words.visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (words.number, words.decimals, words.loss, words.percent, words.duration, words.flops, words.plural)
    templates.filters |= {each.__name__: each for each in (*filters, spread)}
    shown = [section for section in sections if section is not None]
    used = [section.template for section in shown]
    templates.tests["finite"] = math.isfinite
    return templates.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        summary=summary_of(runs, metric),
        sections={name if used.count(name) == 1 else f"{name}-{i}": shown[i] for i, name in enumerate(used)},
    )


def _loss_section(runs: Sequence[Run], metric: str | None) -> Section | None:
    if metric is None:
        return None
    figures = []
    for axis, (title, label) in _AXES.items():
        if axis == "seconds" and not timed(runs):
            continue
        curves = (spread(run.curve(metric, axis), POINTS_DRAWN) for run in runs)
        lines = [
            pictures.Line(curve, index, run.name) for index, (curve, run) in enumerate(zip(curves, runs, strict=True))
        ]
        if any(line.points and line.points[-1][0] > 0 for line in lines):
            title = f"{metric} against {title}"
            description = f"{title}, for {', '.join(run.name for run in runs)}"
            figures.append((pictures.line_chart(lines, label, description, shorten=axis == "flops"), title, ""))
    rows = [(run, entry) for run in runs for entry in spread(run.ledger.evaluations, ROWS_LISTED)]
    about = {"figures": figures, "rows": rows, "metrics": _metric_names(runs), "limit": ROWS_LISTED, "runs": runs}
    return Section("Loss", "loss", {**about, "dashes": pictures.HTML_DASHES, "colours": pictures.SERIES_COLOURS})


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for entry in run.ledger.evaluations for name in entry.metrics))


def _alarms(runs: Sequence[Run]) -> dict[str, dict[str, list[Alarm]]]:
    """Return the alarms by run and kind, the rounds in order."""
    found: dict[str, dict[str, list[Alarm]]] = {}
    for run in runs:
        for alarm in chain.from_iterable(record.alarms for record in run.ledger.rounds):
            found.setdefault(run.name, {}).setdefault(alarm.kind, []).append(alarm)
    return found


def _notes(runs: Sequence[Run]) -> dict[str, list[int]]:
    """Return the rounds of each note."""
    rounds: dict[str, list[int]] = {}
    for run in runs:
        for record in run.ledger.rounds:
            for note in record.notes:
                rounds.setdefault(f"{run.name}: {note}", []).append(record.round)
    return rounds


def _settings(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """Return one row for each setting, its name and its value in each run: those that differ, and the others."""
    flat = [_flat(run.ledger.about) for run in runs]
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
