"""Progress of a long preparation: a bar in a terminal, a line every ten seconds elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
LINE = "{desc}: {n_fmt}{unit} of {total_fmt}{unit}{postfix}, {rate_fmt}, about {remaining} left\n"


class PrepareDisplay:
    """Shows bytes read, tokens made, and the time left, on standard error.

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

    @contextmanager
    def phase(self, name: str, total: int, unit: str = "B") -> Iterator[None]:
        """Show the progress of a phase over ``total`` bytes, or what ``unit`` says."""
        lines = not sys.stderr.isatty()
        settings = {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES, "bar_format": LINE}
        shared = {"desc": name, "total": total, "unit": unit, "unit_scale": True, "leave": lines, "disable": self.quiet}
        with tqdm(**shared, **(settings if lines else {})) as self._bar:
            yield
        self._bar = None

    def update(self, done: int, tokens: int | None = None) -> None:
        """Report that ``done`` bytes, or what the phase counts, became ``tokens`` tokens since the start."""
        if self._bar is not None:
            if tokens is not None:
                self._bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
            self._bar.update(done - self._bar.n)
