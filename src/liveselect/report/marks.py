"""Texts with the parts marked that made them score as they do."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from liveselect.report.words import visible

Mark = tuple[int, int, float]
"""Where a marked part begins and ends, in characters, and what it adds to the score."""

_FAINTEST = 0.12
"""Strength of a mark beside the strongest of its round, below which it would not be seen."""


def strongest(marks: Sequence[Sequence[Mark]]) -> float:
    """Return the largest weight of all marks, however signed; 1 where there are none."""
    return max((abs(weight) for each in marks for _, _, weight in each), default=0.0) or 1.0


def marked(text: str, marks: Sequence[Mark], largest: float) -> Markup:
    """Return a text as HTML with its marks, as strong as their weight is beside the ``largest``."""
    parts: list[Markup | str] = []
    place = 0
    for begin, end, weight in sorted(marks):
        strength = min(1.0, abs(weight) / largest)
        if not place <= begin < end <= len(text) or strength < _FAINTEST:
            continue
        kind = "up" if weight > 0 else "down"
        inside = escape(visible(text[begin:end]))
        parts.append(escape(visible(text[place:begin])))
        parts.append(Markup(f'<mark class="{kind}" style="--strength: {strength:.2f}">{inside}</mark>'))
        place = end
    return Markup("").join([*parts, escape(visible(text[place:]))])
