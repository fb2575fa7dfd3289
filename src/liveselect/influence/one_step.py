"""The locally probed oracle of MATES: take one optimizer step on a candidate and see what the reference loss does."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from liveselect import distributed
from liveselect.functional.flops import forward_flops
from liveselect.functional.sharding import backward, is_sharded, local
from liveselect.influence.reference import Precision, ReferencePass
from liveselect.protocols import Batch, NotMeasurableError, RoundContext
from liveselect.snapshot import Snapshot, measuring, refuse_closure

StepSize = Literal["published", "in_batch"]


@dataclass(frozen=True)
class _Baseline:
    reference: ReferencePass
    learning_rate: float
    loss: float  # after the zero-gradient step


class OneStepInfluence:
    r"""Measures influence exactly: one step of the live optimizer on one candidate, then the reference loss.

    The live moments, step counters, learning rate, weight decay and clipping take part. They move the model even when
    the gradient is zero, so what a candidate does is told against that *zero-gradient step*. With :math:`L` the
    reference loss and :math:`A(g)` the parameters after one step of the optimizer on the gradient :math:`g`,

    .. math:: I_i = \frac{L(A(0)) - L(A(g_i))}{\eta}  \qquad\text{(published)}
              \qquad I_i = N \, \frac{L(A(0)) - L(A(g_i / N))}{\eta}  \qquad\text{(in_batch)}

    in nats per unit learning rate :math:`\eta`, with :math:`N` the examples of the run's global batch. For SGD
    :math:`A(g) = \theta + u_0 - \eta g`, where :math:`u_0` is the zero-gradient step, so a first-order expansion of
    either form gives :math:`\nabla L(\theta + u_0) \cdot g_i`; both tend to the gradient dot product as
    :math:`\eta \to 0`. They differ in curvature: ``published`` steps as if the candidate were the whole batch, as in
    the paper's code, and overshoots where one example's gradient is large (no clipping, large learning rates);
    ``in_batch`` steps by what the candidate has inside a real batch, and asks for exact arithmetic, because the
    difference is N times smaller.

    A candidate costs one forward and backward of one row, one step, and one pass over the reference set, which is
    nearly all of the time. Memory: a copy of the trainable parameters and of the optimizer's state, while a batch is
    scored, and a set of gradients.

    Several ranks share out the candidates. Where the model itself is sharded (FSDP), they probe each candidate together
    and share out the reference set instead; each copies its own part of parameters and state.

    Args:
        step: the size of the step, one of the forms above.
        reference_precision: ``float32`` computes the reference loss without autocast; ``training`` as training does,
            whose rounding in 16 bits is larger than the differences between candidates.

    Source: Yu et al. 2024, "MATES", arXiv 2406.06046, which keeps the loss after the step; smaller is better there.
    """

    def __init__(self, step: StepSize = "published", reference_precision: Precision = "float32") -> None:
        for name, value, allowed in (
            ("step", step, get_args(StepSize)),
            ("reference_precision", reference_precision, get_args(Precision)),
        ):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {allowed}, got {value!r}")
        self.step: StepSize = step
        self.reference_precision: Precision = reference_precision
        self._baseline: _Baseline | None = None

    def fit(self, context: RoundContext) -> Mapping[str, float]:
        """Load the reference set and measure its loss before and after the zero-gradient step.

        Raises:
            NotMeasurableError: the learning rate is zero, or the reference loss is not finite.
            ValueError: the optimizer has no learning rate, or nothing to train.
            TypeError: the optimizer cannot take a step on a given gradient.
        """
        refuse_unfit(context)
        learning_rate = live_learning_rate(context.optimizer)
        with measuring(context.model, context.optimizer), context.meter.phase("reference pass"):
            reference = ReferencePass.load(context)
            before = reference.loss(context, self.reference_precision)
            _require_finite(before, "before any step", "look at the training loss: the model may have diverged")
            probe = Probe(context, reference, self.reference_precision)
            after = probe.loss_after([None] * len(probe.parameters))
        _require_finite(after, "after a step on zero gradients", "lower the learning rate")
        self._baseline = _Baseline(reference, learning_rate, after)
        return {
            "reference_loss": before,
            "reference_loss_zero_step": after,
            "reference_examples": float(reference.examples),
            "reference_tokens": float(reference.targets),
            "probe_learning_rate": learning_rate,
        }

    def score(self, context: RoundContext, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)`` float32 on CPU.

        NaN stands where the loss or the gradient of an example, or the reference loss after its step, is not finite.
        """
        base = self._baseline
        if base is None:
            raise RuntimeError("OneStepInfluence.score was called before fit: call fit(context) once in each round")
        weight = context.global_batch if self.step == "in_batch" else 1
        with measuring(context.model, context.optimizer):
            probe = Probe(context, base.reference, self.reference_precision, weight)
            after = probe.losses_after_examples(batch)
        influence = weight * (base.loss - after) / base.learning_rate
        return influence.where(influence.isfinite(), math.nan).float()


class Objective(Protocol):
    """What is looked at after a step: :class:`ReferencePass`, or something in its place."""

    def loss(self, context: RoundContext, precision: Precision) -> float:
        """Return the loss of the model as it stands, nats per token."""


