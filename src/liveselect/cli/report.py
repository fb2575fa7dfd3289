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
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page, or a folder for it (default: %(default)s)"
    )
    parser.add_argument("--metric", help="what to compare by, smaller is better (default: val_loss)")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write the pictures alone, as PNG files")
    arguments = parser.parse_args(argv)

    from liveselect.cli.output import say
    from liveselect.report import write_pictures, write_report

    if arguments.png is not None:
        written = write_pictures(arguments.runs, arguments.png, arguments.metric)
        say(f"Wrote {len(written)} pictures to {arguments.png}")
        return 0
    page = write_report(arguments.runs, arguments.out, arguments.metric)
    say(f"Wrote {page}. Open it in a browser: {page.resolve().as_uri()}")
    return 0
