"""Derivatives along a direction by central differences: two passes, every architecture, every kernel.

Parameters are displaced in place and put back from copies, bit for bit. The length of the displacement is given as a
share of that of the parameters; :data:`SHARES` balances curvature, whose error grows with its square, against rounding,
whose error grows with its inverse.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from liveselect.functional.gradients import LossFn, mean_gradient

SHARES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Length of the displacement as a share of that of the parameters, by the precision that losses are computed in."""


def central_difference_product(
    model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], vector: Mapping[str, Tensor], share: float | None = None
) -> dict[str, Tensor]:
    r"""Return :math:`\nabla^2 L \, v` in the parameters that ``vector`` names; L is the mean over all examples.

    :math:`(\nabla L(\theta + hv) - \nabla L(\theta - hv)) / 2h`: two forwards and backwards, no more memory than
    training, and right to about three digits in float32.

    Args:
        model: its parameters move while the call lasts.
        loss_fn: per-example losses, computed in float32 or finer.
        batches: walked twice.
        vector: for each parameter that takes part a tensor of its shape.
        share: see :data:`SHARES`; by default that of the parameters' type.
    """
    with _displaceable(model, vector, share) as (h, displace):
        displace(h)
        ahead = mean_gradient(model, loss_fn, batches)
        displace(-h)
        behind = mean_gradient(model, loss_fn, batches)
    return {name: (ahead[name] - behind[name]).div_(2 * h) for name in vector}


def central_difference_dots(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Callable[[], Iterable[Any]],
    vector: Mapping[str, Tensor],
    share: float | None = None,
) -> Tensor:
    r"""Return the inner product of every example's gradient with ``vector``, ``(n,)``, over all batches.

    :math:`(\ell_i(\theta + hv) - \ell_i(\theta - hv)) / 2h`: two forwards. The parameters move twice in all, however
    many batches there are.

    Args:
        model: its parameters move while the call lasts.
        loss_fn: per-example losses ``(B,)``.
        batches: gives the same batches at each of two calls.
        vector: as in :func:`central_difference_product`.
        share: see :data:`SHARES`; losses under autocast want that of the shorter type.
    """
    ends = []
    eager = torch.compiler.set_stance("force_eager")
    with _displaceable(model, vector, share) as (h, displace), torch.no_grad(), eager:
        for signed in (h, -h):
            displace(signed)
            ends.append([loss_fn(model, batch) for batch in batches()])
    if not ends[0]:
        return torch.empty(0)
    return (torch.cat(ends[0]) - torch.cat(ends[1])).div_(2 * h)


@contextmanager
def parameters_kept(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Open a block in which parameters may be written to; on exit they are as before, bit for bit.

    Yields copies of them, in their order.
    """
    live = [parameter.detach() for parameter in parameters]
    kept = [parameter.clone() for parameter in live]
    try:
        yield kept
    finally:
        torch._foreach_copy_(live, kept)
        torch.clear_autocast_cache()  # casts of the weights in between would be used again


@contextmanager
def _displaceable(
    model: nn.Module, vector: Mapping[str, Tensor], share: float | None
) -> Iterator[tuple[float, Callable[[float], None]]]:
    """Open a block with the length h of a displacement, and the function that displaces all parameters by h v."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if name in vector}
    live, moves = list(parameters.values()), [vector[name].to(parameter) for name, parameter in parameters.items()]
    length = _length(moves)
    share = share or SHARES[live[0].dtype]
    h = share * max(_length(live), torch.finfo(torch.float32).tiny) / length if length else 1.0
    with parameters_kept(live) as kept:

        def displace(by: float) -> None:
            with torch.no_grad():
                torch._foreach_copy_(live, kept)
                torch._foreach_add_(live, moves, alpha=by)
            torch.clear_autocast_cache()

        yield h, displace


def _length(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))
