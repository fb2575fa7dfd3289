"""The two arms of a look-ahead: random candidates in a copy of training, and training itself."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.grammar import Batch, LiveModel, RoundInterruptedError
from liveselect.losses import loss_sums, mean_of, targets_shape, token_weights
from liveselect.preserve import Snapshot, measuring

Sets = Mapping[str, Sequence[Batch]]
"""Batches to judge on, by name of their set; the same on all ranks."""

FORWARDS_PER_STEP = 3
"""A backward costs twice the forward."""


@dataclass(frozen=True)
class TrainingSteps:
    """How training takes its steps, for a copy that takes the same ones on other data.

    Attributes:
        loss: maps a training batch of this rank, and its number, to the loss on which training calls backward, before
            it is divided by ``accumulate``; None where the batch is skipped.
        accumulate: batches of an optimizer step.
        after_step: what follows the optimizer step of the given number: learning rates move.
        as_training: puts back what steps change outside of model and optimizer, and begins with the random states of
            the next training batch.
        interrupted: whether a signal waits; looked at between steps on a single rank.
        flops: of the forward and backward of a batch of this rank.
    """

    loss: Callable[[object, int], Tensor | None]
    accumulate: int = 1
    after_step: Callable[[int], None] = lambda index: None
    as_training: Callable[[], AbstractContextManager[None]] | None = None
    interrupted: Callable[[], bool] = lambda: False
    flops: Callable[[object], float] = lambda batch: 0.0


class WeightAverage:
    """The mean of the trained parameters over the last steps of an arm.

    Args:
        count: steps that it is taken over.
        sums: what a checkpoint holds of it.
        added: steps in the sums.
    """

    def __init__(self, count: int, sums: Sequence[Tensor] = (), added: int = 0) -> None:
        self.count, self.sums, self.added = count, list(sums), added

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Add the parameters as they are now."""
        live = _trained(module)
        if not self.sums:
            self.sums = [torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in live]
        self.sums = [total.to(each.device) for total, each in zip(self.sums, live, strict=True)]
        for total, each in zip(self.sums, live, strict=True):
            total.add_(each.to(total.dtype), alpha=1 / self.count)
        self.added += 1

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Open a block in which the module holds the average; its own parameters are put back to the bit."""
        live = _trained(module)
        own = [each.detach().clone() for each in live]
        try:
            _write(live, self.sums)
            yield
        finally:
            _write(live, own)


def random_arm(
    model: LiveModel, steps: TrainingSteps, batches: Iterable[object], count: int, averaged: int, sets: Sets
) -> dict[str, float]:
    """Train a copy for ``count`` optimizer steps on ``batches``, and return the mean loss of every set, nats per token.

    The losses are those at the weights averaged over the last ``averaged`` steps. Model, optimizer, learning rates and
    random states are as before afterwards, to the bit. All ranks must call it alike, each with its own batches.

    Raises:
        TypeError: the optimizer's state cannot be put back exactly.
        RoundInterruptedError: a signal waits.
    """
    module, optimizer = model.module, model.optimizer
    flags = [(each, each.training) for each in module.modules()]
    with measuring(module, optimizer):
        snapshot = Snapshot(module, optimizer)
        try:
            average = WeightAverage(averaged)
            with steps.as_training() if steps.as_training else _nothing():
                _set_training(flags)
                given = iter(batches)
                for index in range(count):
                    _take_step(model, steps, given, index)
                    if index >= count - averaged:
                        average.add(module)
                    if distributed.world_size() == 1 and steps.interrupted():  # ranks would stop at different steps
                        raise RoundInterruptedError("stopped while a look-ahead was under way")
            _set_training([(each, False) for each, _ in flags])
            with average.in_place(module):
                return losses_on(model, sets)
        finally:
            snapshot.restore()
            torch.clear_autocast_cache()


def losses_at(model: LiveModel, average: WeightAverage, sets: Sets) -> dict[str, float]:
    """Return the mean loss of every set at averaged weights, nats per token; the model is as before afterwards."""
    with measuring(model.module, model.optimizer):
        try:
            with average.in_place(model.module):
                return losses_on(model, sets)
        finally:
            torch.clear_autocast_cache()


@torch.no_grad()
def losses_on(model: LiveModel, sets: Sets) -> dict[str, float]:
    """Return the mean loss over the tokens of every set, nats per token; ranks share out the batches."""
    torch.clear_autocast_cache()
    found = {}
    for name, batches in sets.items():
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches[distributed.rank() :: distributed.world_size()]:
            with (
                model.meter.counting(model.module, "judge", batch["input_ids"].shape, targets_shape(batch)),
                model.autocast(),
            ):
                losses = model.losses(model.to_device(batch))
            sums += loss_sums(losses, token_weights(batch))
        found[name] = mean_of(distributed.sum_over_ranks(sums))
    return found


def _take_step(model: LiveModel, steps: TrainingSteps, batches: Iterator[object], index: int) -> None:
    """Take one optimizer step as training does."""
    parameters = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    ranks = distributed.world_size()
    for place in range(steps.accumulate):
        batch = next(batches)
        loss = steps.loss(batch, index * steps.accumulate + place)
        if loss is None:
            continue
        model.meter.add_flops(steps.flops(batch))
        gradients = model.view.gradients(loss / steps.accumulate, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    if ranks > 1:
        for parameter in parameters:
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = distributed.sum_over_ranks(mine) / ranks
    model.clip_gradients(parameters)
    model.optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    torch.clear_autocast_cache()
    steps.after_step(index)


def tokens_in(batch: object) -> int:
    """Return the number of token positions of a training batch, 0 where it holds no token ids."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids.numel() if isinstance(ids, Tensor) else 0


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@torch.no_grad()
def _write(live: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for each, value in zip(live, values, strict=True):
        each.copy_(value)


def _set_training(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag  # not train(): some modules do work in it


@contextmanager
def _nothing() -> Iterator[None]:
    yield
