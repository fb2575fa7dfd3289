"""Clips the gradients of a probe as the Trainer clips those of training."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn


@contextmanager
def silent(pl_module: pl.LightningModule) -> Iterator[None]:
    """Open a block in which the module logs nothing: what is no training step must not reach the run's metrics."""
    mute = {"log": lambda *arguments, **settings: None, "log_dict": lambda *arguments, **settings: None}
    kept = {name: pl_module.__dict__[name] for name in mute if name in pl_module.__dict__}
    pl_module.__dict__.update(mute)
    try:
        yield
    finally:
        for name in mute:
            pl_module.__dict__.pop(name, None)
        pl_module.__dict__.update(kept)


def clip_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule, parameters: list[nn.Parameter]) -> None:
    """Clip the gradients of ``parameters`` in place as the Trainer does."""
    if is_overridden("configure_gradient_clipping", pl_module):
        with silent(pl_module):
            pl_module.configure_gradient_clipping(
                trainer.optimizers[0], trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
    elif trainer.gradient_clip_val:
        if str(trainer.gradient_clip_algorithm or "norm").endswith("value"):
            nn.utils.clip_grad_value_(parameters, trainer.gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip_val)
