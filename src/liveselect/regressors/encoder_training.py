"""Trains the network of the encoder regressor, and predicts with it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from liveselect.cost import CostMeter
from liveselect.distributed import gather_shards, shard, sum_over_ranks
from liveselect.regressors.encoder_model import InfluenceNetwork
from liveselect.regressors.targets import held_out_metrics

_CLIP_NORM = 1.0  # the default of the Hugging Face Trainer, which the released code uses


class Examples(NamedTuple):
    """Texts as token ids ``(L_i,)``, their targets ``(m,)`` float32, and how much each counts; None is all alike."""

    texts: list[Tensor]
    targets: Tensor
    weights: Tensor | None = None


class Schedule(NamedTuple):
    """How long and how fast to train; the arguments of ``EncoderRegressor``."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    evaluations: int

    def steps(self, examples: int) -> int:
        """Return the optimizer steps of a fit."""
        return self.epochs * math.ceil(examples / self.batch_size)


def predict(network: InfluenceNetwork, texts: Sequence[Tensor], meter: CostMeter) -> Tensor:
    """Return the predictions for ``texts``, ``(len(texts),)`` float32 on CPU."""
    network.eval()
    predicted = torch.empty(len(texts), dtype=torch.float32)  # training may have another default type
    with torch.no_grad():
        for group, found in network.parts(texts, meter):
            predicted[group] = found.cpu()
    return predicted


def accumulate_gradients(network: InfluenceNetwork, examples: Examples, rows: Tensor, meter: CostMeter) -> None:
    """Add the gradient of the mean squared error of ``rows (b,)`` to ``.grad``; each rank runs its share."""
    network.train()
    mine = rows[shard(len(rows))]
    for group, predicted in network.parts([examples.texts[i] for i in mine.tolist()], meter):
        errors = (predicted - examples.targets[mine[group]].to(predicted.device)).square()
        if examples.weights is not None:
            errors = errors * examples.weights[mine[group]].to(errors.device)
        (errors.sum() / len(rows)).backward()
    for parameter in network.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = sum_over_ranks(gradient)


def train(
    network: InfluenceNetwork,
    schedule: Schedule,
    examples: Examples,
    learned: Tensor,
    held_out: Tensor,
    order: torch.Generator,
    meter: CostMeter,
    advance: Callable[[int], None],
) -> dict[str, float]:
    """Train the network in place and leave it with the weights whose held-out rank correlation was highest.

    Rows ``learned`` of the examples are trained on, in an ``order`` that is equal on all ranks; ``held_out`` ones are
    not. ``advance`` is called after each step. Returns what :func:`look` said then, and its optimizer ``best_step``; of
    the last look and step when none had a rank correlation.
    """
    from transformers import get_linear_schedule_with_warmup

    total = schedule.steps(len(learned))
    evaluation_steps = {math.ceil(total * (i + 1) / schedule.evaluations) for i in range(schedule.evaluations)}
    groups = [
        {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in network.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate)
    decay = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=total)
    best, found, best_step, best_weights = -math.inf, dict[str, float](), total, None
    step = 0
    for _ in range(schedule.epochs):
        for rows in learned[torch.randperm(len(learned), generator=order)].split(schedule.batch_size):
            accumulate_gradients(network, examples, rows, meter)
            nn.utils.clip_grad_norm_(network.parameters(), _CLIP_NORM)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            step += 1
            advance(1)
            if step not in evaluation_steps:
                continue
            looked = look(network, examples, held_out, meter)
            if looked["spearman"] > best:
                best, found, best_step = looked["spearman"], looked, step
                best_weights = {k: v.detach().to("cpu", copy=True) for k, v in network.state_dict().items()}
    if best_weights is None:
        return {**looked, "best_step": float(total)}
    network.load_state_dict(best_weights)
    return {**found, "best_step": float(best_step)}


def look(network: InfluenceNetwork, examples: Examples, rows: Tensor, meter: CostMeter) -> dict[str, float]:
    """Return how predictions for held-out ``rows`` agree with their targets; each rank predicts its share."""
    mine = predict(network, [examples.texts[i] for i in rows[shard(len(rows))].tolist()], meter)
    return held_out_metrics(gather_shards(mine, len(rows)), examples.targets[rows])
