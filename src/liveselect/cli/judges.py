"""What the runs of a comparison are judged by, beside the loss that the module itself validates on."""

from collections.abc import Iterable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from liveselect.callbacks import DataSelection
from liveselect.datamodules import ReferenceSet
from liveselect.datamodules.datamodule import ServedDataModule
from liveselect.datamodules.opening import open_reference
from liveselect.grammar import Batch, LiveModel, State
from liveselect.losses import loss_sums, mean_of, target_counts
from liveselect.preserve import measuring

HELD_OUT, MIXTURE, ELSEWHERE = "val_loss", "mixture_loss", "elsewhere_loss"
AVERAGED = "averaged_"
"""Before the names of losses at averaged weights."""

DECAY = 0.97
"""Of the average: the weights of the last 33 steps or so. Raw ones jump by more than what methods differ by."""


class Judges(pl.Callback):
    """Evaluates, at every validation, raw weights and averaged ones on three sets of texts.

    These are the held-out reference text (the validation set, whose raw loss the module logs itself), the sample of the
    pool that selection holds out (``mixture_sample``, whose raw loss selection notes itself), and text that nothing
    aimed at. Training stays as it was, to the bit. For one device.

    Args:
        elsewhere: texts of a kind that is neither the reference set's nor, if possible, the pool's: a
            :class:`~liveselect.datamodules.ReferenceSet` or a source for one; None for none.
        elsewhere_examples: how many of them to use.
        decay: of the averaged weights, after the first steps, in which it is smaller.
    """

    def __init__(self, elsewhere: str | None = None, elsewhere_examples: int = 128, decay: float = DECAY) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"expected decay, that of the averaged weights, from 0 to below 1, got {decay}")
        self.decay = decay
        self._source = None if elsewhere is None else ReferenceSet(elsewhere, max_examples=elsewhere_examples)
        self._elsewhere: list[Batch] = []
        self._average: list[Tensor] = []
        self._step = -1
        self._judges_alone = False  # where the module does not log the held-out loss itself

    def state_dict(self) -> dict[str, object]:
        """Return the averaged weights."""
        return {"average": self._average, "step": self._step}

    def load_state_dict(self, state_dict: State) -> None:
        """Go on with the averaged weights of a checkpoint."""
        self._average, self._step = [each.clone() for each in state_dict["average"]], state_dict["step"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse several devices."""
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"expected one device for a run that is compared with others, got {trainer.world_size}: start more "
                "runs at a time (--processes), or compare runs of `liveselect fit` with `liveselect report`"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the texts that nothing aims at."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self._source is not None and isinstance(data, ServedDataModule):
            self._elsewhere = open_reference(self._source, data.served.opened, data.settings, "allow")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Take the weights of a step into the average."""
        if trainer.global_step == self._step:
            return  # inside an accumulation window
        self._step = trainer.global_step
        now = [parameter.detach() for parameter in pl_module.parameters()]
        if not self._average:
            self._average = [weights.clone() for weights in now]
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        for average, weights in zip(self._average, now, strict=True):
            average.lerp_(weights.to(average), 1 - decay)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge both kinds of weights."""
        selection = next((each for each in trainer.callbacks if isinstance(each, DataSelection)), None)  # type: ignore[attr-defined]
        if trainer.sanity_checking or not self._average or selection is None:
            return
        sets = {HELD_OUT: trainer.val_dataloaders, ELSEWHERE: self._elsewhere}
        live = selection.session.model
        self._judges_alone |= HELD_OUT not in trainer.callback_metrics
        found = {}
        for name, batches in sets.items():
            if batches and (name != HELD_OUT or self._judges_alone):
                found[name] = mean_loss(live, batches)
        raw = [parameter.detach().clone() for parameter in pl_module.parameters()]
        try:
            self._put(pl_module, self._average)
            for name, batches in sets.items():
                if batches:
                    found[AVERAGED + name] = mean_loss(live, batches)
            mixture = selection.session.mixture_loss()
            if mixture is not None:
                found[AVERAGED + MIXTURE] = mixture
        finally:
            self._put(pl_module, raw)
        pl_module.log_dict(found)

    @torch.no_grad()
    def _put(self, module: torch.nn.Module, weights: Iterable[Tensor]) -> None:
        for parameter, value in zip(module.parameters(), weights, strict=True):
            parameter.copy_(value)


def mean_loss(model: LiveModel, batches: Iterable[Batch]) -> float:
    """Return the mean loss over the tokens of the batches, nats per token; call it with the model in eval mode."""
    sums = torch.zeros(2, dtype=torch.float64)
    with measuring(model.module, model.optimizer), torch.no_grad(), model.autocast():
        for batch in batches:
            sums += loss_sums(model.losses(model.to_device(batch)), target_counts(batch))
    return mean_of(sums)
