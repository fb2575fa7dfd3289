"""Charts of the report: what is drawn, and what the page's script needs to draw it."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from liveselect.ledger import Histogram
from liveselect.report import words
from liveselect.report.runs import Point
from liveselect.report.words import visible

SERIES_COLOURS = 6
"""Colours for series in the style sheet: ``--series-0`` to ``--series-5``."""
DASHES = ("solid", "dash", "dot", "dashdot")
"""Colour is never the only difference between two lines."""
MARKERS = ("circle", "square", "triangle-up", "diamond")
MAX_POINTS_WITH_MARKERS = 60
"""A line of more points has no markers, which would hide it."""
_DIGITS = 7
"""Significant digits of a coordinate: more would only make the page larger."""
_TIME_UNITS = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (120.0, 60.0, "minutes"))
"""From how many seconds on a time axis counts which unit."""

_WHOLE_TICKS = 12
"""A span of whole numbers up to which fractions would be written between them."""

Scale = Literal["number", "whole", "flops", "percent"]


@dataclass(frozen=True)
class Trace:
    """One set of points, or of bars.

    Attributes:
        x: ``(n,)``; of bars their edges, ``(n + 1,)``.
        y: ``(n,)``.
        name: in the legend, none if empty.
        colour: name of a colour in the style sheet.
        style: number of its dash and marker.
        kind: line, bars, or dots.
        opacity: of the whole trace.
        sizes: of dots, ``(n,)``, areas in 0..1.
        values: of dots, ``(n,)`` in -1..1, shown as colour and strength; NaN for none.
        labels: of dots, ``(n,)``.
    """

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    colour: str = "series-0"
    style: int = 0
    kind: Literal["line", "bars", "dots"] = "line"
    opacity: float = 1.0
    sizes: Sequence[float] = ()
    values: Sequence[float] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart: its traces and axes.

    Attributes:
        description: what it shows, for those who do not see it.
        traces: drawn in this order.
        x_label: below the horizontal axis.
        y_label: beside the vertical axis.
        x_scale: how numbers on the horizontal axis are written.
        y_scale: the same of the vertical axis.
        y_range: ends of the vertical axis, None for those of the data.
        zero: an axis with a line at its zero: ``x`` or ``y``; empty for none.
        inches: width and height as a file.
        large: whether it has a legend and tools in the page.
    """

    description: str
    traces: Sequence[Trace]
    x_label: str = ""
    y_label: str = ""
    x_scale: Scale = "number"
    y_scale: Scale = "number"
    y_range: tuple[float, float] | None = None
    zero: Literal["", "x", "y"] = ""
    inches: tuple[float, float] = (2.6, 1.9)
    large: bool = False

    @property
    def has_axes(self) -> bool:
        """Whether the places of its traces are numbers that mean something."""
        return all(trace.kind != "dots" for trace in self.traces)

    def figure(self) -> dict[str, object]:
        """Return the chart as plotly takes it; colours are names of CSS variables, which the page's script resolves."""
        return {"data": [self._trace(trace) for trace in self.traces], "layout": self._layout()}

    def _layout(self) -> dict[str, object]:
        xs, ys = ([value for trace in self.traces for value in values(trace)] for values in (_xs, _ys))
        x: dict[str, object] = {"title": {"text": _plain(self.x_label)}, **_ticks(self.x_scale, xs)}
        y: dict[str, object] = {"title": {"text": _plain(self.y_label)}, **_ticks(self.y_scale, ys)}
        if self.y_range is not None:
            y["range"] = [*self.y_range]
        for name, axis in (("x", x), ("y", y)):
            axis["zeroline"] = self.zero == name
            axis["visible"] = self.has_axes
        if not self.has_axes:
            y |= {"scaleanchor": "x", "scaleratio": 1}
        unified = self.has_axes and all(trace.kind == "line" for trace in self.traces)
        return {
            "xaxis": x,
            "yaxis": y,
            "hovermode": "x unified" if unified else "closest",
            "hoverdistance": -1 if unified else 20,  # the nearest point, however far the pointer is from it
            "barmode": "overlay",
            "showlegend": self.large,
        }

    def _trace(self, trace: Trace) -> dict[str, object]:
        colour = f"var(--{trace.colour})"
        shown: dict[str, object] = {"name": _plain(trace.name), "opacity": trace.opacity}
        if trace.kind == "bars":
            edges = np.asarray(trace.x, dtype=np.float64)
            texts = [f"{words.number(low)} to {words.number(high)}" for low, high in pairwise(edges)]
            return {
                **shown,
                "type": "bar",
                "x": _short(((edges[1:] + edges[:-1]) / 2).tolist()),
                "width": _short(np.diff(edges).tolist()),
                "y": _short(trace.y),
                "marker": {"color": colour, "line": {"width": 0}},
                "customdata": texts,
                "hovertemplate": f"%{{customdata}}<br>%{{y}} {_plain(trace.name)}<extra></extra>",
            }
        if trace.kind == "dots":
            strengths = [abs(value) if math.isfinite(value) else 0.0 for value in trace.values]
            return {
                **shown,
                "type": "scatter",
                "mode": "markers",
                "x": _short(trace.x),
                "y": _short(trace.y),
                "text": [_plain(label) for label in trace.labels],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {
                    "size": [round(6 + 34 * size**0.5, 1) for size in trace.sizes],
                    "color": [f"var(--{dot_colour(value)})" for value in trace.values],
                    "opacity": [round(0.2 + 0.7 * min(1.0, strength), 2) for strength in strengths],
                    "line": {"width": 0},
                },
            }
        few = len(trace.x) <= MAX_POINTS_WITH_MARKERS
        style = trace.style % len(DASHES)
        value = {"percent": "%{y:.1%}", "number": "%{y:.4~f}"}.get(self.y_scale, "%{y}")
        return {
            **shown,
            "type": "scatter",
            "mode": "lines+markers" if few else "lines",
            "x": _short(trace.x),
            "y": _short(trace.y),
            "line": {"color": colour, "dash": DASHES[style], "width": 2},
            "marker": {"symbol": MARKERS[style], "size": 7 if self.large else 5},
            "hovertemplate": f"{value}<extra>{_plain(trace.name)}</extra>",
        }


