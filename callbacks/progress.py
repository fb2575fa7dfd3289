"""Shows how far a phase is: a bar in a terminal, occasional lines elsewhere."""

import logging
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

from liveselect import cost, distributed
from liveselect.looking import CarefulProgress, only_looking

log = logging.getLogger("liveselect")

SECONDS_BETWEEN_LINES = 10.0


def round_progress(title: str, trainer: pl.Trainer | None = None) -> cost.Progress:
    """Return what shows a round, as a line of the display of ``trainer`` where one is running."""
    if distributed.rank() != 0:
        return cost.SilentProgress()
    with only_looking("the progress of a round could not be shown"):
        return CarefulProgress(_progress(title, trainer))
    return cost.SilentProgress()


def _progress(title: str, trainer: pl.Trainer | None) -> "RoundProgress":
    bar = None if trainer is None else trainer.progress_bar_callback
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
    seconds.

    Args:
        title: what stands before the phase.
        live: whether a bar may be drawn; None asks the terminal.
        beside: the display that is shown already.
    """

    def __init__(self, title: str, live: bool | None = None, beside: Progress | None = None) -> None:
        self.title = title
        self._live, self._beside = live, beside
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = self._last_line = 0.0

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of ``total`` units."""
        self.stop()
        self._bar = self._beside or self._new_bar()
        self._task = self._bar.add_task(f"{self.title}: {phase}", total=total, unit=unit)
        self._started = self._last_line = time.monotonic()

    def advance(self, amount: int) -> None:
        """Report that ``amount`` more units are done."""
        if self._bar is None:
            return
        self._bar.advance(self._task, amount)
        now = time.monotonic()
        if self._bar.disable and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            (task,) = self._bar.tasks
            left = (now - self._started) * (task.remaining or 0) / max(1, task.completed)
            counts = int(task.completed), int(task.total or 0), task.fields["unit"]
            log.info("%s, %d of %d %s, about %.0f s left", task.description, *counts, left)

    def stop(self) -> None:
        """End the current phase."""
        if self._bar is not None and self._bar is self._beside:
            self._bar.remove_task(self._task)
        elif self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _new_bar(self) -> Progress:
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal if self._live is None else self._live),
        )
        bar.start()
        return bar
