"""Shows how far a long preparation is: a bar in a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class PrepareDisplay:
    """Bytes read of all, tokens made, tokens per second, and the time left.

    Args:
        console: where to write; standard error by default.
        quiet: show nothing.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._phase, self._total = "", 0
        self._started = self._last_line = 0.0

    def say(self, message: str) -> None:
        """Write a line."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def start(self, phase: str, total: int) -> None:
        """Begin a phase over ``total`` bytes."""
        self._phase, self._total = phase, total
        self._started = self._last_line = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[tokens]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.add_task(phase, total=total, tokens="")
            self._bar.start()

    def update(self, done: int, tokens: int) -> None:
        """Report that ``done`` bytes became ``tokens`` tokens since the start."""
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        text = f"{tokens / 1e6:.1f}M tokens, {tokens / 1e6 / elapsed:.2f}M/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, tokens=text)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = elapsed * (self._total - done) / max(done, 1)
            self.say(f"{self._phase}: {decimal(done)} of {decimal(self._total)}, {text}, about {left:.0f} s left")

    def stop(self) -> None:
        """End the phase."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
