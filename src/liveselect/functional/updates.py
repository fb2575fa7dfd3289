"""The steps of optimizers and clipping on one gradient, and their transposes: plain tensor arithmetic.

A rule is the update of one parameter; a clip acts on the whole gradient before. Each comes with ``pull_back``, which
maps the derivatives of a later quantity F in the outputs (costates) to those in the inputs. Vectors in parameter space
are dicts from parameter names to tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Vector = dict[str, Tensor]
Moments = tuple[Tensor, ...]
Whole = Callable[[Vector], Vector]
"""Where ranks hold parameters in parts: adds up numbers of the parts, by name, to those of the whole parameters."""

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


@dataclass(frozen=True)
class Update:
    """One update of a parameter: its value before, its gradient, the moments after, the number from 1, and the rate."""

    parameter: Tensor
    gradient: Tensor
    moments: Moments
    count: int
    rate: float


class Pull(NamedTuple):
    r"""The pull-back of one update for one parameter, each of the parameter's shape.

    Attributes:
        gradient: part of :math:`p_t`, how F changes with the gradient that the optimizer was given.
        parameter: :math:`A_t^\top \lambda_{t+1}`, how F changes with the parameter while the gradient is held.
        moments: costates of the moments before the step.
    """

    gradient: Tensor
    parameter: Tensor
    moments: Moments


class Rule(Protocol):
    """The update of one parameter, elementwise, and its transpose."""

    @property
    def rate(self) -> float:
        """Learning rate before any schedule."""

    @property
    def moments(self) -> int:
        """Number of moments that the optimizer keeps for a parameter."""

    def denominator(self, moments_after: Moments, count: int) -> Tensor | None:
        """Return the divisor of update number ``count``, coordinate by coordinate; None where there is none."""

    def step(
        self, parameter: Tensor, gradient: Tensor, moments: Moments, count: int, rate: float
    ) -> tuple[Tensor, Moments]:
        """Return parameter and moments after update number ``count`` (from 1) at learning rate ``rate``."""

    def pull_back(self, costate: Tensor, moment_costates: Moments, update: Update) -> Pull:
        r"""Return the costates before the update.

        Args:
            costate: :math:`\lambda_{t+1}`, of the parameter's shape.
            moment_costates: those of the moments after the update.
            update: the update itself.
        """


@dataclass(frozen=True)
class SGDRule:
    """``torch.optim.SGD``: momentum, dampening, Nesterov, and weight decay that is added to the gradient."""

    rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def moments(self) -> int:
        """One buffer when there is momentum."""
        return int(self.momentum != 0)

    def denominator(self, moments_after: Moments, count: int) -> Tensor | None:
        """None: all coordinates are scaled alike."""
        return None

    def step(
        self, parameter: Tensor, gradient: Tensor, moments: Moments, count: int, rate: float
    ) -> tuple[Tensor, Moments]:
        """See :class:`Rule`."""
        gradient = gradient.add(parameter, alpha=self.weight_decay) if self.weight_decay else gradient
        if not self.moments:
            return parameter.sub(gradient, alpha=rate), ()
        buffer = moments[0].mul(self.momentum).add_(gradient, alpha=self._gain(count))
        update = gradient.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return parameter.sub(update, alpha=rate), (buffer,)

    def pull_back(self, costate: Tensor, moment_costates: Moments, update: Update) -> Pull:
        """See :class:`Rule`; needs neither the gradient nor the moments, because the update is linear in both."""
        rate = update.rate
        before: Moments = ()
        if self.moments:
            through_buffer = moment_costates[0].sub(costate, alpha=rate * (self.momentum if self.nesterov else 1.0))
            pulled = through_buffer.mul(self._gain(update.count))
            if self.nesterov:
                pulled.sub_(costate, alpha=rate)
            before = (through_buffer.mul_(self.momentum),)
        else:
            pulled = costate.mul(-rate)
        held = costate.add(pulled, alpha=self.weight_decay) if self.weight_decay else costate
        return Pull(pulled, held, before)

    def _gain(self, count: int) -> float:
        return 1.0 if count == 1 else 1.0 - self.dampening  # the first gradient fills the buffer undampened


@dataclass(frozen=True)
class AdamRule:
    """``torch.optim.Adam`` and ``AdamW``, with bias correction; ``decoupled`` decay is that of AdamW."""

    rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True

    @property
    def moments(self) -> int:
        """Two: the running means of the gradient and of its square."""
        return 2

    def denominator(self, moments_after: Moments, count: int) -> Tensor | None:
        """The corrected root of the second moment, plus ``eps``."""
        return self._scale(moments_after[1], count)[1]

    def step(
        self, parameter: Tensor, gradient: Tensor, moments: Moments, count: int, rate: float
    ) -> tuple[Tensor, Moments]:
        """See :class:`Rule`."""
        gradient = self._decayed(gradient, parameter)
        first = moments[0].lerp(gradient, 1 - self.beta1)
        second = moments[1].mul(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        _, denominator = self._scale(second, count)
        shrunk = parameter.mul(1 - rate * self.weight_decay) if self.decoupled else parameter
        return shrunk.addcdiv(first, denominator, value=-rate / (1 - self.beta1**count)), (first, second)

    def pull_back(self, costate: Tensor, moment_costates: Moments, update: Update) -> Pull:
        """See :class:`Rule`."""
        (first, second), count, rate = update.moments, update.count, update.rate
        correction1, correction2 = 1 - self.beta1**count, 1 - self.beta2**count
        root, denominator = self._scale(second, count)
        gradient = self._decayed(update.gradient, update.parameter)
        to_first = moment_costates[0].addcdiv(costate, denominator, value=-rate / correction1)
        slope = first.div(denominator).div_(denominator).div_(root).mul_(rate / (2 * correction1 * correction2))
        # the square root has no slope where there never was a gradient; the first moment is zero there as well
        slope = slope.where(second > 0, 0.0)
        to_second = moment_costates[1].addcmul(slope, costate)
        pulled = to_first.mul(1 - self.beta1).addcmul_(gradient, to_second, value=2 * (1 - self.beta2))
        if self.decoupled:
            held = costate.mul(1 - rate * self.weight_decay)
        else:
            held = costate.add(pulled, alpha=self.weight_decay)
        return Pull(pulled, held, (to_first.mul_(self.beta1), to_second.mul_(self.beta2)))

    def _decayed(self, gradient: Tensor, parameter: Tensor) -> Tensor:
        if self.decoupled or not self.weight_decay:
            return gradient
        return gradient.add(parameter, alpha=self.weight_decay)

    def _scale(self, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the corrected root of the second moment, and the divisor of the update."""
        root = second.sqrt().div_((1 - self.beta2**count) ** 0.5)
        return root, root.add(self.eps)


