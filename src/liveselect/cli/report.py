"""``liveselect report``: one page about one or several runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """\
Write one self-contained HTML page about one or several runs: loss against steps and against total cost, what was
measured and chosen in each round, and where the cost went. A run that chose at random is the baseline of the others.
"""

RUN = """\
folder of a run: the log folder (lightning_logs/version_0, PROJECT/ID or wandb/run-DATE-ID of W&B), or any folder that
holds a ledger.jsonl at some depth, or that file"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="liveselect report", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUN)
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page, or a folder for it (default: %(default)s)"
    )
    parser.add_argument("--name", nargs="+", default=[], metavar="NAME", help="names of the runs, in their order")
    parser.add_argument("--metric", help="metric to compare by, smaller is better (default: val_loss)")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write only the pictures, as PNG files")
    arguments = parser.parse_args(argv)

    from liveselect.cli.output import say
    from liveselect.report import is_report, write_pictures, write_report

    if arguments.png is not None:
        written = write_pictures(arguments.runs, arguments.png, arguments.metric, arguments.name)
        say(f"Wrote {len(written)} pictures to {arguments.png}")
        return 0
    there = arguments.out / "report.html" if arguments.out.is_dir() else arguments.out
    replaces = there.exists()
    if replaces and not is_report(there):
        raise FileExistsError(f"{there} exists and is no report of liveselect: choose another name with --out")
    page = write_report(arguments.runs, arguments.out, arguments.metric, arguments.name)
    say(f"{'Replaced the report' if replaces else 'Wrote'} {page}. Open it in a browser: {page.resolve().as_uri()}")
    return 0
