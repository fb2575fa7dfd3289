"""What only looks at a run costs a warning when it fails, and never the run."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from liveselect import distributed
from liveselect.cost import Progress, SilentProgress
from liveselect.grammar import SelectionWarning


@contextmanager
def only_looking(what: str) -> Iterator[None]:
    """Open a block that training does not depend on: whatever it raises becomes a warning that begins with ``what``.

    Only a person, or who ends the process, is let through: KeyboardInterrupt and SystemExit. Errors of compiled
    libraries (a panic of a tokenizer) are BaseExceptions, too. Never put a collective into the block.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if distributed.rank() == 0:
            said = f"{what}: {str(error) or repr(error)}"
            warnings.warn(said.encode("utf-8", "backslashreplace").decode(), SelectionWarning, stacklevel=3)


class CarefulProgress:
    """A display that is given up when it fails.

    Args:
        shown: the display.
    """

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of ``total`` units."""
        self._try(lambda: self._shown.start(phase, total, unit))

    def advance(self, amount: int) -> None:
        """Report that ``amount`` more units are done."""
        self._try(lambda: self._shown.advance(amount))

    def stop(self) -> None:
        """End the current phase."""
        self._try(lambda: self._shown.stop())

    def _try(self, action: Callable[[], None]) -> None:
        works = False
        with only_looking("the progress of a round could not be shown"):
            action()
            works = True
        if not works:
            self._shown = SilentProgress()