class Probe:
    """Takes steps from one state of the model and returns to it after each."""

    def __init__(
        self, context: RoundContext, reference: Objective, precision: Precision, gradient_divisor: int = 1
    ) -> None:
        self.parameters = trainable_parameters(context.optimizer)
        self._context = context
        self._reference = reference
        self._precision = precision
        self._divisor = gradient_divisor
        with context.meter.phase("snapshot"):
            self._sharded = is_sharded(context.model)
            self._snapshot = Snapshot(context.model, context.optimizer)
            self._gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    def losses_after_examples(self, batch: Batch) -> Tensor:
        """Return the reference loss after one step on each example, ``(B,)`` float64 on CPU.

        NaN where the loss or the gradient of an example is not finite. For a sharded model it is a collective that goes
        through the batches of all ranks, because a step on one example then takes all of them.
        """
        batches = distributed.gather_objects(_on_cpu(batch)) if self._sharded else [batch]
        after = [[self._loss_after_example(row) for row in rows_of(self._context.to_device(b))] for b in batches]
        own = after[distributed.rank() if self._sharded else 0]
        return torch.tensor(own, dtype=torch.float64)

    def _loss_after_example(self, row: Batch) -> float:
        context = self._context
        with context.meter.phase("probe step"):
            torch.clear_autocast_cache()
            with context.forward_context():
                loss = context.loss_fn(context.model, row).sum()
            context.meter.add_flops(3 * forward_flops(context.model, row["input_ids"].numel()))
            if not loss.requires_grad:
                raise ValueError(
                    "the loss of a candidate does not depend on any parameter that is trained: expected loss_fn to "
                    "compute with gradients (no torch.no_grad, no detach) from the model that the optimizer trains"
                )
            gradients = gradients_of(context.model, loss, self.parameters)
            finite = _all_finite(loss, gradients)
            if distributed.any_rank(not finite) if self._sharded else not finite:
                return math.nan
        return self.loss_after(gradients)

    def loss_after(self, gradients: list[Tensor | None]) -> float:
        """Return the reference loss after one step on the gradients of one example, and put the model back."""
        context = self._context
        try:
            with context.meter.phase("probe step"):
                self._put(gradients)
                context.clip_gradients(self.parameters)
                context.optimizer.step()
            with context.meter.phase("reference pass"):
                return self._reference.loss(context, self._precision)
        finally:
            with context.meter.phase("restore"):
                self._snapshot.restore()

    @torch.no_grad()
    def _put(self, gradients: list[Tensor | None]) -> None:
        """Fill every ``.grad``.

        Where an example has no gradient there are zeros, not None: None would also leave out momentum and weight decay,
        which the zero-gradient step has everywhere, and their absence would count as influence. The values are copied
        into tensors with the layout of the parameters, as accumulation would, because autograd may hand out one tensor
        for two parameters, and clipping works in place.
        """
        for parameter, own in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = own
        filled = [local(gradient) for gradient in self._gradients]
        torch._foreach_zero_(filled)
        given = [(to, local(new)) for to, new in zip(filled, gradients, strict=True) if new is not None]
        if given:
            torch._foreach_copy_([to for to, _ in given], [new for _, new in given])
        if self._divisor != 1:
            torch._foreach_div_(filled, float(self._divisor))


def gradients_of(model: nn.Module, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradients of a loss in the parameters, None where it does not depend on them; ``.grad`` stays None.

    For a sharded model it is a collective, and returns the mean over the losses of all ranks: give it the loss of one
    and the same example.
    """
    if is_sharded(model):
        return backward(loss, parameters)
    # not backward(): it would run hooks on the accumulation of gradients, which may communicate or step
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def trainable_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the optimizer's parameters that require a gradient, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad]


def live_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the largest learning rate of the optimizer's groups.

    One number for all groups only sets the unit of influence; ranks do not depend on it. The largest is never the zero
    of a group that is held still.

    Raises:
        NotMeasurableError: no group has a positive, finite learning rate.
    """
    rates = _learning_rates(optimizer)
    rate = max(rates, default=0.0)
    if rate > 0 and math.isfinite(rate):
        return rate
    raise NotMeasurableError(
        f"expected a positive learning rate to take a probing step with, got {rates}: begin measuring after the first "
        "step of the learning-rate warm-up (more warm-up rounds), and end the run before the schedule reaches zero"
    )


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    rates = []
    for group in optimizer.param_groups:
        with suppress(KeyError, TypeError):  # no rate, or None: the optimizer finds its own
            rates.append(float(group["lr"]))
    return rates


def refuse_unfit(context: RoundContext) -> None:
    """Raise TypeError or ValueError when no step on a given gradient can be taken."""
    refuse_closure(context.optimizer)
    if not trainable_parameters(context.optimizer):
        raise ValueError("expected an optimizer with parameters that require a gradient, got none: unfreeze some")
    if not _learning_rates(context.optimizer):
        optimizer = type(context.optimizer).__name__
        raise ValueError(
            f"expected an optimizer with a learning rate, which is the unit of influence, and {optimizer} has none: "
            "set its lr"
        )
    sparse = [name for name, module in context.model.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        raise TypeError(
            f"modules {sparse} make sparse gradients, for which a zero-gradient step is not defined: "
            "build them with sparse=False"
        )


def _all_finite(loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
    # one wait for the device; without it a gradient that clipping scales to zero would pass for no influence
    norms = torch._foreach_norm([local(gradient) for gradient in gradients if gradient is not None])
    return bool(torch.stack([loss, *(norm.to(loss) for norm in norms)]).isfinite().all())


def _require_finite(loss: float, when: str, cure: str) -> None:
    if not math.isfinite(loss):
        raise NotMeasurableError(
            f"the reference loss {when} is {loss}; influence cannot be measured from there: {cure}"
        )


def rows_of(batch: Batch) -> list[Batch]:
    """Return the examples of a batch as batches of one row."""
    count = len(batch["input_ids"])

    def row(value: Tensor, index: int) -> Tensor:
        per_example = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
        return value[index : index + 1] if per_example else value

    return [{key: row(value, index) for key, value in batch.items()} for index in range(count)]


def _on_cpu(batch: Batch) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}