def dot_colour(value: float) -> str:
    """Return the name of the colour of a dot: above zero, below it, or unknown."""
    return "muted" if math.isnan(value) else "series-0" if value >= 0 else "series-1"


def line_chart(curves: Mapping[str, Sequence[Point]], metric: str, axis: str) -> Chart | None:
    """Return the chart of a metric of several runs against ``step``, ``seconds`` or ``flops``; None for no curves."""
    if not any(points and points[-1][0] > 0 for points in curves.values()):
        return None
    unit, label = 1.0, {"step": "training steps", "flops": "FLOPs, selection included"}.get(axis, "")
    if axis == "seconds":
        longest = max(points[-1][0] for points in curves.values() if points)
        unit, label = next(((unit, name) for least, unit, name in _TIME_UNITS if longest >= least), (1.0, "seconds"))
        label += ", selection included"
    traces = [
        Trace([x / unit for x, _ in points], [y for _, y in points], name, f"series-{index % SERIES_COLOURS}", index)
        for index, (name, points) in enumerate(curves.items())
    ]
    against = {"step": "training steps", "seconds": "total time", "flops": "total FLOPs"}[axis]
    return Chart(
        f"{metric} against {against}, for {', '.join(curves)}",
        traces,
        label,
        metric,
        x_scale={"step": "whole", "flops": "flops"}.get(axis, "number"),  # type: ignore[arg-type]
        y_range=_room_for_flat_lines([y for points in curves.values() for _, y in points]),
        inches=(5.0, 3.2),
        large=True,
    )


def bounded_chart(points: Sequence[Point], description: str) -> Chart:
    """Return a small chart over rounds of a number in -1..1, on an axis that includes zero."""
    values = [y for _, y in points if math.isfinite(y)]
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:  # zero throughout
        high = 1.0
    room = 0.08 * (high - low)
    ends = (low - (room if low < 0 else 0.0), high + (room if high > 0 else 0.0))
    trace = Trace([x for x, _ in points], [y for _, y in points])
    return Chart(description, [trace], "round", x_scale="whole", y_range=ends, zero="y", inches=(2.6, 1.7))


