"""Influence to first order: the product of every candidate's gradient with one direction."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.gradients import (
    central_difference_dot,
    example_dot,
    forward_mode_dot,
    plan_products,
)
from liveselect.functional.sharding import is_sharded, laid_out, like, local, refuse_flat
from liveselect.functional.slopes import step_slope
from liveselect.influence.one_step import (
    Probe,
    StepSize,
    live_learning_rate,
    refuse_unfit,
    trainable_parameters,
)
from liveselect.influence.reference import Precision, ReferencePass, batch_flops
from liveselect.influence.reference_gradient import mean_reference_gradient
from liveselect.influence.step_sizes import typical_gradient
from liveselect.protocols import Batch, NotMeasurableError, RoundContext
from liveselect.snapshot import Snapshot, measuring

Engine = Literal["hooks", "central_difference", "forward_mode", "optimizer_step"]
GradientAt = Literal["zero_step", "current"]
SlopeOver = Literal["candidates", "zero"]

_NEAR_ZERO = 1e-5  # share of the reference gradient: small enough for a derivative, large enough for float64
_MOVES = {torch.float64: 1e-5, torch.float32: 1e-2}  # nats of the reference loss, between rounding and curvature
_MOVE_IN_SHORT = 0.2  # where 16 bits hold a parameter: rounding swallows shorter moves
_FORWARDS = {"hooks": 3, "central_difference": 2, "forward_mode": 3}
_CHOICES = {
    "engine": Engine,
    "gradient_at": GradientAt,
    "step": StepSize,
    "slope_over": SlopeOver,
    "reference_precision": Precision,
}


@dataclass(frozen=True)
class _Tangent:
    """The reference loss as a linear function around one point; takes the place of the reference pass in a probe."""

    parameters: Sequence[Tensor]
    origin: Sequence[Tensor]  # the local parts
    gradient: Sequence[Tensor]

    @torch.no_grad()
    def loss(self, context: RoundContext, precision: Precision = "float32") -> float:
        """Return how far the loss lies from that at the origin, nats per token."""
        triples = zip(self.parameters, self.origin, self.gradient, strict=True)
        # the difference first, and wide: it is a small one of large numbers
        sums = [((local(now).double() - then) * local(slope)).sum() for now, then, slope in triples]
        return _total(context.model, self.parameters, sums)


@dataclass(frozen=True)
class _Fitted:
    direction: dict[str, Tensor]
    tangent: _Tangent | None
    learning_rate: float
    difference: float


class FirstOrderInfluence:
    r"""Measures what :class:`OneStepInfluence` measures, to first order, for about three forwards of a candidate.

    With :math:`A(g)` the parameters after one step of the live optimizer on the gradient g, :math:`u_0` its
    zero-gradient step, :math:`\eta` its learning rate and L the reference loss,

    .. math:: I_i = \langle D, g_i \rangle, \qquad
              D = -\frac{1}{\eta} \, A' \odot \nabla L(\theta + u_0)

    in nats per unit learning rate; larger is better. :math:`A'` is how far the step moves each coordinate for its
    gradient: the optimizer's own preconditioner, with live moments, counters, bias correction and settings. For SGD
    it is :math:`-\eta`, and D the reference gradient. It is taken from the optimizer's own code, see
    :func:`liveselect.functional.slopes.step_slope`, so any optimizer that treats coordinates apart can be used.

    The gradient is taken at :math:`\theta + u_0`, because that is where the probe starts from: most of a warm step is
    momentum, along which the loss is curved.

    Where an optimizer normalises gradients, its step saturates: the derivative at zero promises far more than it does
    in coordinates whose second moment has faded, such as rare words. ``slope_over="candidates"`` takes the slope
    between minus and plus the size of gradient that a few sampled candidates have there; ``"zero"`` the derivative.

    Clipping is part of the step. The products leave out that it shortens the gradients of some candidates more than
    those of others; in a real batch (``in_batch``) no single example is clipped unless its gradient is longer than N
    times the limit. ``engine="optimizer_step"`` leaves nothing out: it takes every candidate's step, clipping and
    optimizer included, and meets the displacement with the reference gradient. It costs about five forwards and works
    with every optimizer; what then remains between it and the exact probe is the curvature of the reference loss.

    Args:
        engine: ``hooks`` is exact and needs layers with known rules; ``central_difference`` (in full precision) and
            ``forward_mode`` (attention in plain operations) take any module; ``optimizer_step`` see above.
        gradient_at: where the reference gradient is taken: after the ``zero_step``, or at the ``current`` parameters.
        step: the form of :class:`OneStepInfluence` that is approximated; it sets the size of a candidate's gradient.
        slope_over: see above; ``optimizer_step`` has no use for it.
        sampled: candidates whose gradients tell the sizes for the slope, over all ranks; they cost a forward and a
            backward each.
        exclude: patterns of names of parameters, as in a shell, that take no part in the products.
        difference: length of the displacement of ``central_difference`` as a share of that of the parameters; by
            default as much as moves the reference loss by a hundredth of a nat, in float64 by much less, and with
            parameters of 16 bits by a fifth.
        reference_precision: as in :class:`OneStepInfluence`.

    Source: TracIn, Pruthi et al. 2020, arXiv 2002.08484, for the product of gradients; Xia et al. 2024, "LESS", arXiv
    2402.04333, for Adam's preconditioner in it; what it approximates is the probe of Yu et al. 2024, arXiv 2406.06046.
    """

    def __init__(
        self,
        engine: Engine = "hooks",
        gradient_at: GradientAt = "zero_step",
        step: StepSize = "in_batch",
        slope_over: SlopeOver = "candidates",
        sampled: int = 16,
        exclude: Sequence[str] = (),
        difference: float | None = None,
        reference_precision: Precision = "float32",
    ) -> None:
        self.engine: Engine = engine
        self.gradient_at: GradientAt = gradient_at
        self.step: StepSize = step
        self.slope_over: SlopeOver = slope_over
        self.sampled = sampled
        self.exclude = tuple(exclude)
        self.difference = difference
        self.reference_precision: Precision = reference_precision
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"expected {name} to be one of {get_args(kind)}, got {getattr(self, name)!r}")
        if sampled < 1:
            raise ValueError(f"expected sampled of at least 1, got {sampled}")
        if difference is not None and not 0 < difference < math.inf:
            raise ValueError(f"expected a positive difference, got {difference}")
        self._fitted: _Fitted | None = None
        self._restored: Mapping[str, Any] | None = None  # waits for the model
        self._coverage_checked = False  # in this process, since the direction was made

    @property
    def direction(self) -> Mapping[str, Tensor]:
        """The preconditioned reference gradient D by parameter name; its product with a gradient is an influence.

        Raises:
            RuntimeError: before ``fit``, or for the engine that takes steps.
        """
        if self._fitted is None:
            raise RuntimeError("FirstOrderInfluence has no direction before fit: call fit(context) once in each round")
        if not self._fitted.direction:
            raise RuntimeError('engine="optimizer_step" has no direction: ask one of the other engines')
        return self._fitted.direction

    def fit(self, context: RoundContext) -> Mapping[str, float]:
        """Take the reference gradient, and pull it through the optimizer.

        Raises:
            NotMeasurableError: the learning rate is zero, or the reference loss is not finite.
            ValueError: a pattern fits no parameter, or no rule gives the gradients of a layer.
            TypeError: the optimizer cannot take a step on a given gradient, or has no slope for each coordinate; or the
                engine does not work with a sharded model.
        """
        self._restored, self._coverage_checked = None, False
        refuse_unfit(context)
        refuse_flat(context.model, type(self).__name__)
        if self.engine == "forward_mode" and is_sharded(context.model):
            raise TypeError(
                'engine="forward_mode" does not work with parameters that are sharded over ranks (FSDP): use '
                'engine="hooks", or "central_difference"'
            )
        rate = live_learning_rate(context.optimizer)
        parameters = self._parameters(context)
        with measuring(context.model, context.optimizer):
            reference = ReferencePass.load(context)
            with context.meter.phase("reference gradient"):
                loss, gradient, origin = self._reference_gradient(context, reference, parameters)
            metrics = {
                "reference_loss" if self.gradient_at == "current" else "reference_loss_zero_step": loss,
                "reference_examples": float(reference.examples),
                "reference_tokens": float(reference.targets),
                "probe_learning_rate": rate,
            }
            if self.engine == "optimizer_step":
                tangent = _Tangent(list(parameters.values()), origin, list(gradient.values()))
                self._fitted = _Fitted({}, tangent, rate, 0.0)
                return metrics
            with context.meter.phase("precondition"):
                direction = self._precondition(context, parameters, gradient, rate)
        difference = self.difference or _difference(context.model, parameters, direction, gradient)
        if self.engine == "hooks":
            plan_products(context.model, direction)  # what no rule covers is told here, not at the first candidate
        self._fitted = _Fitted(direction, None, rate, difference)
        total = sum(parameter.numel() for parameter in trainable_parameters(context.optimizer))
        return metrics | {
            "direction_norm": _length(context.model, list(direction.values())),
            "measured_share": sum(parameter.numel() for parameter in parameters.values()) / total,
        }

    @property
    def fit_lasts(self) -> bool:
        """Whether the direction of one step may measure at later ones: all engines but the one that takes steps."""
        return self.engine != "optimizer_step"

    def fitted_state(self) -> dict[str, Any] | None:
        """Return what :meth:`fit` found, for a measurement that goes on at later steps; None when it holds at one only.

        Every rank must call it.
        """
        if self._fitted is None or self._fitted.tangent is not None:
            return None
        return {
            "direction": {name: distributed.whole(value).cpu() for name, value in self._fitted.direction.items()},
            "learning_rate": self._fitted.learning_rate,
            "difference": self._fitted.difference,
        }

    def load_fitted_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`fitted_state` returned; it is laid out like the model at the first use."""
        self._restored, self._coverage_checked = state, False

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)`` float32 on CPU.

        NaN stands where the loss or the product of an example is not finite.
        """
        if self._restored is not None:
            state, self._restored = self._restored, None
            direction = laid_out(state["direction"], context.model)
            self._fitted = _Fitted(direction, None, state["learning_rate"], state["difference"])
        if self._fitted is None:
            raise RuntimeError("FirstOrderInfluence.score was called before fit: call fit(context) once in each round")
        batch = context.to_device(batch)
        with measuring(context.model, context.optimizer):
            if self._fitted.tangent is not None:
                influence = self._from_steps(context, batch, self._fitted.tangent)
            else:
                with context.meter.phase("example gradients"):
                    influence = self._products(context, batch, self._fitted.direction, self._fitted.difference)
        return influence.where(influence.isfinite(), math.nan).float().cpu()

    def _products(
        self, context: RoundContext, batch: Batch, direction: Mapping[str, Tensor], difference: float
    ) -> Tensor:
        finite: list[Tensor] = []

        def loss_fn(model: nn.Module, rows: Batch) -> Tensor:
            losses = context.loss_fn(model, rows)
            finite.append(losses.detach().isfinite())
            return losses

        context.meter.add_flops(_FORWARDS[self.engine] * batch_flops(context.model, batch))
        if self.engine == "central_difference":
            with _full_precision(context):
                length = partial(_length, context.model)
                return central_difference_dot(context.model, loss_fn, batch, direction, difference, length)
        with context.forward_context():
            if self.engine == "forward_mode":
                return forward_mode_dot(context.model, loss_fn, batch, direction)
            check = not self._coverage_checked
            influence = example_dot(context.model, loss_fn, batch, direction, check, whole=distributed.whole)
            self._coverage_checked = True
        return influence.where(finite[0], math.nan)

    def _from_steps(self, context: RoundContext, batch: Batch, tangent: _Tangent) -> Tensor:
        weight = context.global_batch if self.step == "in_batch" else 1
        probe = Probe(context, tangent, self.reference_precision, weight)
        rate = self._fitted.learning_rate if self._fitted else math.nan
        return -weight * probe.losses_after_examples(batch) / rate

    def _reference_gradient(
        self, context: RoundContext, reference: ReferencePass, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[float, dict[str, Tensor], list[Tensor]]:
        """Return the mean reference loss where it is asked for, its gradient, and the parameters after the zero step.

        Loss in nats per token, the token-weighted mean over the whole set, equal on all ranks.
        """
        everything = trainable_parameters(context.optimizer)
        snapshot = Snapshot(context.model, context.optimizer)
        try:
            if self.gradient_at == "current":
                loss, gradient = self._summed(context, reference, parameters)
            for parameter in everything:
                parameter.grad = torch.zeros_like(parameter)
            context.clip_gradients(everything)
            context.optimizer.step()
            for parameter in everything:
                parameter.grad = None
            torch.clear_autocast_cache()  # casts of the weights before the step would be used again
            if self.gradient_at == "zero_step":
                loss, gradient = self._summed(context, reference, parameters)
            keep = self.engine == "optimizer_step"
            return loss, gradient, [local(p).clone() for p in parameters.values()] if keep else []
        finally:
            snapshot.restore()

    def _summed(
        self, context: RoundContext, reference: ReferencePass, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[float, dict[str, Tensor]]:
        with _full_precision(context) if self.reference_precision == "float32" else context.forward_context():
            loss, gradient = mean_reference_gradient(context, reference, parameters)
        if not math.isfinite(loss):
            raise NotMeasurableError(
                f"the reference loss {'after a step on zero gradients' if self.gradient_at == 'zero_step' else ''} is "
                f"{loss}; influence cannot be measured from there: lower the learning rate, or look at the training "
                "loss, the model may have diverged"
            )
        return loss, gradient

    def _precondition(
        self, context: RoundContext, parameters: Mapping[str, nn.Parameter], gradient: dict[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        """Return D, without the parameters in which it is zero."""
        kept = 1.0
        if self.slope_over == "candidates":
            everything = trainable_parameters(context.optimizer)
            divisor = context.global_batch if self.step == "in_batch" else 1
            sizes, kept = typical_gradient(context, everything, divisor, self.sampled)
            amplitudes = {id(parameter): size for parameter, size in zip(everything, sizes, strict=True)}
        else:
            amplitudes = {id(p): _NEAR_ZERO * local(gradient[name]).abs() for name, p in parameters.items()}
        direction = {}
        for name, parameter in parameters.items():
            amplitude = amplitudes.pop(id(parameter))
            least = torch.finfo(amplitude.dtype).tiny ** 0.5  # a square of it is still told from zero in float64
            slope = step_slope(context.optimizer, parameter, amplitude.clamp(min=least))
            direction[name] = like((-kept / rate * slope * local(gradient[name])).to(parameter.dtype), parameter)
        moves = torch.stack([(local(value) != 0).any() for value in direction.values()]).double()
        if is_sharded(context.model):
            moves = distributed.sum_over_ranks(moves)
        direction = {name: value for (name, value), any_ in zip(direction.items(), moves.tolist(), strict=True) if any_}
        if not direction:
            raise ValueError(
                "the reference loss does not change with any parameter that is measured: expected loss_fn to compute "
                "with gradients (no torch.no_grad, no detach) from the model that the optimizer trains"
            )
        return direction

    def _parameters(self, context: RoundContext) -> dict[str, nn.Parameter]:
        """Return what takes part, by name: all that is trained but for what is excluded."""
        trained = {id(parameter) for parameter in trainable_parameters(context.optimizer)}
        found = {name: p for name, p in context.model.named_parameters() if id(p) in trained}
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(f"the pattern {pattern!r} fits none of the parameters {sorted(found)}")
        left = {name: p for name, p in found.items() if not any(fnmatchcase(name, each) for each in self.exclude)}
        if not left:
            raise ValueError(
                f"expected parameters that both the model and the optimizer hold, got none but {sorted(found)}, which "
                f"exclude={self.exclude} leaves out: unfreeze some, or exclude less"
            )
        return left


def _difference(
    model: nn.Module, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> float:
    """Return how far to go along the direction, as a share of the parameters' length, for a small change of the loss.

    What moves the reference loss by so much moves those of candidates by as much or less, and all of them enough to be
    told from rounding.
    """
    products = [(local(value).double() * local(gradient[name])).sum() for name, value in direction.items()]
    slope = _total(model, list(direction.values()), products)
    move = max(_MOVES.get(value.dtype, _MOVE_IN_SHORT) for value in direction.values())
    start = _length(model, [parameters[name] for name in direction])
    length = _length(model, list(direction.values()))
    return move * length / max(abs(slope) * start, 1e-30)


def _length(model: nn.Module, tensors: Sequence[Tensor]) -> float:
    return math.sqrt(_total(model, tensors, [local(tensor).double().square().sum() for tensor in tensors]))


def _total(model: nn.Module, tensors: Sequence[Tensor], sums: Sequence[Tensor]) -> float:
    """Return the sum of ``sums``, numbers of the local parts of ``tensors``, over all parts of a sharded model's."""
    return float(distributed.total_of_parts(tensors, sums) if is_sharded(model) else sum(sums))


def _full_precision(context: RoundContext) -> AbstractContextManager[Any]:
    return torch.autocast(context.device.type, enabled=False)
