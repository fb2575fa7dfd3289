"""Pictures of the report: SVG inside the page, in the colours of the page.

Pictures hold numbers and fixed labels only; names and texts of the user are in the HTML around them.
"""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from liveselect.ledger import Histogram
from liveselect.report.runs import Point
from liveselect.report.words import visible

_CSS = resources.files("liveselect.report").joinpath("templates/style.css").read_text(encoding="utf-8")
_PALETTE = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", _CSS.split("@media")[0]))
"""Colours of the light page by name. Pictures are drawn in them; in the page each becomes its CSS variable."""
_INK, _MUTED = _PALETTE["ink"], _PALETTE["muted"]
_SERIES = [colour for name, colour in _PALETTE.items() if name.startswith("series-")]
SERIES_COLOURS = len(_SERIES)
_DASHES = ("solid", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))  # colour is never the only difference
HTML_DASHES = ("none", "9 3", "3 3", "11 3 3 3")  # the same for the legend in the page
_MARKERS = ("o", "s", "^", "D")
MAX_POINTS_WITH_MARKERS = 60
"""A line of more points has no markers, which would hide it."""
PNG_DOTS_PER_INCH = 200

_STYLE = {
    "svg.fonttype": "none",
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

_png_files: ContextVar[tuple[Path, list[Path]] | None] = ContextVar("_png_files", default=None)


@contextmanager
def written_to(folder: Path) -> Iterator[list[Path]]:
    """Also write each picture of the block to ``folder`` as a PNG file in light colours; yield a list of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    token = _png_files.set((folder, written))
    try:
        yield written
    finally:
        _png_files.reset(token)


@dataclass(frozen=True)
class Line:
    """One line of a chart: its points, the number of its colour, dash and marker, and the name of its run."""

    points: Sequence[Point]
    colour: int = 0
    name: str = ""


def line_chart(lines: Sequence[Line], x_label: str, description: str, shorten: bool = False) -> Markup:
    """Return a chart of the lines; ``shorten`` writes large numbers on the x axis with G, T and so on."""
    with _picture(3.5, 2.6, description) as (axes, finish):
        for line in lines:
            style = line.colour % len(_DASHES)
            axes.plot(
                [x for x, _ in line.points],
                [y for _, y in line.points],
                color=_SERIES[line.colour % SERIES_COLOURS],
                linestyle=_DASHES[style],
                marker=_marker(_MARKERS[style], line.points),
                label=f" {line.name}",  # matplotlib hides labels that begin with an underscore
            )
        _room_for_flat_lines(axes, [y for line in lines for _, y in line.points])
        axes.set_xlabel(x_label)
        whole = all(float(x).is_integer() for line in lines for x, _ in line.points)  # steps and rounds have no halves
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
        if shorten:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return finish()


def bounded_chart(points: Sequence[Point], description: str) -> Markup:
    """Return a small chart over rounds of a number in -1..1, on an axis that includes zero."""
    values = [y for _, y in points if math.isfinite(y)]
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:  # zero throughout
        high = 1.0
    room = 0.08 * (high - low)
    with _picture(2.6, 1.7, description) as (axes, finish):
        axes.plot(*zip(*points, strict=True), color=_SERIES[0], marker=_marker("o", points))
        axes.set_ylim(low - (room if low < 0 else 0.0), high + (room if high > 0 else 0.0))
        axes.axhline(0.0, color=_MUTED, linewidth=0.8)
        _round_axis(axes)
        return finish()


def histogram(scores: Histogram, x_label: str, description: str) -> Markup:
    """Return the histogram of all scores with that of the chosen ones in front."""
    with _picture(2.6, 1.9, description) as (axes, finish):
        axes.stairs(scores.counts, scores.edges, fill=True, color=_MUTED, alpha=0.45, label="compared")
        axes.stairs(scores.chosen, scores.edges, fill=True, color=_SERIES[0], alpha=0.9, label="chosen")
        _count_axis(axes, x_label)
        return finish()


def value_histogram(values: Sequence[float], x_label: str, description: str) -> Markup:
    """Return the histogram of finite ``values``, with a line at zero if they lie on both sides of it."""
    values = [value for value in values if math.isfinite(value)]
    with _picture(2.6, 1.9, description) as (axes, finish):
        axes.hist(values, bins=min(40, max(8, math.isqrt(2 * len(values)))), color=_SERIES[1], alpha=0.9)
        if values and min(values) < 0 < max(values):
            axes.axvline(0.0, color=_INK, linewidth=1.0, linestyle=(0, (2, 2)))
        _count_axis(axes, x_label)
        return finish()


def shares(rounds: Sequence[int], chosen: Sequence[float], available: Sequence[float], top: float, text: str) -> Markup:
    """Return one source's share of the chosen over the rounds, and of the available; the axis ends at ``top``."""
    with _picture(2.6, 1.7, text) as (axes, finish):
        axes.plot(rounds, available, color=_MUTED, linestyle=(0, (2, 2)), linewidth=1.5, label="of the available")
        axes.plot(rounds, chosen, color=_SERIES[0], marker=_marker("o", rounds), label="of the chosen")
        axes.set_ylim(0, max(top, 0.01) * 1.05)
        _round_axis(axes)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        return finish()


def interval_chart(
    rows: Sequence[tuple[str, Sequence[tuple[float, float] | None]]], names: Sequence[str], x_label: str, text: str
) -> Markup:
    """Return a chart of rows with names, each of one number with half the width of its interval for each of ``names``.

    Zero is marked. The names are in the picture, which is made for a file.
    """
    height = 0.7 + 0.12 * len(rows) * (1 + len(names))
    with _picture(5.5, height, text) as (axes, finish):
        for index, name in enumerate(names):
            there = [(place, row[index]) for place, (_, row) in enumerate(rows)]
            axes.errorbar(
                [found[0] for _, found in there if found is not None],
                [place + 0.22 * (index - (len(names) - 1) / 2) for place, found in there if found is not None],
                xerr=[found[1] for _, found in there if found is not None],
                fmt=_MARKERS[index % len(_MARKERS)],
                color=_SERIES[index % SERIES_COLOURS],
                label=name,
                capsize=2,
            )
        axes.axvline(0.0, color=_MUTED, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x_label)
        return finish()


def scatter(
    places: Sequence[Sequence[float]], values: Sequence[float], sizes: Sequence[float], description: str
) -> Markup:
    """Return dots at ``places (K, 2)``: their colour and strength show ``values`` in -1..1 (NaN: none), their area
    ``sizes`` in 0..1.
    """
    with _picture(3.0, 2.8, description) as (axes, finish):
        order = sorted(range(len(sizes)), key=lambda index: -sizes[index])  # large dots go below small ones
        colours = [_shade(values[index]) for index in order]
        area = [8 + 900 * sizes[index] for index in order]
        axes.scatter([places[i][0] for i in order], [places[i][1] for i in order], s=area, c=colours, linewidths=0)
        axes.set_axis_off()
        axes.margins(0.12)
        return finish()


def _marker(kind: str, points: Sequence[object]) -> str:
    return kind if len(points) <= MAX_POINTS_WITH_MARKERS else ""


def _room_for_flat_lines(axes: Axes, values: Sequence[float]) -> None:
    """Make an axis span at least a hundredth of its values, so that rounding does not look like a change."""
    if values:
        middle, least = (min(values) + max(values)) / 2, 0.005 * (max(map(abs, values)) or 1.0)
        if (max(values) - min(values)) / 2 < least:
            axes.set_ylim(middle - least, middle + least)


def _shade(value: float) -> tuple[float, float, float, float]:
    if math.isnan(value):
        return to_rgba(_MUTED, 0.25)
    return to_rgba(_SERIES[0 if value >= 0 else 1], 0.2 + 0.75 * min(1.0, abs(value)))


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _count_axis(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel("candidates")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(visible=False, axis="x")


@contextmanager
def _picture(width: float, height: float, description: str) -> Iterator[tuple[Axes, Callable[[], Markup]]]:
    """Open axes of ``width`` by ``height`` inches, in a fixed style, and yield them and a function to SVG."""
    with matplotlib.style.context({**_STYLE, "svg.hashsalt": description}, after_reset=True):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(), partial(_finished, figure, description)


def _finished(figure: Figure, description: str) -> Markup:
    """Return the figure as an element of an HTML page: without references, in the page's colours and fonts."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r"#([\w.]+)", svg))  # ids must be unique in the page, and matplotlib repeats unused ones
    svg = re.sub(r'\sid="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    for name, colour in _PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    if (files := _png_files.get()) is not None:
        _write_png(figure, description, *files)
    return Markup('<svg role="img" aria-label="{}"{}').format(visible(description), Markup(svg.strip()[len("<svg") :]))


def _write_png(figure: Figure, description: str, folder: Path, written: list[Path]) -> None:
    """Write a figure with a title and a legend, which the page has in its HTML."""
    figure.suptitle(textwrap.fill(description, round(15 * figure.get_figwidth())))
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    name = re.sub(r"[^\w.-]+", "-", description.lower()).strip("-")[:80].strip("-")
    written.append(folder / f"{len(written) + 1:03d}-{name}.png")
    figure.savefig(written[-1], dpi=PNG_DOTS_PER_INCH, facecolor="white")
