"""The table at the end of the demo."""

from rich.console import Console
from rich.table import Table

from liveselect.cli.output import say
from liveselect.report import Run, verdict, words
from liveselect.report.runs import Axis

METRIC = "val_loss"
ROW_LABELS: dict[Axis, str] = {
    "step": "after {}",
    "seconds": "at equal total time, {}",
    "flops": "at equal total cost, {}",
}


def show_verdict(runs: list[Run], seed: int) -> None:
    """Print the outcome, for or against selection."""
    baseline, other = runs
    table = Table(title=f"Held-out prose, loss in nats per token (seed {seed})", title_justify="left")
    for column in ("", baseline.name, other.name):
        table.add_column(column, justify="left" if not column else "right")
    for axis, text in ROW_LABELS.items():
        found = verdict.compare(baseline, other, METRIC, axis)
        if found is not None:
            where = text.format(words.place(axis, found.at))
            table.add_row(where, words.loss(found.baseline), words.loss(found.other))
    table.add_section()
    if verdict.timed(runs):
        table.add_row("total time, validation aside", *(words.duration(run.total_seconds) for run in runs))
        shares = [run.ledger.selection_share for run in runs]
    else:
        table.add_row("total cost", *(words.flops(run.total_flops) for run in runs))
        shares = [run.ledger.selection_flops_share for run in runs]
    table.add_row("selection's share of it", *(words.percent(share) for share in shares))
    if any(run.ledger.before_seconds for run in runs) and verdict.timed(runs):
        spent = [sum(run.ledger.before_seconds.values()) for run in runs]
        table.add_row("part of it before training", *(words.duration(seconds) for seconds in spent))
    Console().print(table)
    say(verdict.headline(runs, METRIC))
    for text in verdict.caveats(runs, METRIC):
        say(text)
