"""Influence of the examples of a training step, out of its own backward."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liveselect.cost import CostMeter, Stopwatch
from liveselect.functional.gradients import plan_products, require_known
from liveselect.functional.layer_pass import LayerPlan, check_coverage, count_rows, make_anchor
from liveselect.functional.layers import position_dot, row_dot, whole_dot
from liveselect.functional.taps import Call, CallObserver, Observer, TapLog, tapped
from liveselect.grammar import IGNORE_INDEX, Batch
from liveselect.losses import shifted_targets, target_counts
from liveselect.parameters import ParameterView

LossMean = Literal["tokens", "examples"]

# In micro-batches up to this size the last example is the gradient of all less the others; in larger ones that would
# save little and gather rounding.
_MAX_EXAMPLES_FROM_TOTAL = 16
_DROPOUT_NOISE_SHARE = 0.1  # of a loss: how far apart two forwards of one batch may lie
_MEAN_TOLERANCE_SHARE = 0.1  # of the distance of the two means: the loss must lie as close to one of them


class TrainingStepScores:
    r"""Scores the examples of a training batch while it is trained on.

    From the input and the output gradient of a layer follows the product of an example's gradient with a direction, by
    one more matrix product of the size of a forward. Training is not touched: outputs pass the taps unchanged,
    gradients are the same to the bit, and no random number is drawn.

    One micro-batch goes like this, with any number of them in an optimizer step::

        scores = TrainingStepScores(model, estimator.direction())  # once for each new direction
        scores.attach(batch)                                      # before the forward
        loss = ...                                                # the training forward
        scores.check(loss)                                        # now and then: does a layer see every use?
        loss.backward()
        influence = scores.collect(mean_weights(batch))           # after the backward; also removes the hooks

    The unit and sign are those of the estimator that made the direction. The examples are measured as they are trained
    on, with dropout and in training precision.

    The extra product costs up to a third of the step's own products. It falls with the examples and the layers that
    take part: ``examples`` leaves out the rest of each batch, a direction in the MLP layers alone nearly a half. In
    micro-batches of up to 16 examples the last one needs no product: the step's own gradients are the sum over all.
    A single one is scored for next to nothing.

    An error in a hook leaves the step as it was, and is raised by :meth:`check` and :meth:`collect`.

    With activation checkpointing hooks must stay until the backward is over, as they do here. Compiled layers do not
    run hooks; :meth:`collect` says so. With a sharded model all ranks must attach in the same micro-batches, because
    directions that they hold in parts are gathered layer by layer.

    Args:
        model: the module that holds the parameters; under data parallel wrappers, the one inside.
        direction: for each parameter that takes part a tensor of its shape; those missing or None are left out.
        examples: number of examples of each micro-batch that are scored, the first ones; None is all.
        by_position: whether the scores of single positions are kept as well, :attr:`positions`.

    Attributes:
        positions: ``(B, T)`` what the use of the parameters at each position of the last micro-batch was worth; the sum
            over a row is its influence. None where it is not asked for.
        watch: the time spent in backwards for scores.
        meter: of the FLOPs for scores.

    Raises:
        ValueError: the direction does not fit the model, or no rule covers one of its parameters.

    Source: Wang et al. 2024, "Data Shapley in One Training Run", arXiv 2406.11011.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Mapping[str, Tensor | None],
        examples: int | None = None,
        by_position: bool = False,
    ) -> None:
        if examples is not None and examples < 1:
            raise ValueError(f"expected examples of at least 1, or None for all of a batch, got {examples}")
        self._model = model
        view = ParameterView(model)
        dot = self._dot_by_position if by_position else row_dot
        self._plan: LayerPlan = plan_products(model, direction, view.whole, dot)
        self._by_position = by_position
        self.positions: Tensor | None = None
        self._in_parts = view.in_parts
        self._direction = direction
        self._examples = examples
        self._stack = ExitStack()
        self._open: _Open | None = None
        self._layers = dict(model.named_modules(remove_duplicate=False))
        self.watch = Stopwatch()
        self.meter = CostMeter()

    @property
    def attached(self) -> bool:
        """Whether hooks are in place."""
        return self._open is not None

    def attach(self, batch: Batch) -> None:
        """Put hooks in place for one micro-batch; call before its forward."""
        if self.attached:
            raise RuntimeError("scores of a training step are attached already: collect() or detach() them first")
        rows = count_rows(batch)
        wanted = rows if self._examples is None else min(rows, self._examples)
        # where ranks hold parts, backward only leaves the mean of all ranks' gradients
        trained = all(parameter.requires_grad for parameter in self._plan.parameters.values())
        can_total = trained and not self._in_parts and not self._by_position
        from_total = wanted == rows <= _MAX_EXAMPLES_FROM_TOTAL and can_total
        products = wanted - from_total
        positions = batch["input_ids"].shape[1] if self._by_position else None
        anchor = make_anchor(self._plan.parameters.values(), products, positions)
        self._open = _Open(anchor, rows, wanted, from_total, positions)
        if products:
            observers = {
                name: partial(self._show_first, name, observe, products)
                for name, observe in self._plan.observers.items()
            }
            replayed, instead = (
                {name: partial(self._show_call, name, observe, products) for name, observe in calls.items()}
                for calls in (self._plan.replayed, self._plan.instead)
            )
            errors = self._open.errors.append
            taps = tapped(self._model, observers, self._open.anchor, rows, errors, replayed, instead)
            self._open.log = self._stack.enter_context(taps)
        if from_total:
            self.meter.add_flops(2.0 * sum(parameter.numel() for parameter in self._plan.parameters.values()))
            for name, parameter in self._plan.parameters.items():
                self._stack.callback(parameter.register_hook(partial(self._note_total, name)).remove)

    def check(self, loss: Tensor) -> None:
        """Raise ValueError when the loss uses parameters of the direction past the observed layers.

        Call between forward and backward, in the first step that is scored; it takes a few milliseconds.
        """
        if self._open is not None and self._open.log is not None:
            self._open.refuse_errors()
            check_coverage(self._plan, loss, self._open.log)
            require_known(self._model, self._open.log)

    def collect(self, weights: Tensor) -> Tensor:
        """Return the influence of the micro-batch's examples, ``(B,)`` float32 on CPU, and remove the hooks.

        Entries of examples that are not scored are NaN.

        Args:
            weights: ``(B,)``, the weight of each example's mean loss in the loss on which backward was called:
                :func:`mean_weights`.

        Raises:
            RuntimeError: nothing was attached, or no layer was seen in the backward.
            ValueError: some layer could not be observed.
        """
        seen = self._open
        self.detach()
        if seen is None:
            raise RuntimeError("no scores to collect: attach(batch) before the forward of the training step")
        seen.refuse_errors()
        products = seen.products()
        if products is None:
            calls = seen.log is not None and seen.log.calls
            raise RuntimeError(
                "no scores came out of the training step: "
                + ("layers were called, but no gradient reached them. " if calls else "no hook was called. ")
                + "Hooks do not run in compiled layers, so score only models that are not compiled; and backward() "
                "must run between attach and collect"
            )
        weights = weights.to(products)
        self.positions = None if seen.positions is None else _per_unit(seen.by_position(), weights[:, None])
        return _per_unit(products, weights)

    def detach(self) -> None:
        """Remove the hooks, if there are any, and drop their results."""
        self._stack.close()
        self._open = None

    def _show_first(self, name: str, observe: Observer, rows: int, inputs: Tensor, delta: Tensor) -> Tensor | None:
        """Show an observer the first examples only, and count what it computes."""
        own = inputs[:rows] if len(inputs) == len(delta) else inputs  # else all examples share them, as positions
        work = "observe", own.shape, rows, delta.shape
        look = partial(observe, own, delta[:rows])
        with self.watch.lap(delta.device), self.meter.counting(self._layers[name], *work, trial=look):
            return look()

    def _show_call(
        self, name: str, observe: CallObserver, rows: int, call: Call, deltas: tuple[Tensor | None, ...]
    ) -> Tensor | None:
        """Show an observer a whole call, keep what it finds for the first examples, and count what it computes."""
        look = partial(observe, call, deltas)
        shapes = tuple(None if delta is None else delta.shape for delta in deltas)
        device = next(delta.device for delta in deltas if delta is not None)
        with self.watch.lap(device), self.meter.counting(self._layers[name], "observe a call", shapes, trial=look):
            found = look()
        return None if found is None else found[:rows]

    def _dot_by_position(self, a: Tensor, b: Tensor) -> Tensor:
        return position_dot(a, b, 1 if self._open is None or self._open.positions is None else self._open.positions)

    def _note_total(self, name: str, gradient: Tensor) -> None:
        direction = self._direction[name]
        if self._open is None or direction is None:
            return
        try:
            with self.watch.lap(gradient.device):
                self._open.totals.append(whole_dot(gradient.detach(), direction.to(gradient.device)))
        except Exception as error:
            self._open.errors.append(error)


