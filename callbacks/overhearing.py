"""Hears the influence of what is being trained on out of the training step's own backward."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.sharding import is_sharded
from liveselect.influence.piggyback import LossMean, TrainingStepScores, find_loss_mean, mean_weights
from liveselect.losses import target_counts
from liveselect.protocols import LossFn, SelectionWarning
from liveselect.snapshot import measuring


class StepListener:
    """Scores the examples of an optimizer step while they are trained on; training does not notice.

    Where a step cannot be heard (compiled layers; a training loss that is no known mean of the examples' losses) it
    says so once and is deaf from then on.

    Args:
        loss_fn: per-example loss; the training loss is a mean of it.
        examples: how many examples of a step are scored, over all ranks.

    Attributes:
        deaf: whether it has given up.
    """

    def __init__(self, loss_fn: LossFn, examples: int) -> None:
        self.deaf = False
        self._loss_fn = loss_fn
        self._examples = examples
        self._scores: TrainingStepScores | None = None
        self._batch: Mapping[str, Tensor] = {}
        self._wanted = 0
        self._losses: Tensor | None = None
        self._mean: LossMean | None = None
        self._heard: list[tuple[Tensor, Tensor]] = []

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, direction: Mapping[str, Tensor]
    ) -> None:
        """Listen to one micro-batch; call before its forward."""
        self._stop()
        self._agree(pl_module)
        if self.deaf:
            return
        with self._deaf_after_errors():
            if self._mean is None:  # once: which mean of these losses is the training loss?
                forward = trainer.precision_plugin.forward_context()
                with measuring(pl_module, trainer.optimizers[0]), torch.no_grad(), forward:
                    self._losses = self._loss_fn(pl_module, batch)
            # the first ones of the batch over all ranks: the same on any number of ranks
            share = math.ceil(self._examples / trainer.accumulate_grad_batches)
            mine = min(max(share - trainer.global_rank * len(batch["id"]), 0), len(batch["id"]))
            self._wanted, mine = mine, max(mine, is_sharded(pl_module))  # to a sharded model all ranks listen, or none
            if not mine:
                return
            self._batch = batch
            there = {name: value.to(pl_module.device) for name, value in direction.items()}  # a checkpoint's is on CPU
            self._scores = TrainingStepScores(pl_module, there, mine)
            self._scores.attach(batch)

    def before_backward(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Check, once, that the step is one that can be heard."""
        if self._losses is None:
            return
        self._check(trainer, loss)
        self._agree(trainer.lightning_module)

    def _check(self, trainer: pl.Trainer, loss: Tensor) -> None:
        if self._scores is None or self._losses is None:
            return
        with self._deaf_after_errors():
            self._scores.check(loss)
            whole = float(loss.detach()) * trainer.accumulate_grad_batches
            self._mean = find_loss_mean(self._losses, target_counts(self._batch), whole)
            self._losses = None

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Keep what the backward has shown."""
        if self._scores is None or self._mean is None:
            return
        with self._deaf_after_errors():
            weights = mean_weights(self._batch, self._mean, trainer.accumulate_grad_batches)
            influence = self._scores.collect(weights)
            influence[self._wanted :] = math.nan
            self._heard.append((self._batch["id"].cpu(), influence))
        self._stop()

    def collect(self) -> tuple[Tensor, Tensor]:
        """Return ids and influence, ``(m,)`` each, of what all ranks have heard since the last call; a collective."""
        self._stop()
        heard = [pair for pairs in distributed.gather_objects(self._heard) for pair in pairs]
        self._heard = []
        if not heard:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        ids, influence = (torch.cat(parts) for parts in zip(*heard, strict=True))
        return ids, influence

    def _agree(self, model: nn.Module) -> None:
        """Be deaf when another rank is: with a sharded model, listening is a collective."""
        if is_sharded(model) and distributed.any_rank(self.deaf):
            self.deaf, self._losses = True, None
            self._stop()

    def _stop(self) -> None:
        if self._scores is not None:
            self._scores.detach()
        self._scores = None

    @contextmanager
    def _deaf_after_errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, KeyError) as error:  # training matters more
            self.deaf = True
            self._stop()
            rank_zero_warn(
                f"the influence of what is trained on cannot be heard, so its arms are probed as well: {error}",
                category=SelectionWarning,
            )
