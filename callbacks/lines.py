"""What liveselect says while a model trains: lines that people see without setting up any logging.

The logger is not a child of Lightning's: lines of that one appear twice where logging was set up before Lightning was
imported, and never reach what was set up after it.
"""

import logging
import sys
from typing import TextIO

from liveselect.ledger import RoundRecord

LOGGER = "liveselect"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment, since live displays put themselves in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        self.stream = sys.stderr
        super().emit(record)


def show_lines(always: bool = False) -> None:
    """Let what liveselect logs from INFO on appear on standard error, unless logging was set up, as Lightning does.

    Whoever set up logging, of the root or of ``liveselect``, decides what is shown and where. Commands, which own their
    process, show the lines ``always``.
    """
    logger, set_up = logging.getLogger(LOGGER), logging.getLogger().hasHandlers()
    if logger.handlers or (set_up and not always):
        return
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.addHandler(StderrHandler())
    logger.propagate = set_up  # a root that is set up later would say everything twice


def round_line(record: RoundRecord, share: float | None) -> str:
    """Return what a round did, in one line; ``share`` is that of selection in the time of the run, 0..1, None before
    there was any training.
    """
    measured = f"measured {len(record.measured)}, " if record.measured else ""
    spearman = record.metrics.get("regressor/spearman")
    guess = "" if spearman is None else f", Spearman {spearman:.2f}"
    held_out, top = (record.metrics.get(f"regressor/{name}") for name in ("held_out", "top_fifth"))
    if spearman is not None and held_out is not None:
        guess += f" of {held_out:.0f} held out"
    if spearman is not None and top is not None:
        guess += f" (best fifth {top:+.2f} sd)"
    taken = "" if share is None else f"; selection took {share:.1%} of the time"
    return (
        f"round {record.round}, step {record.step}: {record.selector} {measured}chose {record.chosen} of "
        f"{record.candidates}{guess}, in {record.total_seconds:.1f} s{taken}"
    )
