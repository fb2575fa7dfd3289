"""The size of the gradients on which an optimizer would step for one candidate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from liveselect.grammar import LiveModel, NotMeasurableError, Round
from liveselect.influence.reference import charge_gradient, split_rows


def typical_gradient(
    model: LiveModel, round: Round, parameters: Sequence[nn.Parameter], divisor: int, examples: int
) -> tuple[list[Tensor], float]:
    """Return the size of a candidate's gradient as the optimizer meets it, and the share that clipping leaves of it.

    Examples are drawn from the round's candidates and shared out over ranks. The size of a coordinate is the root mean
    square over those whose gradient reaches it: for a row of an embedding these are texts that hold its token. Where
    none does, it is that of the coordinates of the same parameter that some gradient reaches. Ranks that hold parts of
    the parameters take every gradient together.

    Args:
        model: the live model.
        round: the round whose candidates are drawn from.
        parameters: the gradients are taken in these.
        divisor: an example's gradient is divided by it before it is clipped.
        examples: number of candidates to draw.

    Returns:
        For each parameter a tensor of the shape of its local part, zero where no gradient reaches any of the parameter;
        and a number up to 1.

    Raises:
        NotMeasurableError: no gradient of those drawn reaches any parameter.
    """
    drawn = torch.randperm(len(round.candidates), generator=round.generator("step sizes"))[:examples]
    view = model.view
    squares = [torch.zeros_like(view.local(parameter)) for parameter in parameters]
    reached = [torch.zeros_like(view.local(parameter)) for parameter in parameters]
    lengths = torch.zeros(2, dtype=torch.float64)  # squared, before and after clipping
    for batch in round.batches(round.candidates[view.take_share(drawn)]):
        for row in split_rows(batch, 1):
            with model.autocast():
                charge_gradient(model, row, parameters)
                loss = model.losses(row).sum()
            gradients = view.gradients(loss, parameters)
            lengths += _add(squares, reached, parameters, gradients, divisor, model)
    squares = [view.sum_shares(square) for square in squares]
    reached = [view.sum_shares(count) for count in reached]
    overall = torch.stack([torch.stack([s.sum(), r.sum()]) for s, r in zip(squares, reached, strict=True)]).double()
    overall = view.sum(overall)  # parts that several ranks hold alike count as often above as below
    if not overall[:, 0].any():
        raise NotMeasurableError(
            f"none of {len(drawn)} sampled candidates has a finite gradient other than zero: look for candidates "
            "without labels or without a finite loss, or sample more of them"
        )
    typical = overall[:, 0] / overall[:, 1].clamp(min=1)
    sizes = [_size(*each) for each in zip(squares, reached, typical.tolist(), strict=True)]
    before, after = view.sum_shares(lengths).tolist()
    return sizes, math.sqrt(after / before) if before else 1.0


@torch.no_grad()
def _add(
    squares: list[Tensor],
    reached: list[Tensor],
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    divisor: int,
    model: LiveModel,
) -> Tensor:
    """Add one clipped gradient to the sums; returns its squared length before and after clipping, ``(2,)``."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient / divisor
    before = _squared_length(parameters, model)
    after = 0.0
    if math.isfinite(before):
        model.clip_gradients(list(parameters))
        for square, count, parameter in zip(squares, reached, parameters, strict=True):
            if parameter.grad is not None:
                gradient = model.view.local(parameter.grad)
                square.addcmul_(gradient, gradient)
                count.add_(gradient != 0)
        after = _squared_length(parameters, model)
    else:
        before = 0.0
    for parameter in parameters:
        parameter.grad = None
    return torch.tensor([before, after], dtype=torch.float64)


def _squared_length(parameters: Sequence[nn.Parameter], model: LiveModel) -> float:
    return model.view.norm([parameter.grad for parameter in parameters if parameter.grad is not None]) ** 2


def _size(squares: Tensor, reached: Tensor, overall: float) -> Tensor:
    return torch.where(reached > 0, squares / reached.clamp(min=1), overall).sqrt()
