"""The clock of training: it runs while training does, and stands still while something else is done."""

import time


class TrainingClock:
    """Seconds of training since they were last taken.

    It is stopped for a round of selection and for validation. What a callback spends in the middle of training is
    taken off with :meth:`discount`.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # when it was started, None while it stands still

    def start(self) -> None:
        """Run from now on."""
        self.stop()
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Stand still; nothing when it does already."""
        self._seconds = self.read()
        self._since = None

    def read(self) -> float:
        """Return the seconds since they were last taken."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def take(self) -> float:
        """Return the seconds since they were last taken, and count from zero; it runs on if it did."""
        seconds, self._seconds = self.read(), 0.0
        if self._since is not None:
            self._since = time.perf_counter()
        return seconds

    def discount(self, seconds: float) -> None:
        """Take ``seconds`` off that were no training, if the clock counted them."""
        if self._since is not None:
            self._seconds -= seconds
