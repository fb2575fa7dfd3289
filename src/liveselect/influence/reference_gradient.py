"""The gradient of the mean reference loss, which ranks take together."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.sharding import is_sharded
from liveselect.influence.rank_gradients import mean_over_ranks, spread
from liveselect.influence.reference import ReferencePass, batch_flops
from liveselect.protocols import RoundContext


def mean_reference_gradient(
    context: RoundContext,
    reference: ReferencePass,
    parameters: Mapping[str, nn.Parameter],
    weights: Sequence[Tensor] | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean reference loss, nats per token, and its gradient in the named ``parameters``.

    The mean is over all tokens of the set; ranks share out its batches, and all get the same loss. The gradient is
    float32 or finer and whole on every rank, except for parameters of which each holds a part: it then holds the same
    part of the gradient. Call inside :func:`liveselect.snapshot.measuring`, in the precision that is wanted.

    Args:
        context: of the round.
        reference: the set.
        parameters: to differentiate in, by name.
        weights: for each batch ``(B,)``, of its examples; by default their numbers of tokens.
    """
    everything = list(zip(reference.batches, reference.counts if weights is None else weights, strict=True))
    shares = distributed.even_share(everything)
    items = [(batch, weight * counts) for (batch, weight), counts in shares if counts or is_sharded(context.model)]
    context.meter.add_flops(3 * sum(batch_flops(context.model, batch) for batch, _ in items))
    loss, gradient = mean_over_ranks(context, items, lambda: everything[0], parameters)
    return loss, spread(gradient, parameters)