class Clip(Protocol):
    """A change of the whole gradient before the optimizer sees it, and its transpose."""

    def apply(self, gradient: Vector) -> Vector:
        """Return the clipped gradient."""

    def pull_back(self, costate: Vector, gradient: Vector) -> Vector:
        """Return the costate of the gradient before clipping, given that of the clipped one."""


@dataclass(frozen=True)
class ClipNorm:
    """``torch.nn.utils.clip_grad_norm_``: scale the gradient so that its length is at most ``limit``.

    Attributes:
        limit: of the length.
        whole: needed where the gradients given are parts.
    """

    limit: float
    whole: Whole | None = None

    def apply(self, gradient: Vector) -> Vector:
        """See :class:`Clip`."""
        factor = self._factor(norm(gradient, self.whole))
        return gradient if factor is None else {name: value.mul(factor) for name, value in gradient.items()}

    def pull_back(self, costate: Vector, gradient: Vector) -> Vector:
        """See :class:`Clip`; the factor itself depends on the gradient's length."""
        length = norm(gradient, self.whole)
        factor = self._factor(length)
        if factor is None:
            return costate
        along = inner(gradient, costate, self.whole) / (length * (length + _CLIP_EPS))
        return {name: costate[name].sub(along * value).mul_(factor) for name, value in gradient.items()}

    def _factor(self, length: Tensor) -> Tensor | None:
        factor = self.limit / (length + _CLIP_EPS)
        return factor if bool(factor < 1) else None


@dataclass(frozen=True)
class ClipValue:
    """``torch.nn.utils.clip_grad_value_``: cut every coordinate to ``[-limit, limit]``."""

    limit: float

    def apply(self, gradient: Vector) -> Vector:
        """See :class:`Clip`."""
        return {name: value.clamp(-self.limit, self.limit) for name, value in gradient.items()}

    def pull_back(self, costate: Vector, gradient: Vector) -> Vector:
        """See :class:`Clip`; a coordinate that was cut no longer depends on the gradient."""
        return {name: costate[name].where(value.abs() <= self.limit, 0.0) for name, value in gradient.items()}


def inner(first: Vector, second: Vector, whole: Whole | None = None) -> Tensor:
    """Return the inner product of two vectors, a scalar; ``whole`` is needed where they are parts."""
    products = {name: torch.dot(value.flatten(), second[name].flatten()) for name, value in first.items()}
    return torch.stack(list((whole(products) if whole else products).values())).sum()


def norm(vector: Vector, whole: Whole | None = None) -> Tensor:
    """Return the Euclidean length of a vector, a scalar; ``whole`` is needed where it is a part."""
    lengths = {name: torch.linalg.vector_norm(value) for name, value in vector.items()}
    if whole:
        squares = whole({name: length.square() for name, length in lengths.items()})
        lengths = {name: square.sqrt() for name, square in squares.items()}
    return torch.linalg.vector_norm(torch.stack(list(lengths.values())))
