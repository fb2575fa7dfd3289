"""Replay: another training run on the data that a run chose, as a preset."""

from pathlib import Path

import lightning.pytorch as pl

from liveselect.arguments import check_plain
from liveselect.callbacks.selection import DataSelection
from liveselect.selectors.replay import ReplaySelector, recorded_interval


class Replay(DataSelection):
    """Trains on the plans that another run recorded: bit-equal order, nothing measured.

    The model, its size, the optimizer and the number of devices may be others; the pool must be the same. The rounds
    are the recorded ones as long as ``every_n_steps`` times the global batch is what it was.

    Args:
        run: folder of the run whose plans are followed, or its ledger.
        every_n_steps: optimizer steps of one round; by default as many as were recorded.
        dirpath: where the ledger of this run is written, see :class:`~liveselect.callbacks.DataSelection`.
    """

    def __init__(self, run: str | Path, every_n_steps: int | None = None, dirpath: str | Path | None = None) -> None:
        check_plain(Replay, locals())
        super().__init__(
            selector=ReplaySelector(run),
            every_n_steps=recorded_interval(run) if every_n_steps is None else every_n_steps,
            warmup_rounds=0,
            dirpath=dirpath,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or raise ValueError when fewer candidates were recorded than this run will train on."""
        super().on_train_start(trainer, pl_module)
        plan, global_batch = self.session.plan, self.session.global_batch(trainer)
        planned = (len(plan.ids) - plan.cursor) // global_batch
        steps = trainer.estimated_stepping_batches - trainer.global_step - planned
        if isinstance(self.selector, ReplaySelector) and 0 < steps < float("inf"):
            self.selector.check_length(int(steps) * global_batch)
