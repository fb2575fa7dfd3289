"""How large the gradients are on which an optimizer would step for one candidate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.flops import forward_flops
from liveselect.functional.sharding import is_sharded, local
from liveselect.influence.one_step import gradients_of, rows_of
from liveselect.protocols import NotMeasurableError, RoundContext


def typical_gradient(
    context: RoundContext, parameters: Sequence[nn.Parameter], divisor: int, examples: int
) -> tuple[list[Tensor], float]:
    """Return the size of a candidate's gradient as the optimizer meets it, and the share that clipping leaves of it.

    Examples are drawn from the round's candidates and shared out over ranks. The size of a coordinate is the root mean
    square over those whose gradient reaches it: a row of an embedding is told by the texts that hold its token. Where
    none does, it is that of the coordinates of the same parameter that some gradient reaches. Ranks that hold a sharded
    model take every gradient together.

    Call inside :func:`liveselect.snapshot.measuring`, which takes care of the live gradients.

    Args:
        context: the round.
        parameters: what the gradients are taken in.
        divisor: what an example's gradient is divided by before it is clipped.
        examples: how many are drawn.

    Returns:
        For each parameter a tensor of the shape of its local part, zero where no gradient reaches any of the parameter;
        and a number up to 1.

    Raises:
        NotMeasurableError: no gradient of those drawn reaches any parameter.
    """
    drawn = torch.randperm(len(context.candidates), generator=context.generator("step sizes"))[:examples]
    sharded = is_sharded(context.model)
    mine = context.candidates[drawn if sharded else drawn[distributed.shard(len(drawn))]]
    squares = [torch.zeros_like(local(parameter)) for parameter in parameters]
    reached = [torch.zeros_like(local(parameter)) for parameter in parameters]
    lengths = torch.zeros(2, dtype=torch.float64)  # squared, before and after clipping
    for batch in context.candidate_batches(mine):
        for row in rows_of(batch):
            with context.forward_context():
                loss = context.loss_fn(context.model, row).sum()
            gradients = gradients_of(context.model, loss, parameters)
            context.meter.add_flops(3 * forward_flops(context.model, row["input_ids"].numel()))
            lengths += _add(squares, reached, parameters, gradients, divisor, context)
    if not sharded:
        squares = [distributed.sum_over_ranks(square) for square in squares]
        reached = [distributed.sum_over_ranks(count) for count in reached]
        lengths = distributed.sum_over_ranks(lengths)
    overall = torch.stack([torch.stack([s.sum(), r.sum()]) for s, r in zip(squares, reached, strict=True)]).double()
    if sharded:  # parts that several ranks hold alike count as often above as below
        overall = distributed.sum_over_ranks(overall)
    if not overall[:, 0].any():
        raise NotMeasurableError(
            f"none of {len(drawn)} sampled candidates has a finite gradient other than zero: look for candidates "
            "without labels or without a finite loss, or sample more of them"
        )
    typical = overall[:, 0] / overall[:, 1].clamp(min=1)
    sizes = [_size(*each) for each in zip(squares, reached, typical.tolist(), strict=True)]
    before, after = lengths.tolist()
    return sizes, math.sqrt(after / before) if before else 1.0


@torch.no_grad()
def _add(
    squares: list[Tensor],
    reached: list[Tensor],
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    divisor: int,
    context: RoundContext,
) -> Tensor:
    """Add one clipped gradient to the sums; returns its squared length before and after clipping, ``(2,)``."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient / divisor
    before = _squared_length(parameters, is_sharded(context.model))
    if not math.isfinite(before):
        return torch.zeros(2, dtype=torch.float64)
    context.clip_gradients(list(parameters))
    for square, count, parameter in zip(squares, reached, parameters, strict=True):
        if parameter.grad is not None:
            gradient = local(parameter.grad)
            square.addcmul_(gradient, gradient)
            count.add_(gradient != 0)
    return torch.tensor([before, _squared_length(parameters, is_sharded(context.model))], dtype=torch.float64)


def _squared_length(parameters: Sequence[nn.Parameter], sharded: bool) -> float:
    given = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = [norm.double().square() for norm in torch._foreach_norm([local(gradient) for gradient in given])]
    return float(distributed.total_of_parts(given, squares) if sharded else torch.stack(squares).sum())


def _size(squares: Tensor, reached: Tensor, overall: float) -> Tensor:
    return torch.where(reached > 0, squares / reached.clamp(min=1), overall).sqrt()