@dataclass
class _Open:
    """The results of one micro-batch."""

    anchor: Tensor  # of the examples that take products
    rows: int
    wanted: int
    from_total: bool
    positions: int | None = None  # of a row, where their products are kept
    log: TapLog | None = None
    totals: list[Tensor] = field(default_factory=list)  # products of whole gradients with the direction
    errors: list[Exception] = field(default_factory=list)  # of the hooks

    def refuse_errors(self) -> None:
        """Raise the first error of a hook, which the step itself has survived."""
        if self.errors:
            raise ValueError(f"the training step cannot be scored: {self.errors[0]}") from self.errors[0]

    def products(self) -> Tensor | None:
        """Return the products ``(B,)`` of gradients of the step's loss, None when some are missing."""
        missed = len(self.anchor) and self.anchor.grad is None
        if missed or (self.from_total and not self.totals):
            return None
        own = self.anchor.grad
        parts = [] if own is None else [own if self.positions is None else own.sum(dim=1)]
        if self.from_total:
            parts.append((torch.stack(self.totals).sum() - sum(part.sum() for part in parts)).reshape(1))
        products = torch.cat([part.to(parts[0]) for part in parts])
        return F.pad(products, (0, self.rows - self.wanted), value=math.nan)

    def by_position(self) -> Tensor:
        """Return the products ``(B, T)`` of single positions."""
        own = self.anchor if self.anchor.grad is None else self.anchor.grad
        return F.pad(own.detach(), (0, 0, 0, self.rows - self.wanted), value=math.nan)


