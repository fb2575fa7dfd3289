"""Gradients that ranks take together, and vectors of which each of them may hold a part."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.gradients import summed_loss_and_gradient
from liveselect.functional.sharding import backward, copies, is_part, is_sharded, like, local, reshard
from liveselect.functional.updates import Vector, Whole
from liveselect.protocols import Batch, RoundContext

Weighted = tuple[Batch, Tensor]
"""A batch, and the weight ``(B,)`` of each of its examples."""


def mean_over_ranks(
    context: RoundContext,
    items: Sequence[Weighted],
    spare: Callable[[], Weighted],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[float, Vector]:
    """Return the weighted mean loss over the examples of all ranks, and its gradient in the named ``parameters``.

    The gradient is float32 or finer, and whole on every rank, except for parameters of which each holds a part: it then
    holds the same part of the gradient, as a plain tensor. Call inside :func:`liveselect.snapshot.measuring`.

    Args:
        context: of the round.
        items: of this rank; ranks may have unequally many.
        spare: what a rank computes along on, and does not count, where all must compute and it has no more.
        parameters: to differentiate in, by name.
    """
    if is_sharded(context.model):
        loss, weight, gradient = _summed_in_shards(context, items, spare, parameters)
    else:
        batches, weights = [batch for batch, _ in items], [weight for _, weight in items]
        loss, weight, gradient = summed_loss_and_gradient(context.model, context.loss_fn, batches, weights, parameters)
    loss, weight = distributed.sum_over_ranks(torch.tensor([loss, weight], dtype=torch.float64)).tolist()
    # one by one: there may be no room for all of them twice
    for name, parameter in parameters.items():
        if not is_part(parameter):
            gradient[name] = distributed.sum_over_ranks(gradient[name])
        gradient[name].div_(weight)
    return loss / weight, {name: gradient[name] for name in parameters}


def _summed_in_shards(
    context: RoundContext,
    items: Sequence[Weighted],
    spare: Callable[[], Weighted],
    parameters: Mapping[str, nn.Parameter],
) -> tuple[float, float, Vector]:
    """Return this rank's sums; of gradients in parameters that are held in parts, this rank's part of all ranks'."""
    reshard(context.model)
    everything = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
    wide = {name: torch.promote_types(parameter.dtype, torch.float32) for name, parameter in parameters.items()}
    sums = {name: torch.zeros_like(local(p), dtype=wide[name]) for name, p in parameters.items()}
    places = {id(parameter): name for name, parameter in parameters.items()}
    loss = total = 0.0
    for (batch, weights), own in distributed.in_step(items, spare):
        losses = context.loss_fn(context.model, batch)
        weighted = losses @ (weights * own).to(losses)
        for parameter, gradient in zip(everything, backward(weighted, everything), strict=True):
            if id(parameter) in places and gradient is not None:
                ranks = distributed.world_size() if is_part(parameter) else 1  # backward takes the mean over ranks
                sums[places[id(parameter)]].add_(local(gradient), alpha=ranks)
        loss += float(weighted.detach())
        total += float(weights.sum(dtype=torch.float64)) * own
    return loss, total, sums


def spread(parts: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Vector:
    """Return the parts that this rank holds as sharded tensors, laid out as the parameters; others as they are."""
    return {name: like(part, parameters[name]) for name, part in parts.items()}


def length_over_ranks(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean length of sharded tensors together, equal on all ranks; a collective."""
    squares = [local(tensor).double().square().sum() for tensor in tensors]
    return math.sqrt(float(distributed.total_of_parts(tensors, squares)))


def adding_parts_up(parameters: Mapping[str, nn.Parameter]) -> Whole:
    """Return what turns numbers of this rank's parts of the parameters into those of the whole parameters."""

    def whole(numbers: Vector) -> Vector:
        ranks = distributed.world_size()
        parts = [value.double().cpu() / copies(parameters[name], ranks) for name, value in numbers.items()]
        totals = distributed.sum_over_ranks(torch.stack(parts))
        return {name: total.to(value) for (name, value), total in zip(numbers.items(), totals, strict=True)}

    return whole
