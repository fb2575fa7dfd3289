"""``liveselect report``: one page about one or several runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write one self-contained HTML page about one or several runs: loss against steps and against total cost, what was
measured and chosen in each round, and where the cost went. A run that chose at random is the baseline of the others.
"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="liveselect report", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a ledger.jsonl, or a folder that holds some")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="where to write (default: %(default)s)")
    parser.add_argument("--metric", help="what to compare by, smaller is better (default: val_loss)")
    arguments = parser.parse_args(argv)

    from liveselect.cli.output import say
    from liveselect.report import write_report

    page = write_report(arguments.runs, arguments.out, arguments.metric)
    say(f"Wrote {page}. Open it in a browser: {page.resolve().as_uri()}")
    return 0
