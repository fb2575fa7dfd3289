"""Charts as PNG files, in the light colours of the page."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from liveselect.report.charts import MAX_POINTS_WITH_MARKERS, Chart, Scale, Trace, dot_colour

_CSS = resources.files("liveselect.report").joinpath("templates/style.css").read_text(encoding="utf-8")
_PALETTE = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", _CSS.split("}")[0]))
"""Colours of the light page by name."""
_INK, _MUTED = _PALETTE["ink"], _PALETTE["muted"]
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D")
DOTS_PER_INCH = 200

_STYLE = {
    "font.size": 9.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _PALETTE["line"],
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.titlesize": 8.5,
}


def write_png(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write each chart to a file of ``folder``, with its title and a legend, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, chart in enumerate(charts, 1):
        name = re.sub(r"[^\w.-]+", "-", chart.description.lower()).strip("-")[:80].strip("-")
        written.append(folder / f"{number:03d}-{name}.png")
        with _picture(*chart.inches, chart.description, written[-1]) as axes:
            _draw(chart, axes)
    return written


def write_intervals(
    rows: Sequence[tuple[str, Sequence[tuple[float, float] | None]]],
    names: Sequence[str],
    x_label: str,
    title: str,
    path: Path,
) -> None:
    """Write a chart of rows with names, each of one number with half the width of its interval for each of ``names``.

    Zero is marked.
    """
    height = 0.7 + 0.12 * len(rows) * (1 + len(names))
    with _picture(5.5, height, title, path) as axes:
        for index, name in enumerate(names):
            there = [(place, row[index]) for place, (_, row) in enumerate(rows)]
            axes.errorbar(
                [found[0] for _, found in there if found is not None],
                [place + 0.22 * (index - (len(names) - 1) / 2) for place, found in there if found is not None],
                xerr=[found[1] for _, found in there if found is not None],
                fmt=_MARKERS[index % len(_MARKERS)],
                color=_PALETTE[f"series-{index % 6}"],
                label=name,
                capsize=2,
            )
        axes.axvline(0.0, color=_MUTED, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)


def _draw(chart: Chart, axes: Axes) -> None:
    for trace in chart.traces:
        if trace.kind == "bars":
            colour = _PALETTE[trace.colour]
            axes.stairs(trace.y, trace.x, fill=True, color=colour, alpha=trace.opacity, label=trace.name)
        elif trace.kind == "dots":
            shades = [_shade(value) for value in trace.values]
            axes.scatter(trace.x, trace.y, s=[8 + 900 * size for size in trace.sizes], c=shades, linewidths=0)
        else:
            _draw_line(trace, axes)
    if not chart.has_axes:
        axes.set_axis_off()
        axes.margins(0.12)
        return
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    _set_scale(axes, "x", chart.x_scale)
    _set_scale(axes, "y", chart.y_scale)
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    if chart.zero == "x":
        axes.axvline(0.0, color=_INK, linewidth=1.0, linestyle=(0, (2, 2)))
    if chart.zero == "y":
        axes.axhline(0.0, color=_MUTED, linewidth=0.8)


def _draw_line(trace: Trace, axes: Axes) -> None:
    style = trace.style % len(_DASHES)
    axes.plot(
        trace.x,
        trace.y,
        color=_PALETTE[trace.colour],
        linestyle=_DASHES[style],
        marker=_MARKERS[style] if len(trace.x) <= MAX_POINTS_WITH_MARKERS else "",
        label=f" {trace.name}" if trace.name else "",  # matplotlib hides labels that begin with an underscore
    )


def _set_scale(axes: Axes, name: str, scale: Scale) -> None:
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, integer=scale == "whole"))
    if scale == "flops":
        axis.set_major_formatter(EngFormatter(sep=""))
    if scale == "percent":
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _shade(value: float) -> tuple[float, float, float, float]:
    name = dot_colour(value)
    return to_rgba(_PALETTE[name], 0.25 if name == "muted" else 0.2 + 0.75 * min(1.0, abs(value)))


@contextmanager
def _picture(width: float, height: float, title: str, path: Path) -> Iterator[Axes]:
    """Yield axes of ``width`` by ``height`` inches in a fixed style, and write them to a file with what was drawn."""
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        yield axes
        figure.suptitle(textwrap.fill(title, round(15 * width)))
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
        figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
