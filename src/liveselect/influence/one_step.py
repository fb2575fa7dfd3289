"""The local probe of MATES: take one optimizer step on a candidate and measure the reference loss after it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from liveselect.arguments import check_plain
from liveselect.functional.several_optimizers import each_of
from liveselect.grammar import Batch, InfluenceEstimator, LiveModel, NotMeasurableError, Round, on_device
from liveselect.influence.reference import (
    Precision,
    ReferencePass,
    charge_gradient,
    counting,
    require_finite,
    split_rows,
)
from liveselect.preserve import Snapshot, refuse_closure

StepSize = Literal["published", "in_batch"]


@dataclass(frozen=True)
class _Baseline:
    reference: ReferencePass
    learning_rate: float
    loss: float  # after the zero-gradient step


class OneStepInfluence(InfluenceEstimator):
    r"""Measures influence exactly: one step of the live optimizer on one candidate, then the reference loss.

    The live moments, step counters, learning rate, weight decay and clipping take part. They move the model even when
    the gradient is zero, so a candidate's step is compared with that *zero-gradient step*. With :math:`L` the
    reference loss and :math:`A(g)` the parameters after one step of the optimizer on the gradient :math:`g`,

    .. math:: I_i = \frac{L(A(0)) - L(A(g_i))}{\eta}  \qquad\text{(published)}
              \qquad I_i = N \, \frac{L(A(0)) - L(A(g_i / N))}{\eta}  \qquad\text{(in_batch)}

    in nats per unit learning rate :math:`\eta`, with :math:`N` the examples of the run's global batch. For SGD
    :math:`A(g) = \theta + u_0 - \eta g`, where :math:`u_0` is the zero-gradient step, so a first-order expansion of
    either form gives :math:`\nabla L(\theta + u_0) \cdot g_i`; both tend to the gradient dot product as
    :math:`\eta \to 0`. They differ in curvature: ``published`` steps as if the candidate were the whole batch, as in
    the paper's code, and overshoots where one example's gradient is large (no clipping, large learning rates);
    ``in_batch`` steps on the candidate's share of a real batch, and needs exact arithmetic, because the difference is N
    times smaller.

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
        check_plain(OneStepInfluence, locals())
        for name, value, allowed in (
            ("step", step, get_args(StepSize)),
            ("reference_precision", reference_precision, get_args(Precision)),
        ):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {allowed}, got {value!r}")
        self.step: StepSize = step
        self.reference_precision: Precision = reference_precision
        self._baseline: _Baseline | None = None

    def fit(self, model: LiveModel, round: Round) -> Mapping[str, float]:
        """Load the reference set and measure its loss before and after the zero-gradient step.

        Raises:
            NotMeasurableError: the learning rate is zero, or the reference loss is not finite.
            ValueError: the optimizer has no learning rate, or nothing to train.
            TypeError: the optimizer cannot take a step on a given gradient.
        """
        refuse_unfit(model)
        learning_rate = live_learning_rate(model.optimizer)
        with model.meter.phase("reference pass"):
            reference = ReferencePass.load(model, round)
            before = reference.loss(model, self.reference_precision)
            apart = dict(reference.parts)
            require_finite(before, "look at the training loss: the model may have diverged", "before any step")
            probe = Probe(model, reference, self.reference_precision)
            after = probe.loss_after([None] * len(probe.parameters))
        require_finite(after, "lower the learning rate", "after a step on zero gradients")
        self._baseline = _Baseline(reference, learning_rate, after)
        return {
            "reference_loss": before,
            "reference_loss_zero_step": after,
            **apart,
            "reference_examples": float(reference.examples),
            "reference_tokens": float(reference.targets),
            "probe_learning_rate": learning_rate,
        }

    def score(self, model: LiveModel, batch: Batch) -> Tensor:
        """Return the influence of each example, ``(B,)``.

        NaN stands where the loss or the gradient of an example, or the reference loss after its step, is not finite.
        """
        base = self._baseline
        if base is None:
            raise RuntimeError("OneStepInfluence.score was called before fit: call fit(model, round) in each round")
        weight = model.global_batch if self.step == "in_batch" else 1
        probe = Probe(model, base.reference, self.reference_precision, weight)
        after = probe.losses_after_examples(batch)
        influence = weight * (base.loss - after) / base.learning_rate
        return influence.where(influence.isfinite(), math.nan)


