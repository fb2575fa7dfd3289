"""What liveselect says while a model trains: lines that people see without setting up any logging.

The logger is not a child of Lightning's: lines of that one appear twice where logging was set up before Lightning was
imported, and never reach what was set up after it.
"""

import logging
import sys
from typing import TextIO

from lightning.pytorch.utilities import rank_zero_warn

from liveselect import distributed
from liveselect.grammar import SelectionWarning
from liveselect.ledger import RoundRecord
from liveselect.price import Price

LOGGER = "liveselect"
MOST_SHARE = 0.5
"""Share of measuring in the time of a run above which a warning is due."""

_REPEATED = 1.05  # effective epochs from which on a line says them

log = logging.getLogger(LOGGER)


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
    epochs = record.metrics.get("effective_epochs", 1.0)
    again = f", {epochs:.1f} times each by now" if epochs >= _REPEATED else ""
    kept = record.metrics.get("prior/ratio")
    among = "" if kept is None or kept == 1 else f", from the best {kept:.1%} of the pool"
    taken = "" if share is None else f"; selection took {share:.1%} of the time"
    return (
        f"round {record.round}, step {record.step}: {record.selector} {measured}chose {record.chosen} of "
        f"{record.candidates}{among}{again}{guess}, in {record.total_seconds:.1f} s{taken}"
    )


def say_price(price: Price, every_n_steps: int, max_overhead: float | None) -> None:
    """Say what a round will cost, once, before training starts; a warning where that is more than half of the time."""
    line = f"every {every_n_steps:,} steps {price.candidates:,} candidates are measured: "
    share = price.share
    if share is None or price.measuring_seconds is None or price.training_seconds is None:
        _say(f"{line}what that takes is known after the first round that measures")
        return
    line += f"about {_about(price.measuring_seconds)} beside {_about(price.training_seconds)} of training ({share:.0%})"
    allowed = price.training_seconds * (max_overhead or 0.0)
    if max_overhead is not None and allowed < price.measuring_seconds:
        part = allowed / price.measuring_seconds * price.candidates
        _say(f"{line}; max_overhead={max_overhead:g} leaves time for about {part:,.0f} of them")
    elif share > MOST_SHARE:
        rank_zero_warn(
            f"{line}. Cap it with max_overhead (0.1 for a tenth of the training time; MATES and DataSelection take it) "
            "or measure fewer candidates (probes), less often (every_n_steps), or on a smaller reference set",
            category=SelectionWarning,
        )
    else:
        _say(line)


def _say(line: str) -> None:
    if distributed.rank() == 0:
        log.info(line)


def _about(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
