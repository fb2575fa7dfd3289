"""Pieces of HTML. Whatever is called ``html`` is markup already; every other text is escaped here."""

from collections.abc import Iterable, Mapping, Sequence

from liveselect.report.words import escaped

LINE_KEY = (
    '<svg viewBox="0 0 40 10" aria-hidden="true"><line x1="0" y1="5" x2="40" y2="5" stroke="{colour}" '
    'stroke-width="2.5" stroke-dasharray="{dash}"/></svg>'
)
AREA_KEY = (
    '<svg viewBox="0 0 40 10" aria-hidden="true">'
    '<rect width="40" height="10" fill="{colour}" opacity="{opacity}"/></svg>'
)


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of the given class."""
    return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def bullets(texts: Iterable[str], kind: str = "") -> str:
    """Return a list."""
    return f'<ul class="{kind}">' + "".join(f"<li>{escaped(text)}</li>" for text in texts) + "</ul>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str,
    total: bool = False,
    bars: tuple[int, Sequence[float]] | None = None,
) -> str:
    """Return a table that scrolls sideways where it is too wide; cells are HTML, the last row may be a total.

    Args:
        columns: their names.
        rows: of cells.
        caption: for readers that do not see it.
        total: whether the last row is one.
        bars: a column, and for each of the first rows a share of one that is drawn behind its cell.
    """
    rows = list(rows)
    at, shares = bars or (-1, ())
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in columns)
    body = []
    for index, row in enumerate(rows):
        cells = [f"<td>{cell}</td>" for cell in row]
        if index < len(shares):
            width = 100 * max(0.0, min(1.0, shares[index]))
            cells[at] = f'<td class="bar" style="--share: {width:.1f}%">{row[at]}</td>'
        kind = ' class="total"' if total and index == len(rows) - 1 else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def tiles(entries: Iterable[tuple[str, str, str, str]]) -> str:
    """Return numbers that stand out; each is (what it is, the number, what to hold it against, a class)."""
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div><dt>{escaped(name)}</dt><dd class="{kind}">{escaped(value)}</dd><dd>{escaped(text)}</dd></div>'
            for name, value, text, kind in entries
        )
        + "</dl>"
    )


def stack(parts: Sequence[tuple[float, str]], whole: float) -> str:
    """Return one bar made of parts, each an amount and a colour (CSS), on a scale that ends at ``whole``."""
    spans = "".join(
        f'<span style="width: {100 * amount / whole:.2f}%; background: {colour}"></span>'
        for amount, colour in parts
        if whole > 0 and amount > 0
    )
    return f'<div class="stack" aria-hidden="true">{spans}</div>'


def figure(picture_html: str, title: str, text: str = "") -> str:
    """Return a picture under its title."""
    name = escaped(title or "(no name)")
    return f"<figure><figcaption><b>{name}</b> {escaped(text)}</figcaption>{picture_html}</figure>"


def grid(figures_html: Iterable[str], small: bool = False) -> str:
    """Return figures side by side as far as the width allows."""
    return f'<div class="charts{" small" if small else ""}">' + "".join(figures_html) + "</div>"


def legend(keys: Mapping[str, str]) -> str:
    """Return the meaning of colours: the sign (HTML) for each text."""
    return "<p>" + "".join(f'<span class="key">{html}{escaped(text)}</span>' for text, html in keys.items()) + "</p>"


def search(label: str) -> str:
    """Return a search box for the examples of the section that it stands in; it appears where scripts may run."""
    return (
        f'<p class="search" hidden><label>{escaped(label)} <input type="search" autocomplete="off"></label> '
        '<output aria-live="polite"></output></p>'
    )


def details(summary: str, html: str, is_open: bool = False) -> str:
    """Return a part that unfolds."""
    return f"<details{' open' if is_open else ''}><summary>{escaped(summary)}</summary>{html}</details>"


def article(header: Iterable[str], text: str, kind: str) -> str:
    """Return a text of the pool under facts about it."""
    facts = "".join(f"<span>{escaped(fact)}</span>" for fact in header)
    return f'<article class="{kind}"><header>{facts}</header><pre dir="auto">{escaped(text)}</pre></article>'
