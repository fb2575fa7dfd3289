"""Derivatives along a direction by central differences: two passes, every architecture, every kernel.

Parameters are displaced in place and put back from copies, bit for bit. The length of the displacement balances
curvature, whose error grows with its square, against rounding, whose error grows with its inverse:
:data:`DISPLACEMENT_SHARES` where nothing is known, :data:`LOSS_CHANGE_NATS` where the slope of the losses is known.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveselect.functional.gradients import mean_gradient
from liveselect.functional.layer_pass import LossFn, T
from liveselect.functional.layer_plans import match_direction
from liveselect.functional.sharding import like, local, reshard

DISPLACEMENT_SHARES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Length of the displacement as a share of that of the parameters, by the precision that losses are computed in."""

LOSS_CHANGE_NATS = {torch.float64: 1e-5, torch.float32: 2e-2, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""By how much a displacement should change a loss, nats per token, by the same precision."""

_MAX_LENGTHENING = 10.0  # times the displacement of DISPLACEMENT_SHARES: the slope is a guess, and may be far too small
_MAX_GRADIENT_CHANGE = (
    0.05  # share of a gradient, from the middle to either end; beyond, curvature spoils the difference
)
_AIMED_GRADIENT_CHANGE = 0.02  # clearly below, so that the next attempt need not be the last
_MAX_ATTEMPTS = 3  # each costs two gradients

Length = Callable[[Sequence[Tensor]], float]
"""The Euclidean length of several tensors together, of the whole of those that ranks hold in parts."""


def length_of(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean length of several tensors together."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


def central_difference_product(
    model: nn.Module, loss_fn: LossFn[T], batches: Sequence[T], vector: Mapping[str, Tensor], share: float | None = None
) -> dict[str, Tensor]:
    r"""Return :math:`\nabla^2 L \, v` in the parameters that ``vector`` names; L is the mean over all examples.

    :math:`(\nabla L(\theta + hv) - \nabla L(\theta - hv)) / 2h`: two forwards and backwards, no more memory than
    training, and right to about three digits in float32.

    Args:
        model: its parameters move while the call lasts.
        loss_fn: per-example losses, computed in float32 or finer.
        batches: walked twice.
        vector: for each parameter that takes part a tensor of its shape.
        share: see :data:`DISPLACEMENT_SHARES`; by default that of the parameters' type, and less where the gradient
            changes much.
    """
    return central_difference(model, vector, lambda: mean_gradient(model, loss_fn, batches), Reach(share))


@dataclass
class Reach:
    """How far differences of gradients reach, from one product to the next.

    Where the loss is sharply curved along a vector, as it is along gradients, the share in :data:`DISPLACEMENT_SHARES`
    may be too large: a gradient that changes by more than a twentieth on the way is measured again over a shorter way,
    with which later products begin.

    Attributes:
        share: see :data:`DISPLACEMENT_SHARES`; None before the first product means that of the parameters' type.
    """

    share: float | None = None


def central_difference(
    model: nn.Module,
    vector: Mapping[str, Tensor],
    gradient: Callable[[], Mapping[str, Tensor]],
    reach: Reach | None = None,
    length: Length = length_of,
) -> dict[str, Tensor]:
    """Return how a gradient changes along a vector, ``(gradient ahead - gradient behind) / 2h``, for each name in it.

    Args:
        model: its parameters move while the call lasts.
        vector: for each parameter that takes part a tensor of its shape; sharded where the parameter is.
        gradient: called at both ends; the tensors that it returns are written to. Where ranks hold parts, its parts.
        reach: of the products before, and after.
        length: needed where ranks hold parameters in parts.
    """
    reach = Reach() if reach is None else reach
    parameters = _named_in(model, vector)

    def size(parts: Mapping[str, Tensor]) -> float:
        return length([like(parts[name], value) for name, value in vector.items()])

    reach.share = reach.share or DISPLACEMENT_SHARES[next(iter(parameters.values())).dtype]
    with _displaceable(model, parameters, vector, reach.share, length) as (h, displace):
        for attempt in range(_MAX_ATTEMPTS):
            displace(h)
            ahead = gradient()
            displace(-h)
            behind = gradient()
            squares = 2 * size(ahead) ** 2 + 2 * size(behind) ** 2
            difference = {name: ahead[name].sub_(behind[name]) for name in vector}
            apart = size(difference)
            change = apart / math.sqrt(max(squares - apart**2, torch.finfo(torch.float32).tiny))
            if not _MAX_GRADIENT_CHANGE < change < math.inf or attempt == _MAX_ATTEMPTS - 1:
                break
            h *= _AIMED_GRADIENT_CHANGE / change
            reach.share *= _AIMED_GRADIENT_CHANGE / change
    return {name: value.div_(2 * h) for name, value in difference.items()}


def central_difference_dots(
    model: nn.Module,
    loss_fn: LossFn[T],
    batches: Callable[[], Iterable[T]],
    vector: Mapping[str, Tensor],
    slope: float | None = None,
    dtype: torch.dtype | None = None,
    length: Length = length_of,
) -> Tensor:
    r"""Return the inner product of every example's gradient with ``vector``, ``(n,)``, over all batches.

    :math:`(\ell_i(\theta + hv) - \ell_i(\theta - hv)) / 2h`: two forwards. The parameters move twice in all, however
    many batches there are.

    Args:
        model: its parameters move while the call lasts.
        loss_fn: per-example losses ``(B,)``.
        batches: gives the same batches at each of two calls.
        vector: as in :func:`central_difference`.
        slope: roughly how fast losses change along the vector. The displacement is then by :data:`LOSS_CHANGE_NATS`,
            but no more than ten times as long as by :data:`DISPLACEMENT_SHARES`, which is the default.
        dtype: in which losses are computed under autocast; by default that of the parameters.
        length: needed where ranks hold parameters in parts.
    """
    parameters = _named_in(model, vector)
    dtype = dtype or next(iter(parameters.values())).dtype
    with _displaceable(model, parameters, vector, DISPLACEMENT_SHARES[dtype], length) as (h, displace):
        h = min(LOSS_CHANGE_NATS[dtype] / slope, _MAX_LENGTHENING * h) if slope else h
        ends = _losses_at_both_ends(model, loss_fn, batches, h, displace)
    if not ends[0]:
        return torch.empty(0)
    return (torch.cat(ends[0]) - torch.cat(ends[1])).div_(2 * h)


def central_difference_dot(
    model: nn.Module,
    loss_fn: LossFn[T],
    batch: T,
    direction: Mapping[str, Tensor | None],
    step: float = 1e-3,
    length: Length = length_of,
) -> Tensor:
    r"""Return the products of :func:`~liveselect.functional.gradients.example_dot` by central differences, ``(B,)``.

    Two forwards, any architecture, any parameters; with an error of order :math:`h^2` from curvature and :math:`1/h`
    from rounding.

    Args:
        model: its parameters move while the call lasts.
        loss_fn: per-example losses, computed in float32 or finer: 16-bit rounding is larger than the differences.
        batch: passed to ``loss_fn``.
        direction: as in ``example_dot``.
        step: length of the displacement as a share of that of the parameters, :math:`|hV| / |\theta|`. In float32
            1e-3 to 1e-2 is a plateau; in float64 1e-5.
        length: needed where ranks hold parameters in parts.

    Raises:
        ValueError: unknown names or shapes that do not fit.
    """
    reshard(model)
    parameters, values = match_direction(model, direction)
    with _displaceable(model, parameters, values, step, length) as (h, displace):
        (ahead,), (behind,) = _losses_at_both_ends(model, loss_fn, lambda: [batch], h, displace)
    return (ahead - behind) / (2 * h)


def _named_in(model: nn.Module, vector: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    reshard(model)  # else the model would show whole parameters
    return {name: parameter for name, parameter in model.named_parameters() if name in vector}


def _losses_at_both_ends(
    model: nn.Module,
    loss_fn: LossFn[T],
    batches: Callable[[], Iterable[T]],
    h: float,
    displace: Callable[[float], None],
) -> tuple[list[Tensor], list[Tensor]]:
    def losses_at(by: float) -> list[Tensor]:
        displace(by)
        return [loss_fn(model, batch) for batch in batches()]

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return losses_at(h), losses_at(-h)


@contextmanager
def parameters_kept(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Open a block in which parameters of ``model`` may be written to; on exit they are as before, bit for bit.

    Yields copies of them, in their order; of sharded parameters copies of this rank's parts.
    """
    reshard(model)  # else a forward before would have left whole parameters in their place
    live = [local(parameter) for parameter in parameters]
    kept = [parameter.clone() for parameter in live]
    try:
        yield kept
    finally:
        reshard(model)  # else the next forward would not read the restored parts
        torch._foreach_copy_(live, kept)
        torch.clear_autocast_cache()  # casts of the weights in between would be used again


@contextmanager
def _displaceable(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    vector: Mapping[str, Tensor],
    share: float,
    length: Length,
) -> Iterator[tuple[float, Callable[[float], None]]]:
    """Open a block with the length h of a displacement, and the function that displaces all parameters by h v."""
    live = [local(parameter) for parameter in parameters.values()]
    moves = [local(vector[name]).to(part) for name, part in zip(parameters, live, strict=True)]
    distance = length([vector[name] for name in parameters])
    size = length([parameter.detach() for parameter in parameters.values()])
    h = share * max(size, torch.finfo(torch.float32).tiny) / distance if distance else 1.0
    with parameters_kept(model, parameters.values()) as kept:

        def displace(by: float) -> None:
            reshard(model)
            with torch.no_grad():
                torch._foreach_copy_(live, kept)
                torch._foreach_add_(live, moves, alpha=by)
            torch.clear_autocast_cache()

        yield h, displace
