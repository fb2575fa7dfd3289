"""Shows how far a long preparation is: a bar in a terminal, a line every ten seconds elsewhere."""

import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
LINE = "{desc}: {n_fmt}B of {total_fmt}B{postfix}, {rate_fmt}, about {remaining} left\n"


class PrepareDisplay:
    """Bytes read of all, tokens made, and the time left, on standard error.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: tqdm | None = None

    def say(self, message: str) -> None:
        """Write a line."""
        if not self.quiet:
            tqdm.write(message, file=sys.stderr)

    def start(self, phase: str, total: int) -> None:
        """Begin a phase over ``total`` bytes."""
        lines = not sys.stderr.isatty()
        settings = {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES, "bar_format": LINE}
        self._bar = tqdm(
            desc=phase,
            total=total,
            unit="B",
            unit_scale=True,
            leave=lines,
            disable=self.quiet,
            **(settings if lines else {}),
        )

    def update(self, done: int, tokens: int) -> None:
        """Report that ``done`` bytes became ``tokens`` tokens since the start."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
            self._bar.update(done - self._bar.n)

    def stop(self) -> None:
        """End the phase."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