def _per_unit(products: Tensor, weights: Tensor) -> Tensor:
    # an example without targets has no gradient; its rounding error must not be divided by zero
    return torch.where((weights == 0) & products.isfinite(), 0.0, products / weights).float().cpu()


def tokens_of_positions(positions: Tensor, batch: Batch) -> Tensor:
    """Return the influence of tokens, ``(B, T)``, of which each row's mean is the sum over its ``positions (B, T)``.

    A token counts what the parameters did at the position before it, where it is predicted. That includes what later
    tokens take from there by attention, and leaves out what the token takes from earlier ones; where positions do not
    look at each other it is exactly the influence of the token. What was done at positions whose next token carries no
    loss is shared out among the tokens that do. NaN where no loss is taken.
    """
    carries = shifted_targets(batch).cpu() != IGNORE_INDEX
    counts = carries.sum(dim=1, keepdim=True)
    before = positions[:, :-1]
    rest = positions[:, -1:] + before.masked_fill(carries, 0.0).sum(dim=1, keepdim=True)
    return F.pad((counts * before + rest).masked_fill(~carries, math.nan), (1, 0), value=math.nan)


def mean_weights(batch: Batch, mean: LossMean = "tokens", divisor: float = 1.0) -> Tensor:
    """Return the weight of each example's mean loss in the loss of a training step, ``(B,)``.

    Args:
        batch: the micro-batch.
        mean: over all target ``tokens`` of the micro-batch, or over its ``examples``, each of which counts alike.
        divisor: of the mean before backward: the micro-batches of an optimizer step, over the scale of a GradScaler.
    """
    counts = target_counts(batch).double()
    share = torch.ones_like(counts) / len(counts) if mean == "examples" else counts / counts.sum().clamp(min=1)
    return share / divisor


def find_loss_mean(losses: Tensor, counts: Tensor, loss: float) -> LossMean | None:
    """Return which mean of the examples' losses a training loss is, None where this micro-batch does not show it.

    It can where the means differ by far more than dropout moves the loss.

    Args:
        losses: ``(B,)`` mean losses of the examples of a micro-batch.
        counts: ``(B,)``, their target tokens.
        loss: the result of the training step for them, before any division; dropout may have moved it a little.

    Raises:
        ValueError: it is neither the mean over tokens nor that over examples.
    """
    losses, counts = losses.detach().double().cpu(), counts.double().cpu()
    means: dict[LossMean, float] = {
        "tokens": float(losses @ counts / counts.sum().clamp(min=1)),
        "examples": float(losses.mean()),
    }
    nearest = min(means, key=lambda mean: abs(means[mean] - loss))
    if abs(means[nearest] - loss) > _DROPOUT_NOISE_SHARE * abs(means[nearest]):
        raise ValueError(
            f"the training loss {loss:.4f} is neither the mean over tokens ({means['tokens']:.4f}) nor that over "
            f"examples ({means['examples']:.4f}) of the losses that selection computes, so the weight of an example in "
            "it is not known: return one of these means from training_step, or pass the loss_fn that it uses"
        )
    apart = abs(means["tokens"] - means["examples"])
    return nearest if abs(means[nearest] - loss) < _MEAN_TOLERANCE_SHARE * apart else None
