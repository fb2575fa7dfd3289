"""What a run shows where there is no terminal: lines, since a bar would leave its pieces in a log file."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from liveselect.report.words import duration

SECONDS_BETWEEN_LINES = 30.0

log = logging.getLogger("liveselect")


class PlainProgress(ProgressBar):
    """Says now and then how far training is, and how long it will take; in the place of Lightning's bar."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._began = self._last = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Say nothing; Lightning asks for it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Say something again."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where the run stands, if the last line is old."""
        now = time.monotonic()
        if self._enabled and now - self._last >= SECONDS_BETWEEN_LINES and trainer.global_step > self._first_step:
            self._last = now
            log.info(self._line(trainer, now - self._began))

    def _line(self, trainer: pl.Trainer, elapsed: float) -> str:
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        losses = "".join(f", {name} {float(value):.4f}" for name, value in trainer.progress_bar_metrics.items())
        per_second = (step - self._first_step) / elapsed
        if steps == float("inf"):
            return f"step {step}{losses}, {per_second:.2f} steps/s"
        left = duration((steps - step) / per_second)
        return f"step {step} of {steps:g}{losses}, {per_second:.2f} steps/s, about {left} left"