class Objective(Protocol):
    """The loss to take after a step: :class:`ReferencePass`, or another in its place."""

    def loss(self, model: LiveModel, precision: Precision) -> float:
        """Return the loss of the model as it stands, nats per token."""


class Probe:
    """Takes steps from one state of the model and returns to it after each."""

    def __init__(self, model: LiveModel, reference: Objective, precision: Precision, gradient_divisor: int = 1) -> None:
        self.parameters = trainable_parameters(model.optimizer)
        self._model = model
        self._reference = reference
        self._precision: Precision = precision
        self._divisor = gradient_divisor
        with model.meter.phase("snapshot"):
            self._snapshot = Snapshot(model.module, model.optimizer)
            self._gradients = [torch.zeros_like(parameter) for parameter in self.parameters]

    def losses_after_examples(self, batch: Batch) -> Tensor:
        """Return the reference loss after one step on each example, ``(B,)`` float64 on CPU.

        NaN where the loss or the gradient of an example is not finite. Ranks that hold parts of the parameters go
        through the batches of all ranks together, because a step on one example then takes all of them.
        """
        batches, own = self._model.view.gather(on_device(batch, torch.device("cpu")))
        after = [
            [self._loss_after_example(row) for row in split_rows(self._model.to_device(each), 1)] for each in batches
        ]
        return torch.tensor(after[own], dtype=torch.float64)

    def _loss_after_example(self, row: Batch) -> float:
        model = self._model
        with model.meter.phase("probe step"):
            torch.clear_autocast_cache()
            with model.autocast():
                charge_gradient(model, row, self.parameters)
                loss = model.losses(row).sum()
            gradients = model.view.gradients(loss, self.parameters)
            if model.view.any(not self._all_finite(loss, gradients)):
                return math.nan
        return self.loss_after(gradients)

    def _all_finite(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
        # one wait for the device; without it a gradient that clipping scales to zero would pass for no influence
        parts = [self._model.view.local(gradient) for gradient in gradients if gradient is not None]
        return bool(torch.stack([loss, *(norm.to(loss) for norm in torch._foreach_norm(parts))]).isfinite().all())

    def loss_after(self, gradients: list[Tensor | None]) -> float:
        """Return the reference loss after one step on the gradients of one example, and put the model back."""
        model = self._model
        try:
            with model.meter.phase("probe step"):
                self._put(gradients)
                with counting(model, "optimizer step"):
                    model.clip_gradients(self.parameters)
                    model.optimizer.step()
            with model.meter.phase("reference pass"):
                return self._reference.loss(model, self._precision)
        finally:
            with model.meter.phase("restore"):
                self._snapshot.restore()
                for parameter in self.parameters:
                    parameter.grad = None

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
        local = self._model.view.local
        filled = [local(gradient) for gradient in self._gradients]
        torch._foreach_zero_(filled)
        given = [(to, local(new)) for to, new in zip(filled, gradients, strict=True) if new is not None]
        if given:
            torch._foreach_copy_([to for to, _ in given], [new for _, new in given])
        if self._divisor != 1:
            torch._foreach_div_(filled, float(self._divisor))


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


def refuse_unfit(model: LiveModel) -> None:
    """Raise TypeError or ValueError when no step on a given gradient can be taken."""
    for each in each_of(model.optimizer):
        refuse_closure(each)
    if not trainable_parameters(model.optimizer):
        raise ValueError("expected an optimizer with parameters that require a gradient, got none: unfreeze some")
    if not _learning_rates(model.optimizer):
        optimizer = type(model.optimizer).__name__
        raise ValueError(
            f"expected an optimizer with a learning rate, which is the unit of influence, and {optimizer} has none: "
            "set its lr"
        )
    sparse = [name for name, module in model.module.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        raise TypeError(
            f"modules {sparse} make sparse gradients, for which a zero-gradient step is not defined: "
            "build them with sparse=False"
        )
