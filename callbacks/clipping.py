"""Clips the gradients of a probe as the Trainer clips those of training."""

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn


def clip_gradients(trainer: pl.Trainer, pl_module: pl.LightningModule, parameters: list[nn.Parameter]) -> None:
    """Clip the gradients of ``parameters`` in place as the Trainer does."""
    if is_overridden("configure_gradient_clipping", pl_module):
        # a probe is no training step: what the hook logs must not reach the run's metrics
        silent = {"log": lambda *arguments, **settings: None, "log_dict": lambda *arguments, **settings: None}
        kept = {name: pl_module.__dict__[name] for name in silent if name in pl_module.__dict__}
        pl_module.__dict__.update(silent)
        try:
            pl_module.configure_gradient_clipping(
                trainer.optimizers[0], trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
        finally:
            for name in silent:
                del pl_module.__dict__[name]
            pl_module.__dict__.update(kept)
    elif trainer.gradient_clip_val:
        if str(trainer.gradient_clip_algorithm or "norm").endswith("value"):
            nn.utils.clip_grad_value_(parameters, trainer.gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip_val)
