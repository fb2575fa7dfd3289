"""The loss of each reference set of a mixture, over the rounds of a run."""

from report.ledgers import ledger_of

from liveselect.report import Run, build_page
from liveselect.report.page import charts_of

LOSSES = {"arc": [4.0, 3.0, 2.5], "lambada <long>": [5.0, 4.9, 4.8]}


def run_of(names):
    ledger = ledger_of("RegressionSelector", [6.0, 4.0, 3.0])
    for index, record in enumerate(ledger.rounds):
        record.metrics.update({f"reference_loss/{name}": LOSSES[name][index] for name in names})
    return Run("mates", ledger)


def test_each_set_of_a_mixture_has_its_line_beside_that_of_all():
    run = run_of(LOSSES)
    (chart,) = [each for each in charts_of([run]) if "loss of the reference set" in each.description]
    lines = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in chart.traces}
    assert lines["arc"] == [(0.0, 4.0), (10.0, 3.0), (20.0, 2.5)]
    assert lines["lambada <long>"] == [(0.0, 5.0), (10.0, 4.9), (20.0, 4.8)]
    assert [y for _, y in lines["all, by their weights"]] == [3.5, 4.5, 5.5]
    page = build_page([run])
    assert "What mates learned of each reference set" in page
    row = page.split('aria-label="Loss of the reference sets"')[1].split("</table>")[0]
    assert "lambada &lt;long&gt;" in row
    assert "4.8" in row


def test_a_single_set_has_no_section_of_its_own():
    assert "of each reference set" not in build_page([run_of([])])
    assert "of each reference set" not in build_page([run_of(["arc"])])
