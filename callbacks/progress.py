"""Shows what a round is doing: a live line in a terminal, plain lines elsewhere."""

import logging
import sys
import time

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from liveselect import distributed

log = logging.getLogger("liveselect")

SECONDS_BETWEEN_LINES = 10.0


def round_progress(title: str, trainer: pl.Trainer) -> "RoundProgress":
    """Return what shows a round of ``trainer``, as a line of the Trainer's own display where one is running."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar):
        return RoundProgress(title)
    shown = bar.progress if bar.is_enabled else None
    if shown is not None and shown.live.is_started and not shown.disable:
        return RoundProgress(title, beside=shown)
    return RoundProgress(title, live=False)


class RoundProgress:
    """What is being done, how much of it, and how long it will take.

    In a terminal a transient bar is drawn while a phase runs; where a live display of rich is shown already, the bar is
    a line of it, since only one display can own the terminal. Without a terminal a line is logged at most every ten
    seconds. Ranks other than 0 show nothing.

    Args:
        title: what stands before the phase.
        live: whether a bar may be drawn; None asks the terminal.
        beside: the display that is shown already.
    """

    def __init__(self, title: str, live: bool | None = None, beside: Progress | None = None) -> None:
        self.title = title
        self._live = sys.stderr.isatty() if live is None else live
        self._beside = beside
        self._task: TaskID | None = None
        self._bar: Progress | None = None
        self._phase, self._unit, self._total, self._done = "", "", 0, 0
        self._started = self._last_line = 0.0

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of ``total`` units."""
        self.stop()
        self._phase, self._unit, self._total, self._done = phase, unit, total, 0
        self._started = self._last_line = time.monotonic()
        if distributed.rank() != 0:
            return
        if self._beside is not None:
            self._task = self._beside.add_task(f"{self.title}: {phase}", total=total)
        elif self._live:
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
        if self._beside is not None and self._task is not None:
            self._beside.advance(self._task, amount)
            return
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
        if self._beside is not None and self._task is not None:
            self._beside.remove_task(self._task)
            self._task = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
