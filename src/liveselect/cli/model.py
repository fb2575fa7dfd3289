"""A causal language model from Hugging Face as a LightningModule, for the configs and the demo."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from liveselect.grammar import State
from liveselect.losses import causal_lm_loss, target_counts


class CausalLM(pl.LightningModule):
    """Trains a Hugging Face causal language model with AdamW and a warm-up-stable-decay schedule.

    The learning rate rises linearly, stays, and falls linearly to zero over the last ``decay_steps``. All parameters
    decay, norms and biases too. Losses are means over tokens, nats; ``train_loss`` and ``val_loss`` are logged.

    Args:
        config: hub name or folder of a model, or its configuration as a mapping with ``model_type``.
        overrides: configuration values that differ from those of ``config``.
        pretrained: start from the weights of ``config`` instead of new ones.
        lr: learning rate of the constant phase.
        betas: decay rates of AdamW's moments.
        weight_decay: of all parameters.
        warmup_steps: optimizer steps of the rise.
        decay_steps: optimizer steps of the fall at the end of training; 0 for none.
        seed: of new weights.
    """

    def __init__(
        self,
        config: str | dict[str, Any],
        overrides: dict[str, Any] | None = None,
        pretrained: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_steps: int = 0,
        decay_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(warmup_steps, decay_steps) < 0:
            raise ValueError(f"expected schedule lengths of zero or more, got {warmup_steps=} and {decay_steps=}")
        self.save_hyperparameters()
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.model = build_model(config, overrides or {}, pretrained, seed)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss over the batch's tokens."""
        loss, _ = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the mean loss over all validation tokens."""
        loss, tokens = self._loss(batch)
        self.log("val_loss", loss, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=tokens)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with its schedule, which advances every optimizer step."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(self.betas[0], self.betas[1]), weight_decay=self.weight_decay
        )
        # only a schedule that ends needs to know how long training is: asking builds the loaders
        total = int(self.trainer.estimated_stepping_batches) if self.decay_steps else 0
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_stable_decay(step, self.warmup_steps, self.decay_steps, total)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Return the mean loss over the batch's tokens, and the number of tokens with a loss."""
        counts = target_counts(batch)
        tokens = counts.sum()
        return (causal_lm_loss(self.model, batch) * counts).sum() / tokens.clamp(min=1), int(tokens)


def warmup_stable_decay(step: int, warmup: int, decay: int, total: int) -> float:
    """Return the share of the learning rate for optimizer step ``step`` (from 0) of ``total``.

    The first step has ``1 / warmup``, the step ``warmup - 1`` the whole rate; the last ``decay`` steps fall to
    ``1 / decay``.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, max(0, total - step) / decay) if decay else 1.0
    return min(rise, fall)


def build_model(config: str | State, overrides: State, pretrained: bool, seed: int) -> PreTrainedModel:
    """Return the model in float32, its new weights drawn from ``seed`` and from no other generator.

    Raises:
        ValueError: ``config`` is a mapping without ``model_type``, or one of a pretrained model.
    """
    if pretrained:
        if not isinstance(config, str):
            raise ValueError("pretrained weights come with a hub name or a folder, got a configuration mapping")
        settings = _configuration(config, overrides)
        model = AutoModelForCausalLM.from_pretrained(
            config, config=settings, dtype=torch.float32, trust_remote_code=False
        )
        return model.train()  # it comes in eval mode, without dropout
    settings = _configuration(config, overrides)
    with torch.random.fork_rng(devices=[]):  # Hugging Face draws new weights from the global generator
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)


def _configuration(config: str | State, overrides: State) -> PretrainedConfig:
    if "trust_remote_code" in {**overrides, **(config if isinstance(config, dict) else {})}:
        raise ValueError(
            "expected a configuration without trust_remote_code: liveselect runs no code that comes with a model. "
            "Build such a model in a LightningModule of your own"
        )
    if isinstance(config, str):
        return AutoConfig.from_pretrained(config, **overrides, trust_remote_code=False)
    settings = {**config, **overrides}
    if "model_type" not in settings:
        raise ValueError(
            "expected a model configuration with model_type, such as {model_type: gpt_neox, hidden_size: 128, ...}, "
            f"got the keys {sorted(settings)}"
        )
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
