"""Influence to first order: the product of every candidate's gradient with one direction."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect.arguments import check_plain
from liveselect.distributed import sum_over_ranks
from liveselect.functional.coverage import Hidden, patterns
from liveselect.functional.differences import central_difference_dot
from liveselect.functional.gradients import forward_mode_dot, plan_products
from liveselect.functional.slopes import first_moment, step_slope
from liveselect.grammar import (
    IGNORE_INDEX,
    Batch,
    InfluenceEstimator,
    LiveModel,
    LossFn,
    NotMeasurableError,
    Round,
    State,
)
from liveselect.influence.direction import Direction
from liveselect.influence.hidden import names_in, refuse_hidden, warn_of_share
from liveselect.influence.one_step import (
    Probe,
    StepSize,
    live_learning_rate,
    refuse_unfit,
    trainable_parameters,
)
from liveselect.influence.reference import Precision, ReferencePass, counting, require_finite
from liveselect.influence.step_sizes import typical_gradient
from liveselect.losses import causal_lm_loss, causal_lm_token_losses, shifted_targets
from liveselect.preserve import Snapshot

Engine = Literal["hooks", "central_difference", "forward_mode", "optimizer_step"]
GradientAt = Literal["zero_step", "current"]
SlopeOver = Literal["candidates", "zero", "reference"]

_Saw = Callable[[Tensor, Tensor], None]
"""Called with the losses and the weights ``(B,)`` of a batch."""

_AMPLITUDE_SHARE_AT_ZERO = 1e-5  # of the reference gradient: small enough for a derivative, large enough for float64
_LOSS_CHANGE_NATS = {torch.float64: 1e-5, torch.float32: 1e-2}  # of the reference loss, between rounding and curvature
_LOSS_CHANGE_NATS_16_BIT = 0.2  # rounding swallows shorter moves of a parameter in 16 bits
_LEAST_REFERENCE_ROWS = 8
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
    origin: Sequence[Tensor]
    gradient: Sequence[Tensor]

    @torch.no_grad()
    def loss(self, model: LiveModel, precision: Precision = "float32") -> float:
        """Return the difference of the loss to that at the origin, nats per token."""
        pairs = zip(self.parameters, self.origin, strict=True)
        # the difference first, and wide: it is a small one of large numbers
        return model.view.dot((now.detach().double() - then for now, then in pairs), self.gradient)


@dataclass(frozen=True)
class _Fitted:
    toward: Direction | _Tangent
    learning_rate: float
    difference: float = 0.0


@dataclass
class _Gathered:
    """The gradient of the reference rows of a round that were looked at so far, and their losses.

    Attributes:
        round: index of the round; -1 for none.
        rows: that were looked at.
        tokens: of them that carry loss.
        weight: of these tokens, their number unless sets of a mixture have weights of their own.
        loss: sum of the losses of these tokens, each with its weight.
        moments: ``(3,)`` float64, sums over rows of ``w^2``, ``w^2 l`` and ``w^2 l^2`` for a loss l of w tokens.
        gradient: sum of the gradients of the losses of these tokens, by parameter.
        sets: for each set of a mixture, by the name of its metric: loss and weight, as above.
    """

    round: int = -1
    rows: int = 0
    tokens: int = 0
    weight: float = 0.0
    loss: float = 0.0
    moments: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    gradient: dict[str, Tensor] = field(default_factory=dict)
    sets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, reference: ReferencePass, loss: float, moments: Tensor, gradient: Mapping[str, Tensor]) -> None:
        """Take the mean loss and gradient of more rows, and the ``moments (3,)`` of all ranks."""
        self.rows += reference.examples
        self.tokens += reference.targets
        self.weight += reference.weight
        self.loss += reference.weight * loss
        self.moments = self.moments + moments
        for name, (mean, weight) in reference.by_set().items():
            before = self.sets.get(name, (0.0, 0.0))
            self.sets[name] = (before[0] + weight * mean, before[1] + weight)
        if not self.gradient:
            self.gradient = {name: value * reference.weight for name, value in gradient.items()}
            return
        for name, value in gradient.items():
            self.gradient[name] = self.gradient[name].to(value.device).add_(value, alpha=reference.weight)

    def error(self) -> float:
        """Return the standard error of the mean loss, weighted by tokens, over the rows."""
        mean = self.loss / self.weight
        weights, losses, squares = self.moments.tolist()
        return math.sqrt(max(0.0, squares - 2 * mean * losses + mean**2 * weights)) / self.weight


class FirstOrderInfluence(InfluenceEstimator):
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
    between minus and plus the size of gradient that a few sampled candidates have there; ``"zero"`` the derivative;
    ``"reference"`` the slope that the reference gradient itself meets, which costs no gradient of a candidate. With
    Adam D is then the step on the reference gradient, :math:`g / \sqrt{\beta_2 v + (1 - \beta_2) g^2}`, which is
    bounded: with the derivative nearly all of the variance of influence lies in one candidate of a hundred.

    What training gives already is worth nothing more: ``contrast`` subtracts the mean of the last gradients, which the
    optimizer's moments hold.

    Clipping is part of the step. The products leave out that it shortens the gradients of some candidates more than
    those of others; in a real batch (``in_batch``) no single example is clipped unless its gradient is longer than N
    times the limit. ``engine="optimizer_step"`` leaves nothing out: it takes every candidate's step, clipping and
    optimizer included, and multiplies the displacement with the reference gradient. It costs about five forwards and
    works with every optimizer; it differs from the exact probe by the curvature of the reference loss only.

    Args:
        engine: ``hooks`` is exact and needs layers with known rules; ``central_difference`` (in full precision) and
            ``forward_mode`` (attention in plain operations) take any module; ``optimizer_step`` see above.
        gradient_at: where the reference gradient is taken: after the ``zero_step``, or at the ``current`` parameters.
        step: the form of :class:`OneStepInfluence` that is approximated; it sets the size of a candidate's gradient.
        slope_over: see above; ``optimizer_step`` has no use for it.
        sampled: candidates whose gradients give the sizes for the slope, over all ranks; they cost a forward and a
            backward each; needed for ``slope_over="candidates"``.
        contrast: how much of the optimizer's first moment, the mean of the last training gradients, is subtracted from
            the reference gradient; 0 for none, 1 for all.
        reference_rows: most rows of the reference set that a round takes the gradient of; the next round takes the next
            ones. None for all.
        reference_share: most of the cost of the round's own training that this gradient may take; fewer rows are taken
            then, but at least 8. None for any.
        exclude: patterns of names of parameters, as in a shell, that take no part in the products.
        difference: length of the displacement of ``central_difference`` as a share of that of the parameters; by
            default as much as moves the reference loss by a hundredth of a nat, in float64 by much less, and with
            parameters of 16 bits by a fifth.
        reference_precision: as in :class:`OneStepInfluence`.

    Source: TracIn, Pruthi et al. 2020, arXiv 2002.08484, for the product of gradients; Xia et al. 2024, "LESS", arXiv
    2402.04333, for Adam's preconditioner in it; the approximated probe is that of Yu et al. 2024, arXiv 2406.06046.
    """

    def __init__(
        self,
        engine: Engine = "hooks",
        gradient_at: GradientAt = "zero_step",
        step: StepSize = "in_batch",
        slope_over: SlopeOver = "candidates",
        sampled: int = 16,
        contrast: float = 0.0,
        reference_rows: int | None = None,
        reference_share: float | None = None,
        exclude: Sequence[str] = (),
        difference: float | None = None,
        reference_precision: Precision = "float32",
    ) -> None:
        check_plain(FirstOrderInfluence, locals())
        self.engine: Engine = engine
        self.gradient_at: GradientAt = gradient_at
        self.step: StepSize = step
        self.slope_over: SlopeOver = slope_over
        self.sampled = sampled
        self.contrast = contrast
        self.reference_rows = reference_rows
        self.reference_share = reference_share
        self.exclude = tuple(exclude)
        self.difference = difference
        self.reference_precision: Precision = reference_precision
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"expected {name} to be one of {get_args(kind)}, got {getattr(self, name)!r}")
        if sampled < 1:
            raise ValueError(f"expected sampled of at least 1, got {sampled}")
        if not 0.0 <= contrast < math.inf:
            raise ValueError(f"expected contrast, the weight of the optimizer's moment, of at least 0, got {contrast}")
        if contrast and engine == "optimizer_step":
            raise ValueError('engine="optimizer_step" takes whole steps, of which no moment is subtracted: contrast=0')
        if reference_rows is not None and reference_rows < 1:
            raise ValueError(f"expected reference_rows of at least 1, or None, got {reference_rows}")
        if reference_share is not None and not 0 < reference_share < math.inf:
            raise ValueError(f"expected a positive reference_share, or None, got {reference_share}")
        if difference is not None and not 0 < difference < math.inf:
            raise ValueError(f"expected a positive difference, got {difference}")
        self.fit_lasts = self.has_direction = engine != "optimizer_step"
        self._fitted: _Fitted | None = None
        self._gathered = _Gathered()  # of the coming round, before its fit

    def direction(self) -> Mapping[str, Tensor] | None:
        """Return the preconditioned reference gradient D by parameter name, None before a fit or where steps are taken.

        Its product with a gradient is an influence. Out of a checkpoint it is whole until it is first used.
        """
        toward = self._fitted.toward if self._fitted else None
        return toward.values if isinstance(toward, Direction) else None

    def check(self, model: LiveModel, round: Round) -> None:
        """Raise ValueError for layers without a rule, all at once; warn where little of the model is measured."""
        model.view.refuse_flat(type(self).__name__)
        parameters = self._parameters(model)
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        trained = sum(parameter.numel() for parameter in trainable_parameters(model.optimizer))

        def advice(hidden: list[Hidden]) -> str:
            names = names_in(hidden)
            left = (sum(sizes.values()) - sum(sizes[name] for name in names)) / trained
            return (
                'Measure with engine="central_difference", which takes any module, or leave them out with '
                f"exclude={[*self.exclude, *patterns(names)]}, and measure the other {left:.0%} of the parameters"
            )

        if self.engine == "hooks":
            with model.autocast():
                refuse_hidden(model, round, sizes.keys(), 'engine="hooks"', advice)
        way_out = 'exclude less, with engine="central_difference" if need be'
        warn_of_share(type(self).__name__, sum(sizes.values()) / trained, way_out)

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Take the reference gradient, and pull it through the optimizer.

        Raises:
            NotMeasurableError: the learning rate is zero, or the reference loss is not finite.
            ValueError: a pattern fits no parameter, or no rule gives the gradients of a layer.
            TypeError: the optimizer cannot take a step on a given gradient, or has no slope for each coordinate; or the
                engine does not work with a sharded model.
        """
        refuse_unfit(model)
        model.view.refuse_flat(type(self).__name__)
        if self.engine == "forward_mode":
            model.view.refuse_parts(
                'engine="forward_mode" does not work with parameters that are sharded over ranks (FSDP): use '
                'engine="hooks", or "central_difference"'
            )
        rate = live_learning_rate(model.optimizer)
        parameters = self._parameters(model)
        origin = self._gather(model, round, parameters, None)
        gathered, self._gathered = self._gathered, _Gathered()
        metrics = {
            "reference_loss" if self.gradient_at == "current" else "reference_loss_zero_step": (
                gathered.loss / gathered.weight
            ),
            "reference_loss_error": gathered.error(),
            **{name: total / max(weight, 1e-30) for name, (total, weight) in gathered.sets.items()},
            "reference_examples": float(gathered.rows),
            "reference_tokens": float(gathered.tokens),
            "probe_learning_rate": rate,
        }
        device = model.device
        parts = {name: value.to(device).div_(gathered.weight) for name, value in gathered.gradient.items()}
        gradient = model.view.spread(parts, parameters)
        if self.engine == "optimizer_step":
            tangent = _Tangent(list(parameters.values()), origin, list(gradient.values()))
            self._fitted = _Fitted(tangent, rate)
            return metrics
        with model.meter.phase("precondition"):
            direction = self._precondition(model, round, parameters, gradient, rate)
        if self.engine == "hooks":
            plan_products(model.module, direction)  # refuses layers without a rule now, not at the first candidate
        difference = self.difference or _difference(model, parameters, direction, gradient)
        self._fitted = _Fitted(Direction(direction), rate, difference)
        total = sum(parameter.numel() for parameter in trainable_parameters(model.optimizer))
        return metrics | {
            "direction_norm": model.view.norm(list(direction.values())),
            "measured_share": sum(parameter.numel() for parameter in parameters.values()) / total,
        }

    def fit_ahead(self, model: LiveModel, round: Round, examples: int) -> bool:
        """Take the gradient of ``examples`` more reference rows, at the weights of this step; see the grammar."""
        if self.engine == "optimizer_step" or model.view.in_parts:
            return False
        refuse_unfit(model)
        live_learning_rate(model.optimizer)
        before = self._gathered.rows if self._gathered.round == round.index else 0
        self._gather(model, round, self._parameters(model), examples)
        return self._gathered.rows > before

    def state_dict(self) -> State:
        """Return what was taken of the coming round's reference gradient; nothing where that is none."""
        gathered = self._gathered
        if not gathered.gradient:
            return {}
        kept = {name: value.detach().cpu().clone() for name, value in gathered.gradient.items()}
        return {**vars(gathered), "moments": gathered.moments.clone(), "gradient": kept}

    def load_state_dict(self, state: State) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._gathered = _Gathered(**state)
        self._gathered.gradient = {name: value.clone() for name, value in self._gathered.gradient.items()}

    def fitted_state(self) -> State | None:
        """Return the last fit, for a measurement that goes on at later steps; None when it holds at one only.

        Every rank must call it.
        """
        fitted = self._fitted
        if fitted is None or not isinstance(fitted.toward, Direction):
            return None
        return {
            "direction": fitted.toward.on_cpu(),
            "learning_rate": fitted.learning_rate,
            "difference": fitted.difference,
        }

    def load_fitted_state(self, state: State) -> None:
        """Restore a fit; its direction is laid out like the model at the first use."""
        direction = Direction(state["direction"], is_whole=True)
        self._fitted = _Fitted(direction, state["learning_rate"], state["difference"])

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)``; NaN where its loss or product is not finite."""
        fitted = self._fitted
        if fitted is None:
            raise RuntimeError("FirstOrderInfluence.score was called before fit: call fit(model, round) in each round")
        if isinstance(fitted.toward, Direction):
            with model.meter.phase("example gradients"):
                influence = self._products(model, batch, fitted.toward, fitted.difference)
        else:
            weight = model.global_batch if self.step == "in_batch" else 1
            probe = Probe(model, fitted.toward, self.reference_precision, weight)
            influence = -weight * probe.losses_after_examples(batch) / fitted.learning_rate
        return influence.where(influence.isfinite(), math.nan)

    def score_tokens(self, model: LiveModel, batch: Batch) -> Tensor | None:
        """Return the influence of each token, ``(B, T)``; None where steps are taken, or with a loss of the user's.

        From the same direction as :meth:`score`, and by the same engine: ``hooks`` are exact and take some five
        forwards, differences two: one pass forth and one back along the direction give the slope of every token's loss
        at once. They also stand in for ``hooks`` where ranks hold parameters in parts, or an operation of the model has
        no second derivative.
        """
        fitted = self._fitted
        if fitted is None:
            raise RuntimeError("score_tokens was called before fit: call fit(model, round) in each round")
        if not isinstance(fitted.toward, Direction) or model.view.inner_loss(model.loss_fn) is not causal_lm_loss:
            return None
        if self.engine == "hooks":
            with model.meter.phase("example gradients"):
                found = fitted.toward.tokens(model, batch)
            if found is not None:
                return found
        values = fitted.toward.on(model)
        losses = model.view.with_loss(model.loss_fn, causal_lm_token_losses)
        work = f"{'forward_mode' if self.engine == 'forward_mode' else 'central_difference'} of tokens"
        with model.meter.phase("example gradients"), counting(model, work, batch):
            if self.engine == "forward_mode":
                with model.autocast():
                    slopes = forward_mode_dot(model.module, losses, batch, values)
                    carries = shifted_targets(batch) != IGNORE_INDEX  # the slope of a loss that there is not is 0
                    return slopes.masked_fill(~F.pad(carries, (1, 0)), math.nan)
            with model.full_precision():
                return central_difference_dot(model.module, losses, batch, values, fitted.difference, model.view.norm)

    def _products(self, model: LiveModel, batch: Batch, direction: Direction, difference: float) -> Tensor:
        finite: list[Tensor] = []

        def loss_fn(module: nn.Module, rows: Batch) -> Tensor:
            losses = model.loss_fn(module, rows)
            finite.append(losses.detach().isfinite())
            return losses

        work = f"{self.engine} of {len(direction.values)}"
        if self.engine == "central_difference":
            with counting(model, work, batch), model.full_precision():
                values = direction.on(model)
                return central_difference_dot(model.module, loss_fn, batch, values, difference, model.view.norm)

        def products(loss_fn: LossFn) -> Tensor:
            if self.engine == "forward_mode":
                return forward_mode_dot(model.module, loss_fn, batch, direction.on(model))
            return direction.products(model, loss_fn, batch)

        with model.autocast(), counting(model, work, batch, trial=lambda: products(model.loss_fn)):
            found = products(loss_fn)
        return found.where(finite[0], math.nan) if self.engine == "hooks" else found

    def _rows(self, round: Round) -> int | None:
        """Return how many reference rows a round takes the gradient of; None for all."""
        if self.reference_share is None or not round.budget:
            return self.reference_rows
        affordable = max(_LEAST_REFERENCE_ROWS, int(self.reference_share * round.budget))
        return affordable if self.reference_rows is None else min(self.reference_rows, affordable)

    def _gather(
        self, model: LiveModel, round: Round, parameters: Mapping[str, nn.Parameter], examples: int | None
    ) -> list[Tensor]:
        """Take the gradient of the round's other reference rows, of ``examples`` at most where that is given.

        Returns the parameters after the zero step, where the engine needs them.
        """
        if self._gathered.round != round.index:
            self._gathered = _Gathered(round.index)
        reference = ReferencePass.load(model, round, self._rows(round))
        if examples is not None or self._gathered.rows:
            reference = reference.part(self._gathered.rows, examples)
        if not reference.batches:
            return []
        moments = torch.zeros(3, dtype=torch.float64)

        def seen(losses: Tensor, weights: Tensor) -> None:
            moments.add_(torch.stack([(weights.square() * losses**power).sum() for power in range(3)]))

        with model.meter.phase("reference gradient"):
            loss, gradient, origin = self._reference_gradient(model, reference, parameters, seen)
            self._gathered.add(reference, loss, sum_over_ranks(moments), gradient)
        return origin

    def _reference_gradient(
        self, model: LiveModel, reference: ReferencePass, parameters: Mapping[str, nn.Parameter], seen: _Saw
    ) -> tuple[float, dict[str, Tensor], list[Tensor]]:
        """Return the mean reference loss at ``gradient_at``, its gradient, and the parameters after the zero step.

        Loss in nats per token, the token-weighted mean over all rows, equal on all ranks; of parameters that ranks hold
        in parts, this rank's part of the gradient.
        """
        everything = trainable_parameters(model.optimizer)
        snapshot = Snapshot(model.module, model.optimizer)
        try:
            if self.gradient_at == "current":
                loss, gradient = self._mean_gradient(model, reference, parameters, seen)
            for parameter in everything:
                parameter.grad = torch.zeros_like(parameter)
            with counting(model, "optimizer step"):
                model.clip_gradients(everything)
                model.optimizer.step()
            for parameter in everything:
                parameter.grad = None
            torch.clear_autocast_cache()  # casts of the weights before the step would be used again
            if self.gradient_at == "zero_step":
                loss, gradient = self._mean_gradient(model, reference, parameters, seen)
            keep = self.engine == "optimizer_step"
            return loss, gradient, [p.detach().clone() for p in parameters.values()] if keep else []
        finally:
            snapshot.restore()

    def _mean_gradient(
        self, model: LiveModel, reference: ReferencePass, parameters: Mapping[str, nn.Parameter], seen: _Saw
    ) -> tuple[float, dict[str, Tensor]]:
        with model.full_precision() if self.reference_precision == "float32" else model.autocast():
            loss, gradient = reference.gradient(model, parameters, seen=seen)
        when = "after a step on zero gradients" if self.gradient_at == "zero_step" else ""
        require_finite(loss, "lower the learning rate, or look at the training loss: the model may have diverged", when)
        return loss, gradient

    def _precondition(
        self,
        model: LiveModel,
        round: Round,
        parameters: Mapping[str, nn.Parameter],
        gradient: Mapping[str, Tensor],
        rate: float,
    ) -> dict[str, Tensor]:
        """Return D, without the parameters in which it is zero."""
        kept, view = 1.0, model.view
        wanted = {name: view.local(gradient[name]) for name in parameters}
        if self.contrast:
            for name, parameter in parameters.items():
                moment = first_moment(model.optimizer, parameter)
                if moment is not None:
                    wanted[name] = wanted[name] - self.contrast * moment
        if self.slope_over == "candidates":
            everything = trainable_parameters(model.optimizer)
            divisor = model.global_batch if self.step == "in_batch" else 1
            sizes, kept = typical_gradient(model, round, everything, divisor, self.sampled)
            amplitudes = {id(parameter): size for parameter, size in zip(everything, sizes, strict=True)}
        else:
            share = 1.0 if self.slope_over == "reference" else _AMPLITUDE_SHARE_AT_ZERO
            amplitudes = {id(p): share * wanted[name].abs() for name, p in parameters.items()}
        parts = {}
        with model.meter.counting(model.module, "slopes", tuple(parameters)):
            for name, parameter in parameters.items():
                amplitude = amplitudes.pop(id(parameter))
                least = torch.finfo(amplitude.dtype).tiny ** 0.5  # its square is still above zero in float64
                slope = step_slope(model.optimizer, parameter, amplitude.clamp(min=least))
                parts[name] = (-kept / rate * slope * wanted[name]).to(parameter.dtype)
        reached = view.sum(torch.stack([(view.local(gradient[name]) != 0).any() for name in parts]).double())
        moves = view.sum(torch.stack([(part != 0).any() for part in parts.values()]).double()).tolist()
        spread = view.spread(parts, parameters)
        direction = {name: value for (name, value), any_ in zip(spread.items(), moves, strict=True) if any_}
        if not direction and reached.any():
            raise NotMeasurableError(
                f"a step of {type(model.optimizer).__name__} on these gradients moves no parameter: some optimizers "
                "only initialise themselves in their first step. Measure from a later one on (warmup_rounds)"
            )
        if not direction:
            raise ValueError(
                "the reference loss does not change with any parameter that is measured: expected loss_fn to compute "
                "with gradients (no torch.no_grad, no detach) from the model that the optimizer trains"
            )
        return direction

    def _parameters(self, model: LiveModel) -> dict[str, nn.Parameter]:
        """Return the parameters that take part, by name: all trained ones but the excluded."""
        trained = {id(parameter) for parameter in trainable_parameters(model.optimizer)}
        found = {name: p for name, p in model.module.named_parameters() if id(p) in trained}
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
    model: LiveModel,
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
) -> float:
    """Return the displacement along the direction for a small change of the loss, as a share of the parameters' length.

    It moves the losses of candidates by as much or less, and enough to be distinguished from rounding.
    """
    slope = model.view.dot(direction.values(), [gradient[name] for name in direction])
    move = max(_LOSS_CHANGE_NATS.get(value.dtype, _LOSS_CHANGE_NATS_16_BIT) for value in direction.values())
    start = model.view.norm([parameters[name] for name in direction])
    length = model.view.norm(list(direction.values()))
    return move * length / max(abs(slope) * start, 1e-30)
