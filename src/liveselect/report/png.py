"""The pictures of the report as PNG files, in the colours of the light page."""

import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

DPI = 200


class PictureFiles:
    """Writes figures to a folder, one file for each, named by what they show.

    Args:
        folder: made if need be.
        colours: what the stand-in colours of the pictures (``#rrggbb``) look like.
    """

    def __init__(self, folder: Path, colours: dict[str, str]) -> None:
        self.folder = folder
        self.written: list[Path] = []
        self._colours = colours

    def write(self, figure: Figure, description: str) -> None:
        """Write a figure, with a title and the names of its lines; it is as it was afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]+", "-", description.lower()).strip("-")[:80].strip("-")
        path = self.folder / f"{len(self.written) + 1:03d}-{name}.png"
        with _explained(figure, description), _coloured(figure, self._colours):
            figure.savefig(path, dpi=DPI, facecolor="white")
        self.written.append(path)


@contextmanager
def _explained(figure: Figure, description: str) -> Iterator[None]:
    """Say in the picture what stands beside it in the page."""
    title = figure.suptitle(textwrap.fill(description, round(15 * figure.get_figwidth())), fontsize=8.5)
    title.set_parse_math(False)
    legends = []
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[1]:
            legends.append(axes.legend(fontsize=7.5, frameon=False))
            for text in legends[-1].get_texts():
                text.set_parse_math(False)
    try:
        yield
    finally:
        for legend in legends:
            legend.remove()
        title.remove()
        figure._suptitle = None  # type: ignore[attr-defined]


@contextmanager
def _coloured(figure: Figure, colours: dict[str, str]) -> Iterator[None]:
    undo: list[tuple[Callable[[Any], object], Any]] = []
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            undo += _recolour(artist, name, colours)
    try:
        yield
    finally:
        for put_back, value in reversed(undo):
            put_back(value)


def _recolour(artist: Artist, name: str, colours: dict[str, str]) -> list[tuple[Callable[[Any], object], Any]]:
    get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
    if get is None or put is None:
        return []
    before = get()
    try:
        rows = [before] if isinstance(before, str) or not hasattr(before[0], "__len__") else list(before)
        rgba = [to_rgba(row) for row in rows]
    except (ValueError, TypeError, IndexError):  # no colour, such as 'auto'
        return []
    known = [colours.get(to_hex(row)) for row in rgba]
    if not any(known):
        return []
    after = [to_rgba(new, row[3]) if new else row for new, row in zip(known, rgba, strict=True)]
    put(after[0] if len(after) == 1 else after)
    return [(put, before)]
