"""How fast a run's preferences moved from round to round."""

from liveselect.report import elements, pictures, words
from liveselect.report.choices import POINTS, spread
from liveselect.report.runs import Run

_SHOWN = {
    "drift/rank_correlation": ("Scores", "rank correlation, 1 the same order, 0 none in common, −1 turned around"),
    "drift/mixture": ("Mixture", "distance of the shares of the groups, 0 the same, 1 no group in common"),
    "drift/overlap": ("Candidates", "share of the plan that was in the plan before too"),
    "regressor/spearman": ("Regressor", "rank correlation of predicted and measured influence, held out"),
}


def how_it_moved(run: Run) -> str:
    """Return the section about consecutive rounds of one run; empty when nothing was recorded of them."""
    figures = []
    several = len({name for record in run.ledger.rounds for name in record.groups}) > 1
    for name, (title, text) in _SHOWN.items():
        points = [(float(record.round), record.metrics[name]) for record in run.ledger.rounds if name in record.metrics]
        if len(points) > 1 and (several or name != "drift/mixture"):
            line = pictures.Line(spread(points, POINTS))
            chart = pictures.bounded_chart(line, "round", f"{title} of {run.name}: {text}")
            figures.append(elements.figure(chart, title, text))
    if not figures:
        return ""
    return (
        f"<section><h2>How the preferences of {words.escaped(run.name)} moved</h2>"
        + elements.paragraph("Each round against the one before it.", "note")
        + elements.grid(figures, small=True)
        + "</section>"
    )
