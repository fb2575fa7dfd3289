"""What `liveselect fit` shows of a run: a bar in a terminal, occasional lines elsewhere."""

import logging
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from rich.progress import BarColumn

from liveselect.callbacks import DataSelection
from liveselect.report.words import duration

SECONDS_BETWEEN_LINES = 30.0
BAR_WIDTH = 16  # so that it stays one line with what stands beside it

log = logging.getLogger("liveselect")


def bar_for(settings: dict[str, Any]) -> list[ProgressBar]:
    """Return what shows progress, unless the Trainer's settings say: lines without a terminal, a bar of steps where
    there are no epochs, and else Lightning's.
    """
    wanted = settings.get("enable_progress_bar") is not False and not settings.get("barebones")
    if not wanted or any(isinstance(each, ProgressBar) for each in settings.get("callbacks") or []):
        return []
    console = Console()
    if not (console.is_terminal or console.is_jupyter):
        return [PlainProgress()]
    return [StepsProgressBar()] if settings.get("max_epochs") == -1 else []


class PlainProgress(ProgressBar):
    """Logs now and then how far training is, and how long it will take; a bar would leave its pieces in a log file."""

    def disable(self) -> None:
        """Nothing to do: only rank 0 logs."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where the run stands, if the last line is old."""
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
    """Lightning's bar for a run that is measured in steps: without its count of epochs, with the round of selection and
    the share of the time that selection takes.
    """

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Return what a line consists of, with a short bar."""
        columns: list[Any] = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = BAR_WIDTH
        return columns

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch; those from before a resume count, and all that an optimizer step accumulates over."""
        trainer = self.trainer
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, done + left)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Return what stands beside the bar."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        selection = next((each for each in callbacks if isinstance(each, DataSelection)), None)
        if selection is not None and selection.plan is not None:
            about = {"round": str(selection.plan.round), "selection": f"{selection.time_share():.1%}"}
            metrics = {**about, **metrics}
        return metrics
