"""The progress display of `liveselect fit`: a bar in a terminal, a line every half minute elsewhere."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn

from liveselect.callbacks import DataSelection
from liveselect.report.words import duration

SECONDS_BETWEEN_LINES = 30.0
BAR_WIDTH = 16  # characters; with its metrics the bar fits on one line

Metrics = dict[str, int | str | float | dict[str, float]]

log = logging.getLogger("liveselect")


def bar_for(settings: Mapping[str, Any]) -> list[ProgressBar]:
    """Return the progress display unless the Trainer's settings or Lightning's default decide it.

    Without a terminal these are lines, and for a run without epochs a bar of steps.
    """
    wanted = settings.get("enable_progress_bar") is not False and not settings.get("barebones")
    if not wanted or any(isinstance(each, ProgressBar) for each in settings.get("callbacks") or []):
        return []
    console = Console()
    if not (console.is_terminal or console.is_jupyter):
        return [PlainProgress()]
    return [StepsProgressBar()] if settings.get("max_epochs") == -1 else []


class PlainProgress(ProgressBar):
    """Logs progress and the remaining time at intervals; a bar would fill a log file with fragments."""

    def disable(self) -> None:
        """Nothing to do: only rank 0 logs."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Log progress if the last line is old enough."""
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if not done or now - self._last < SECONDS_BETWEEN_LINES or not trainer.is_global_zero:
            return
        self._last = now
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        pace = done / (now - self._began)
        ends = steps != float("inf")
        total, left = (f" of {steps:.0f}", f", about {duration((steps - step) / pace)} left") if ends else ("", "")
        losses = "".join(f", {name} {float(value):.4f}" for name, value in trainer.progress_bar_metrics.items())
        log.info("step %d%s%s, %.2f steps/s%s", step, total, losses, pace, left)


class StepsProgressBar(RichProgressBar):
    """Lightning's bar for a run measured in steps: without epochs, with the round and selection's share of the time."""

    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        """Return Lightning's columns with a short bar."""
        columns: list[ProgressColumn] = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = BAR_WIDTH
        return columns

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch until the last step, with those before a resume and all that steps accumulate over."""
        trainer = self.trainer
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + left)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Metrics:
        """Return the texts and numbers beside the bar."""
        metrics: Metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        selection = next((each for each in callbacks if isinstance(each, DataSelection)), None)
        if selection is not None and selection.plan is not None:
            about = {"round": str(selection.plan.round), "selection": f"{selection.time_share():.1%}"}
            metrics = {**about, **metrics}
        return metrics
