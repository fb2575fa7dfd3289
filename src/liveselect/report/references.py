"""The loss of each reference set over the rounds of a run."""

from liveselect.ledger import spread
from liveselect.report import charts
from liveselect.report.runs import Point, Run, Section

POINTS_DRAWN = 400
"""Points of a curve, whose chart is a few hundred pixels wide."""
_OF_A_SET = "reference_loss/"
_OF_ALL = ("reference_loss", "reference_loss_zero_step")


def references_section(run: Run) -> Section | None:
    """Return the section with a line for each set of a mixture, and one for all; None where there is a single set."""
    curves: dict[str, list[Point]] = {}
    for record in run.ledger.rounds:
        for name, value in record.metrics.items():
            shown = "all, by their weights" if name in _OF_ALL else name.removeprefix(_OF_A_SET)
            if name in _OF_ALL or name.startswith(_OF_A_SET):
                curves.setdefault(shown, []).append((float(record.step), value))
    sets = [name for name in curves if name != "all, by their weights"]
    if len(sets) < 2:
        return None
    drawn = {name: spread(points, POINTS_DRAWN) for name, points in curves.items()}
    chart = charts.line_chart(drawn, "loss of the reference set", "step")
    if chart is None:
        return None
    ends = [(name, curves[name][0][1], curves[name][-1][1]) for name in curves]
    return Section(f"What {run.name} learned of each reference set", "references", {"chart": chart, "ends": ends})