def histogram(scores: Histogram, x_label: str, description: str) -> Chart:
    """Return the histogram of all scores with that of the chosen ones in front."""
    traces = [
        Trace(scores.edges, scores.counts, "compared", "muted", kind="bars", opacity=0.45),
        Trace(scores.edges, scores.chosen, "chosen", "series-0", kind="bars", opacity=0.9),
    ]
    return Chart(description, traces, x_label, "candidates", y_scale="whole")


def value_histogram(values: Sequence[float], x_label: str, description: str) -> Chart:
    """Return the histogram of finite ``values``, with a line at zero if they lie on both sides of it."""
    values = [value for value in values if math.isfinite(value)]
    counts, edges = np.histogram(values, bins=min(40, max(8, math.isqrt(2 * len(values)))))
    trace = Trace(edges.tolist(), counts.tolist(), "measured", "series-1", kind="bars", opacity=0.9)
    both = bool(values) and min(values) < 0 < max(values)
    return Chart(description, [trace], x_label, "candidates", y_scale="whole", zero="x" if both else "")


def shares(rounds: Sequence[int], chosen: Sequence[float], available: Sequence[float], top: float, text: str) -> Chart:
    """Return one source's share of the chosen over the rounds, and of the available; the axis ends at ``top``."""
    traces = [
        Trace(rounds, available, "of the available", "muted", 2),
        Trace(rounds, chosen, "of the chosen", "series-0"),
    ]
    ends = (0.0, max(top, 0.01) * 1.05)
    return Chart(text, traces, "round", x_scale="whole", y_scale="percent", y_range=ends, inches=(2.6, 1.7))


def scatter(
    places: Sequence[Sequence[float]],
    values: Sequence[float],
    sizes: Sequence[float],
    labels: Sequence[str],
    description: str,
) -> Chart:
    """Return dots at ``places (K, 2)``: their colour and strength show ``values`` in -1..1 (NaN: none), their area
    ``sizes`` in 0..1.
    """
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])  # large dots go below small ones
    trace = Trace(
        [places[i][0] for i in order],
        [places[i][1] for i in order],
        kind="dots",
        sizes=[sizes[i] for i in order],
        values=[values[i] for i in order],
        labels=[labels[i] for i in order],
    )
    return Chart(description, [trace], inches=(3.0, 2.8))


def _room_for_flat_lines(values: Sequence[float]) -> tuple[float, float] | None:
    """Return ends that span at least a hundredth of the values, so that rounding does not look like a change."""
    if not values:
        return None
    middle, least = (min(values) + max(values)) / 2, 0.005 * (max(map(abs, values)) or 1.0)
    return (middle - least, middle + least) if (max(values) - min(values)) / 2 < least else None


def _xs(trace: Trace) -> Sequence[float]:
    return trace.x


def _ys(trace: Trace) -> Sequence[float]:
    return [0.0, *trace.y] if trace.kind == "bars" else trace.y


def _ticks(scale: Scale, values: Sequence[float]) -> dict[str, object]:
    """Return how an axis of these values is divided and written."""
    if scale == "percent":
        return {"tickformat": ".0%"}
    if scale == "flops":
        return {"tickformat": "~s", "hoverformat": ".3~s"}
    if scale == "number":
        return {"hoverformat": ".4~g"}
    found: dict[str, object] = {"tickformat": ",~f", "hoverformat": ",~f"}
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high - low <= _WHOLE_TICKS:  # steps and rounds have no halves
        found["dtick"] = 1 if high - low <= _WHOLE_TICKS / 2 else 2
    if high == low:
        found["range"] = [low - 1, high + 1]
    return found


def _short(values: Sequence[float]) -> list[float | None]:
    """Return numbers with few digits; None for those that JSON has no word for."""
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in map(float, values)]


def _plain(text: str) -> str:
    """Return a text in which plotly finds no tags of its own."""
    return html.escape(str(visible(text)), quote=False)
