"""The gradient of the mean reference loss, which ranks take together."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.gradients import summed_loss_and_gradient
from liveselect.functional.sharding import backward, is_part, is_sharded, like, local
from liveselect.influence.reference import ReferencePass, batch_flops
from liveselect.protocols import RoundContext


def mean_reference_gradient(
    context: RoundContext, reference: ReferencePass, parameters: Mapping[str, nn.Parameter]
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean reference loss, nats per token, and its gradient in the named ``parameters``.

    The mean is over all tokens of the set; ranks share out its batches, and all get the same loss. The gradient is
    float32 or finer and whole on every rank, except for parameters of which each holds a part: it then holds the same
    part of the gradient. Call inside :func:`liveselect.snapshot.measuring`, in the precision that is wanted.
    """
    if is_sharded(context.model):
        loss, tokens, gradient = _summed_in_shards(context, reference, parameters)
    else:
        loss, tokens, gradient = _summed(context, reference, parameters)
    totals = distributed.sum_over_ranks(torch.tensor([loss, tokens], dtype=torch.float64))
    # in place and one by one: there may be no room for all of them twice
    for name in gradient:
        whole = gradient[name] if is_part(gradient[name]) else distributed.sum_over_ranks(gradient[name])
        gradient[name] = whole / float(totals[1])
    return float(totals[0] / totals[1]), gradient


def _summed(
    context: RoundContext, reference: ReferencePass, parameters: Mapping[str, nn.Parameter]
) -> tuple[float, float, dict[str, Tensor]]:
    share = slice(distributed.rank(), None, distributed.world_size())
    batches, counts = reference.batches[share], reference.counts[share]
    context.meter.add_flops(3 * sum(batch_flops(context.model, batch) for batch in batches))
    return summed_loss_and_gradient(context.model, context.loss_fn, batches, counts, parameters)


def _summed_in_shards(
    context: RoundContext, reference: ReferencePass, parameters: Mapping[str, nn.Parameter]
) -> tuple[float, float, dict[str, Tensor]]:
    """Return this rank's sums; of gradients in parameters that are held in parts, this rank's part of all ranks'."""
    everything = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
    wide = {name: torch.promote_types(parameter.dtype, torch.float32) for name, parameter in parameters.items()}
    sums = {name: torch.zeros_like(local(p), dtype=wide[name]) for name, p in parameters.items()}
    places = {id(parameter): name for name, parameter in parameters.items()}
    loss = tokens = 0.0
    for (batch, count), own in distributed.even_share(list(zip(reference.batches, reference.counts, strict=True))):
        losses = context.loss_fn(context.model, batch)
        weighted = losses @ (count * own).to(losses)
        for parameter, gradient in zip(everything, backward(weighted, everything), strict=True):
            if id(parameter) in places and gradient is not None:
                ranks = distributed.world_size() if is_part(parameter) else 1  # backward takes the mean over ranks
                sums[places[id(parameter)]].add_(local(gradient), alpha=ranks)
        loss += float(weighted.detach())
        tokens += float(count.sum()) * own
        context.meter.add_flops(3 * batch_flops(context.model, batch))
    return loss, tokens, {name: like(value, parameters[name]) for name, value in sums.items()}
