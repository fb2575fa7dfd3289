"""Runs the network of the encoder regressor over texts, and trains it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from liveselect.distributed import gather_shards, shard, sum_over_ranks
from liveselect.functional.correlation import spearman
from liveselect.functional.flops import forward_flops
from liveselect.protocols import RoundContext
from liveselect.regressors.chunks import chunk, length_groups
from liveselect.regressors.encoder_model import InfluenceNetwork

Precision = Literal["auto", "float32", "bfloat16"]

_CLIP_NORM = 1.0  # the default of the Hugging Face Trainer, which the released code uses


class Examples(NamedTuple):
    """Texts as token ids ``(L_i,)`` and their standardised targets ``(m,)`` float32."""

    texts: list[Tensor]
    targets: Tensor


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the arguments of ``EncoderRegressor``."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    evaluations: int


@dataclass(frozen=True)
class Runner:
    """Runs a network over texts, grouped by length, and charges what it costs.

    Attributes:
        longest: most tokens of a chunk.
        tokens: most padded tokens of one forward.
        precision: what the encoder computes in.
    """

    context: RoundContext
    network: InfluenceNetwork
    longest: int
    tokens: int
    precision: Precision

    def predict(self, texts: Sequence[Tensor]) -> Tensor:
        """Return the predictions for ``texts``, ``(len(texts),)`` float32 on CPU."""
        self.network.eval()
        predicted = torch.empty(len(texts), dtype=torch.float32)  # training may have another default type
        with torch.no_grad():
            for group in self._groups(texts):
                predicted[group] = self._forward([texts[i] for i in group], passes=1).cpu()
        return predicted

    def accumulate_gradients(self, examples: Examples, rows: Tensor) -> None:
        """Add the gradient of the mean squared error of ``rows (b,)`` to ``.grad``; each rank runs its share."""
        self.network.train()
        mine = rows[shard(len(rows))].tolist()
        texts = [examples.texts[i] for i in mine]
        for group in self._groups(texts):
            predicted = self._forward([texts[i] for i in group], passes=3)
            targets = examples.targets[[mine[i] for i in group]].to(predicted.device)
            ((predicted - targets).square().sum() / len(rows)).backward()
        for parameter in self.network.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = sum_over_ranks(gradient)

    def _groups(self, texts: Sequence[Tensor]) -> list[list[int]]:
        return length_groups([len(text) for text in texts], self.longest, self.tokens)

    def _forward(self, texts: Sequence[Tensor], passes: int) -> Tensor:
        device = self.context.device
        chunks = chunk(texts, self.longest).to(device)
        self.context.meter.add_flops(passes * forward_flops(self.network.encoder, chunks.input_ids.numel()))
        automatic = self.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast(device.type, torch.bfloat16, enabled=automatic or self.precision == "bfloat16"):
            return self.network(chunks)


def train(runner: Runner, schedule: Schedule, examples: Examples, held_out: Examples) -> dict[str, float]:
    """Train the network in place and leave it with the weights whose held-out rank correlation was highest.

    Returns that ``spearman`` and its optimizer ``best_step``; NaN and the last step when it could never be told.
    """
    context, network = runner.context, runner.network
    total = schedule.epochs * math.ceil(len(examples.texts) / schedule.batch_size)
    looks = {math.ceil(total * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)}
    optimizer = torch.optim.AdamW(_decayed_apart(network, schedule.weight_decay), lr=schedule.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    shuffler = context.generator("regressor/order")
    best, best_step, best_weights = -math.inf, total, None
    step = 0
    with context.phase("fit regressor", total, "batches") as advance:
        for _ in range(schedule.epochs):
            for rows in torch.randperm(len(examples.texts), generator=shuffler).split(schedule.batch_size):
                runner.accumulate_gradients(examples, rows)
                nn.utils.clip_grad_norm_(network.parameters(), _CLIP_NORM)
                optimizer.step()
                decay.step()
                optimizer.zero_grad()
                step += 1
                advance(1)
                if step in looks and (found := _held_out_spearman(runner, held_out)) > best:
                    best, best_step = found, step
                    best_weights = {k: v.detach().to("cpu", copy=True) for k, v in network.state_dict().items()}
    if best_weights is None:
        return {"spearman": math.nan, "best_step": float(total)}
    network.load_state_dict(best_weights)
    return {"spearman": best, "best_step": float(best_step)}


def _held_out_spearman(runner: Runner, held_out: Examples) -> float:
    mine = runner.predict(held_out.texts[shard(len(held_out.texts))])
    return spearman(gather_shards(mine, len(held_out.texts)), held_out.targets)


def _decayed_apart(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in network.parameters() if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
