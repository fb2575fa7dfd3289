"""Shows what a round is doing: a live line in a terminal, plain lines elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from liveselect import distributed

log = logging.getLogger("liveselect")

SECONDS_BETWEEN_LINES = 10.0


class RoundProgress:
    """What is being done, how much of it, and how long it will take.

    In a terminal a transient bar is drawn while a phase runs. Without a terminal, or beside another live display
    (only one can own the terminal), a line is logged at most every ten seconds. Ranks other than 0 show nothing.

    Args:
        live: whether a bar may be drawn; None asks the terminal.
    """

    def __init__(self, title: str, live: bool | None = None) -> None:
        self.title = title
        self._live = sys.stderr.isatty() if live is None else live
        self._bar: Progress | None = None
        self._phase, self._unit, self._total, self._done = "", "", 0, 0
        self._started = self._last_line = 0.0

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of ``total`` units."""
        self.stop()
        self._phase, self._unit, self._total, self._done = phase, unit, total, 0
        self._started = self._last_line = time.monotonic()
        if self._live and distributed.rank() == 0:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task(f"{self.title}: {phase}", total=total, unit=unit)
            self._bar.start()

    def advance(self, amount: int) -> None:
        """Report that ``amount`` more units are done."""
        self._done += amount
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES and distributed.rank() == 0:
            self._last_line = now
            left = (now - self._started) * (self._total - self._done) / max(1, self._done)
            log.info(
                "%s: %s, %d of %d %s, about %.0f s left",
                self.title,
                self._phase,
                self._done,
                self._total,
                self._unit,
                left,
            )

    def stop(self) -> None:
        """End the current phase."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
